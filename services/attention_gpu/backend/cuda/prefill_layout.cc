#include "services/attention_gpu/backend/cuda/prefill_layout.h"

#include <algorithm>

#include "services/attention_gpu/backend/cuda/prefill_attention.h"

namespace tandem::attention::cuda {
namespace {

constexpr int64_t kMostRows = 4096;  // of a chunk: keys and values are made again for the next
// Blocks of attention that keep a large GPU busy; heads are taken together until there are so many.
constexpr int64_t kBlocks = 512;
constexpr int64_t kLeastPositions = 1024;
// What the absorbed form would cost more, by what keys and values cost: measured where both are as fast (R1:
// 165 rows behind 16384 tokens), with a little to spare.
constexpr double kMargin = 1.1;

int64_t Up(int64_t n, int64_t to) { return (n + to - 1) / to; }

int64_t HeadsFor(int64_t heads, int64_t rows) {
  int64_t group = 1;
  while (group * Up(rows, kPrefillRows) < kBlocks && heads % (2 * group) == 0) group *= 2;
  return group * Up(rows, kPrefillRows) < kBlocks ? heads : group;
}

PrefillLayout Try(const model::ModelConfig& c, int64_t rows, int64_t heads, int64_t tokens, uint64_t bytes) {
  const int64_t all = c.num_attention_heads, qk = c.qk_head_dim(), v = c.v_head_dim, lora = c.kv_lora_rank;
  PrefillLayout l;
  uint64_t at = 0;
  auto take = [&](int64_t size) {
    const uint64_t offset = at;
    at += (static_cast<uint64_t>(size) + 255) / 256 * 256;
    return offset;
  };
  l.low = take(rows * (c.q_lora_rank > 0 ? c.q_lora_rank : c.hidden_size) * 2);
  l.low_scale = take(rows * 4);
  l.attended = take(rows * all * v * 2);
  l.attended_scale = take(rows * 4);
  l.unit = take(4);
  l.query = take(rows * heads * qk * 2);
  l.query_scale = take(rows * heads * 4);
  l.key_weights = take(heads * c.qk_nope_head_dim * lora * 2);
  const int64_t projected = (c.q_lora_rank + c.latent_dim()) * 4;
  const int64_t a_position = (c.latent_dim() + heads * (c.qk_nope_head_dim + v)) * 2;
  constexpr int64_t kGaps = 4 * 256;
  auto room = [&] { return static_cast<int64_t>(bytes) - static_cast<int64_t>(at) - kGaps; };
  l.positions = tokens;
  if (room() < tokens * a_position) {
    l.carry = take(rows * heads * v * 4);
    l.carry_state = take(rows * heads * 8);
    l.positions = room() / a_position / kPrefillTile * kPrefillTile;
  }
  l.wide = std::min(rows, room() / projected);
  if (l.positions < std::min(tokens, kLeastPositions) || l.wide < std::min<int64_t>(rows, kPrefillRows) ||
      room() < rows * heads * qk * 4) {
    return {};
  }
  l.rows = rows;
  l.heads = heads;
  const uint64_t shared = at;
  l.q_a = take(l.wide * c.q_lora_rank * 4);
  l.kv = take(l.wide * c.latent_dim() * 4);
  l.q = shared;
  at = shared;
  l.latents = take(l.positions * lora * 2);
  l.rotated = take(l.positions * c.qk_rope_head_dim * 2);
  l.expanded = take(l.positions * heads * (c.qk_nope_head_dim + v) * 2);
  return l;
}

}  // namespace

PrefillLayout LayOutPrefill(const model::ModelConfig& c, int64_t count, int64_t tokens, uint64_t bytes) {
  for (int64_t chunks = Up(count, kMostRows);; ++chunks) {
    const int64_t rows = Up(count, chunks);
    for (int64_t heads = HeadsFor(c.num_attention_heads, rows);; heads /= 2) {
      const PrefillLayout l = Try(c, rows, heads, tokens, bytes);
      if (l.rows > 0) return l;
      if (heads % 2 != 0) break;
    }
    if (rows <= kPrefillRows) return {};
  }
}

bool WorthExpanding(const model::ModelConfig& c, int64_t count, int64_t position) {
  if (count < kPrefillRows ||
      !PrefillAttentionSupports(c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)) {
    return false;
  }
  const double rows = static_cast<double>(count), before = static_cast<double>(position);
  const auto lora = static_cast<double>(c.kv_lora_rank),
             made = static_cast<double>(c.qk_nope_head_dim + c.v_head_dim);
  const double saved = rows * (before + rows / 2) * (2 * lora - made);
  return saved > kMargin * (before + rows) * lora * made;
}

}  // namespace tandem::attention::cuda
