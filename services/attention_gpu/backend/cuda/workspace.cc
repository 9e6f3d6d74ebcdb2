#include "services/attention_gpu/backend/cuda/workspace.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/prefill_layout.h"

namespace tandem::attention::cuda {
namespace {
constexpr int64_t kMostParts = 512;
}  // namespace

Workspace::Workspace(const model::ModelConfig& c, int64_t max_tokens, int64_t cache_tokens)
    : c_(c),
      piece_(std::min(max_tokens, kPiece)),
      max_tokens_(max_tokens),
      // So that sequences that fill the cache, a token each, make one launch where they share nothing.
      parts_(std::clamp<int64_t>(cache_tokens / kSplitTokens + 16, kMaxSplits, kMostParts)) {
  const int64_t heads = c.num_attention_heads, width = c.latent_dim(), hidden = c.hidden_size;
  int64_t inner = c.n_shared_experts * c.moe_intermediate_size;
  if (c.first_k_dense_replace > 0 || c.num_moe_layers() == 0) inner = std::max(inner, c.intermediate_size);
  device_.Want(&x, max_tokens * hidden);
  device_.Want(&normed, std::max(max_tokens, kLogitsRows) * hidden);
  device_.Want(&expert_ids, max_tokens * c.num_experts_per_tok);
  device_.Want(&expert_weights, max_tokens * c.num_experts_per_tok);
  device_.Want(&router_logits, std::min(max_tokens, kRouted) * c.n_routed_experts);
  const int64_t n = piece_;
  inner_ = inner;
  device_.Want(&q_a, n * c.q_lora_rank);
  device_.Want(&kv, n * width);
  scratch_bytes_ = device_.bytes();
  device_.Want(&q, n * heads * c.qk_head_dim());
  device_.Want(&latents, n * heads * c.kv_lora_rank);
  device_.Want(&query, n * heads * width);
  device_.Want(&attended, n * heads * c.v_head_dim);
  device_.Want(&gate, n * inner);
  device_.Want(&up, n * inner);
  scratch_bytes_ = device_.bytes() - scratch_bytes_;
  device_.Want(&partial, parts_ * heads * c.kv_lora_rank);
  device_.Want(&partial_state, parts_ * heads);
  device_.Want(&logits, kLogitsRows * c.vocab_size);
  // The widest activations of a token: per head latents, what attention gives, the FFN's inner values.
  const int64_t widest = std::max({heads * c.kv_lora_rank, heads * c.v_head_dim, heads * c.qk_nope_head_dim,
                                   inner, hidden, c.q_lora_rank});
  device_.Want(&form_q, kMaxColumns * widest);
  device_.Want(&form_q_meta, kMaxColumns * widest / 32);
  device_.Want(&result_q, kMaxColumns * widest);
  device_.Want(&result_q_meta, kMaxColumns * widest / 32);
  device_.Want(&squares, kMaxColumns * std::max(hidden, c.q_lora_rank) / 32);
  form_values_ = std::max(n, kLogitsRows) * widest;
  form_scales_ = std::max(n, kLogitsRows) * heads;
  device_.Want(&form_h, form_values_);
  device_.Want(&form_h_scale, form_scales_);
}

int64_t Workspace::FormRows(int64_t width) const { return std::min(form_values_ / width, form_scales_); }

int64_t Workspace::FfnRows(int64_t inner) const {
  const int64_t wide = std::min(
      {piece_ * inner_ / inner, FormRows(std::max(inner, c_.hidden_size)), std::min(max_tokens_, kRouted)});
  return std::max(piece_, wide);
}

absl::Status Workspace::Allocate() { return device_.Allocate("the buffers of a step"); }

Workspace::~Workspace() {
  if (host_words_ != nullptr) cudaFreeHost(host_words_);
  if (device_words_ != nullptr) cudaFree(device_words_);
}

Workspace::Places Workspace::PlacesOf(int64_t n, int64_t pairs) {
  Places at;
  // The angles first: they are read in pairs and must be aligned to 8 bytes. The tables last: all other
  // places follow from the number of rows alone.
  at.token = at.angle + n * 2 * pairs;
  at.position = at.token + n;
  at.first_page = at.position + n;
  at.split = at.first_page + n;
  at.part = at.split + n;
  at.want = at.part + n;
  at.made = at.want + n;
  at.pages = at.made + n;
  at.table = at.pages + 1;
  return at;
}

absl::Status Workspace::Reserve(int64_t rows, int64_t pairs, int64_t pages) {
  int64_t words = PlacesOf(rows, pairs).table + pages;
  if (words <= words_) return absl::OkStatus();
  if (host_words_ != nullptr) cudaFreeHost(host_words_);
  if (device_words_ != nullptr) cudaFree(device_words_);
  host_words_ = device_words_ = nullptr;
  words_ = 0;
  ++generation_;
  words = (words + words / 2 + 3) / 4 * 4;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMallocHost(reinterpret_cast<void**>(&host_words_), words * 4), "page tables"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMalloc(reinterpret_cast<void**>(&device_words_), words * 4), "page tables"));
  words_ = words;
  return absl::OkStatus();
}

