// The buffers of a step on the GPU, and what the host tells it about the step's rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

// Rows of attention launched together; they share the buffers of parts.
struct AttentionRange {
  int64_t first = 0, count = 0;
  int32_t most_splits = 1;
};

class Workspace {
 public:
  static constexpr int64_t kParts = 128;      // of attention, in one launch; kMaxSplits at least
  static constexpr int64_t kLogitsRows = 64;  // logits computed together

  Workspace(const model::ModelConfig& config, int64_t max_tokens);
  uint64_t bytes() const { return device_.bytes(); }  // of device memory
  absl::Status Allocate();
  ~Workspace();

  // Brings the batch's tokens, positions, pages and angles to the device, on `stream`. Rows of sequences that
  // have one token in the step are split by their position (SplitsOf), others not at all. The call before
  // must have finished on the device.
  absl::Status LayOut(const StepBatch& batch, std::span<const float> frequencies, int32_t page_tokens,
                      cudaStream_t stream);

  // What LayOut made. Device memory.
  int64_t n = 0;
  StepRows rows;
  const int32_t* tokens = nullptr;
  const int32_t* splits = nullptr;
  const int32_t* first_partial = nullptr;
  std::vector<AttentionRange> ranges;
  // Rows whose logits are wanted, in order, on both sides.
  std::vector<int32_t> wanted;
  const int32_t* wanted_rows = nullptr;

  // [max_tokens, ...] each, device memory.
  float* x = nullptr;              // [hidden]
  float* normed = nullptr;         // [hidden]
  float* q_a = nullptr;            // [q_lora]
  float* q = nullptr;              // [heads, qk]
  float* kv = nullptr;             // [lora + rope]
  float* latents = nullptr;        // [heads, lora]: the absorbed query, later what attention gives
  uint16_t* query = nullptr;       // [heads, lora + rope]
  float* attended = nullptr;       // [heads, v]
  float* gate = nullptr;           // [inner]
  float* up = nullptr;             // [inner]
  float* router_logits = nullptr;  // [experts]
  int32_t* expert_ids = nullptr;   // [k]
  float* expert_weights = nullptr;
  float* routed = nullptr;  // [hidden]
  float* partial = nullptr;
  float2* partial_state = nullptr;
  float* logits = nullptr;         // [kLogitsRows, vocab]
  int32_t* best_tokens = nullptr;  // [kLogitsRows]
  // The forms of activations, for whatever product is next.
  int8_t* form_q = nullptr;
  float2* form_q_meta = nullptr;
  uint16_t* form_h = nullptr;
  float* form_h_scale = nullptr;

  // Page-locked host memory.
  float* host_normed = nullptr;
  float* host_routed = nullptr;
  int32_t* host_expert_ids = nullptr;
  float* host_expert_weights = nullptr;
  float* host_logits = nullptr;
  int32_t* host_best_tokens = nullptr;

 private:
  absl::Status Reserve(int64_t words);  // of the description

  const model::ModelConfig c_;
  Arena device_{Arena::Kind::kDevice}, host_{Arena::Kind::kPinnedHost};
  // The description of the step, 4-byte words, on both sides; grows with the page tables.
  uint32_t* host_words_ = nullptr;
  uint32_t* device_words_ = nullptr;
  int64_t words_ = 0;
};

}  // namespace tandem::attention::cuda
