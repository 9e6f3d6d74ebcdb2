#include "services/attention_gpu/backend/cuda/workspace.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/status_macros.h"

namespace tandem::attention::cuda {

Workspace::Workspace(const model::ModelConfig& c, int64_t max_tokens) : c_(c) {
  const int64_t heads = c.num_attention_heads, width = c.latent_dim(), hidden = c.hidden_size;
  int64_t inner = c.n_shared_experts * c.moe_intermediate_size;
  if (c.first_k_dense_replace > 0 || c.num_moe_layers() == 0) inner = std::max(inner, c.intermediate_size);
  const int64_t n = max_tokens;
  device_.Want(&x, n * hidden);
  device_.Want(&normed, std::max(n, kLogitsRows) * hidden);
  device_.Want(&q_a, n * c.q_lora_rank);
  device_.Want(&q, n * heads * c.qk_head_dim());
  device_.Want(&kv, n * width);
  device_.Want(&latents, n * heads * c.kv_lora_rank);
  device_.Want(&query, n * heads * width);
  device_.Want(&attended, n * heads * c.v_head_dim);
  device_.Want(&gate, n * inner);
  device_.Want(&up, n * inner);
  device_.Want(&router_logits, n * c.n_routed_experts);
  device_.Want(&expert_ids, n * c.num_experts_per_tok);
  device_.Want(&expert_weights, n * c.num_experts_per_tok);
  device_.Want(&routed, n * hidden);
  device_.Want(&partial, kParts * heads * c.kv_lora_rank);
  device_.Want(&partial_state, kParts * heads);
  device_.Want(&logits, kLogitsRows * c.vocab_size);
  device_.Want(&best_tokens, kLogitsRows);
  // The widest activations of a token: per head latents, what attention gives, the FFN's inner values.
  const int64_t widest = std::max({heads * c.kv_lora_rank, heads * c.v_head_dim, heads * c.qk_nope_head_dim,
                                   inner, hidden, c.q_lora_rank});
  device_.Want(&form_q, kMaxColumns * widest);
  device_.Want(&form_q_meta, kMaxColumns * widest / 32);
  device_.Want(&form_h, std::max(n, kLogitsRows) * widest);
  device_.Want(&form_h_scale, std::max(n, kLogitsRows) * heads);

  host_.Want(&host_normed, n * hidden);
  host_.Want(&host_routed, n * hidden);
  host_.Want(&host_expert_ids, n * c.num_experts_per_tok);
  host_.Want(&host_expert_weights, n * c.num_experts_per_tok);
  host_.Want(&host_logits, kLogitsRows * c.vocab_size);
  host_.Want(&host_best_tokens, kLogitsRows);
}

absl::Status Workspace::Allocate() {
  TANDEM_RETURN_IF_ERROR(device_.Allocate("the buffers of a step"));
  TANDEM_RETURN_IF_ERROR(host_.Allocate("the buffers of a step"));
  return Reserve(int64_t{1} << 16);
}

Workspace::~Workspace() {
  if (host_words_ != nullptr) cudaFreeHost(host_words_);
  if (device_words_ != nullptr) cudaFree(device_words_);
}

absl::Status Workspace::Reserve(int64_t words) {
  if (words <= words_) return absl::OkStatus();
  if (host_words_ != nullptr) cudaFreeHost(host_words_);
  if (device_words_ != nullptr) cudaFree(device_words_);
  host_words_ = device_words_ = nullptr;
  words_ = 0;
  words += words / 2;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMallocHost(reinterpret_cast<void**>(&host_words_), words * 4), "page tables"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMalloc(reinterpret_cast<void**>(&device_words_), words * 4), "page tables"));
  words_ = words;
  return absl::OkStatus();
}

absl::Status Workspace::LayOut(const StepBatch& batch, std::span<const float> frequencies,
                               int32_t page_tokens, cudaStream_t stream) {
  n = static_cast<int64_t>(batch.tokens.size());
  const auto pairs = static_cast<int64_t>(frequencies.size());
  int64_t pages = 0;
  for (const StepSequence& s : batch.sequences)
    pages += (s.position + s.count + page_tokens - 1) / page_tokens;
  TANDEM_RETURN_IF_ERROR(Reserve(n * (6 + 2 * pairs) + pages));

  int64_t used = 0;
  auto take = [&](int64_t count) {
    uint32_t* p = host_words_ + used;
    used += count;
    return p;
  };
  auto device = [&](const uint32_t* p) { return device_words_ + (p - host_words_); };
  // The angles first: they are read in pairs and must be aligned to 8 bytes.
  uint32_t* angle = take(n * 2 * pairs);
  auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(count)); };
  int32_t* token = ints(n);
  int32_t* position = ints(n);
  int32_t* first_page = ints(n);
  int32_t* split = ints(n);
  int32_t* part = ints(n);
  int32_t* want = ints(n);
  int32_t* table = ints(pages);

  std::copy(batch.tokens.begin(), batch.tokens.end(), token);
  int32_t at = 0;
  for (const StepSequence& s : batch.sequences) {
    const int32_t count = (s.position + s.count + page_tokens - 1) / page_tokens;
    std::copy_n(s.pages.begin(), count, table + at);
    for (int32_t i = 0; i < s.count; ++i) {
      position[s.first + i] = s.position + i;
      first_page[s.first + i] = at;
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
  ranges.clear();
  int64_t parts = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t needed = split[t] > 1 ? split[t] : 0;
    if (ranges.empty() || parts + needed > kParts) {
      ranges.push_back({t, 0, 1});
      parts = 0;
    }
    part[t] = static_cast<int32_t>(parts);
    parts += needed;
    ++ranges.back().count;
    ranges.back().most_splits = std::max(ranges.back().most_splits, split[t]);
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

  auto device_ints = [&](const int32_t* p) {
    return reinterpret_cast<const int32_t*>(device(reinterpret_cast<const uint32_t*>(p)));
  };
  tokens = device_ints(token);
  rows.position = device_ints(position);
  rows.first_page = device_ints(first_page);
  splits = device_ints(split);
  first_partial = device_ints(part);
  wanted_rows = device_ints(want);
  rows.pages = device_ints(table);
  rows.page_tokens = page_tokens;
  rows.rope = reinterpret_cast<const float*>(device(angle));
  return ToStatus(cudaMemcpyAsync(device_words_, host_words_, used * 4, cudaMemcpyHostToDevice, stream),
                  "the description of a step");
}

}  // namespace tandem::attention::cuda