void Workspace::PointAt(const Places& at, int32_t page_tokens) {
  places_ = at;
  auto ints = [&](int64_t place) { return reinterpret_cast<const int32_t*>(device_words_ + place); };
  tokens = ints(at.token);
  rows.position = ints(at.position);
  rows.first_page = ints(at.first_page);
  splits = ints(at.split);
  first_partial = ints(at.part);
  wanted_rows = ints(at.want);
  generated = ints(at.made);
  rows.pages = ints(at.table);
  rows.page_tokens = page_tokens;
  rows.rope = reinterpret_cast<const float*>(device_words_ + at.angle);
}

void Workspace::Point(int64_t count, int64_t pairs, int32_t page_tokens, int32_t most_splits) {
  n = count;
  PointAt(PlacesOf(count, pairs), page_tokens);
  ranges = {{0, count, most_splits}};
  blocks = {{0, count}};
}

StepRows Workspace::RowsFrom(int64_t row) const {
  StepRows out = rows;
  out.position += row;
  out.first_page += row;
  out.rope += row * c_.qk_rope_head_dim;
  return out;
}

absl::Status Workspace::LayOut(const StepBatch& batch, std::span<const float> frequencies,
                               int32_t page_tokens) {
  n = static_cast<int64_t>(batch.tokens.size());
  const auto pairs = static_cast<int64_t>(frequencies.size());
  int64_t pages = 0;
  for (const StepSequence& s : batch.sequences)
    pages += (s.position + s.count + page_tokens - 1) / page_tokens;
  TANDEM_RETURN_IF_ERROR(Reserve(n, pairs, pages));

  const Places at_word = PlacesOf(n, pairs);
  uint32_t* const angle = host_words_ + at_word.angle;
  auto ints = [&](int64_t place) { return reinterpret_cast<int32_t*>(host_words_ + place); };
  int32_t* const token = ints(at_word.token);
  int32_t* const position = ints(at_word.position);
  int32_t* const first_page = ints(at_word.first_page);
  int32_t* const split = ints(at_word.split);
  int32_t* const part = ints(at_word.part);
  int32_t* const want = ints(at_word.want);
  int32_t* const made = ints(at_word.made);
  int32_t* const table = ints(at_word.table);

  std::copy(batch.tokens.begin(), batch.tokens.end(), token);
  *ints(at_word.pages) = static_cast<int32_t>(pages);
  int32_t at = 0;
  for (const StepSequence& s : batch.sequences) {
    const int32_t count = (s.position + s.count + page_tokens - 1) / page_tokens;
    std::copy_n(s.pages.begin(), count, table + at);
    for (int32_t i = 0; i < s.count; ++i) {
      position[s.first + i] = s.position + i;
      first_page[s.first + i] = at;
      made[s.first + i] = s.position + i >= s.generated_from ? 1 : 0;
      split[s.first + i] = s.count == 1 ? SplitsOf(int64_t{s.position} + 1) : 1;
    }
    at += count;
  }
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double a = static_cast<float>(position[t]) * frequencies[i];
      const float cs[2] = {static_cast<float>(std::cos(a)), static_cast<float>(std::sin(a))};
      std::memcpy(angle + (t * pairs + i) * 2, cs, sizeof cs);
    }
  }
  blocks.clear();
  // Rows up to `end` that no expanded sequence has, as many together as have room.
  auto fill = [&](int64_t end) {
    int64_t from = blocks.empty() ? 0 : blocks.back().first + blocks.back().count;
    for (; from < end; from += piece_) blocks.push_back({from, std::min(piece_, end - from)});
  };
  for (const StepSequence& s : batch.sequences) {
    if (!expand || !WorthExpanding(c_, s.count, s.position) ||
        LayOutPrefill(c_, s.count, int64_t{s.position} + s.count, scratch_bytes_).rows == 0) {
      continue;
    }
    fill(s.first);
    blocks.push_back({s.first, s.count, s.position, true});
  }
  fill(n);

  ranges.clear();
  for (const AttentionBlock& block : blocks) {
    int64_t parts = 0;
    for (int64_t t = block.first; t < block.first + block.count; ++t) {
      const int64_t needed = split[t] > 1 ? split[t] : 0;
      if (block.expanded) {
        part[t] = 0;
        continue;
      }
      if (t == block.first || parts + needed > parts_) {
        ranges.push_back({t, 0, 1});
        parts = 0;
      }
      part[t] = static_cast<int32_t>(parts);
      parts += needed;
      ++ranges.back().count;
      ranges.back().most_splits = std::max(ranges.back().most_splits, split[t]);
    }
  }

  wanted.clear();
  if (batch.want_logits) {
    for (int64_t t = 0; t < n; ++t) wanted.push_back(static_cast<int32_t>(t));
  } else {
    for (const StepSequence& s : batch.sequences) {
      if (s.sample) wanted.push_back(s.first + s.count - 1);
    }
  }
  std::copy(wanted.begin(), wanted.end(), want);

  PointAt(at_word, page_tokens);
  return absl::OkStatus();
}

absl::Status Workspace::Fetch(cudaStream_t stream) const {
  return ToStatus(LaunchFetch({host_words_, device_words_, places_.table, places_.pages, words_}, stream),
                  "the description of a step");
}

}  // namespace tandem::attention::cuda
