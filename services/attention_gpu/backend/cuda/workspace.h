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

// Rows that pass a layer's attention together: some of the step, or those of one sequence that attend to
// expanded keys and values.
struct AttentionBlock {
  int64_t first = 0, count = 0;
  int64_t position = 0;  // of the first row, where expanded
  bool expanded = false;
};

class Workspace {
 public:
  static constexpr int64_t kLogitsRows = 64;  // logits computed together
  static constexpr int64_t kPiece = 512;      // tokens that pass a layer's dense part together
  static constexpr int64_t kRouted = 4096;    // tokens whose experts are chosen together

  // For steps of up to max_tokens; cache_tokens are in the KV cache of all sequences.
  Workspace(const model::ModelConfig& config, int64_t max_tokens, int64_t cache_tokens);
  uint64_t bytes() const { return device_.bytes(); }  // of device memory
  absl::Status Allocate();
  ~Workspace();

  // Writes down the batch's tokens, positions, pages and angles for Fetch. Rows of sequences that have one
  // token in the step are split by their position (SplitsOf), others not at all. What has fetched the ones
  // before must have finished on the device.
  absl::Status LayOut(const StepBatch& batch, std::span<const float> frequencies, int32_t page_tokens);
  // Brings to the device what LayOut has written, as it is then: `stream` may be captured after Point.
  absl::Status Fetch(cudaStream_t stream) const;
  // Points everything at where LayOut puts it for a step of `n` rows, all sampled, one range: for a graph,
  // which stays good as long as `generation` does not change.
  void Point(int64_t n, int64_t pairs, int32_t page_tokens, int32_t most_splits);
  uint64_t generation() const { return generation_; }
  // Room for the description of steps with so many rows and entries of page tables.
  absl::Status Reserve(int64_t rows, int64_t pairs, int64_t pages);

  int64_t piece_tokens() const { return piece_; }
  // Rows that pass an FFN of so many inner values together.
  int64_t FfnRows(int64_t inner) const;
  // Rows of `width` values that have room in form_h.
  int64_t FormRows(int64_t width) const;
  // Memory for LayOutPrefill: that of q, latents, query, attended, gate and up, which are one allocation.
  uint8_t* scratch() const { return reinterpret_cast<uint8_t*>(q); }
  uint64_t scratch_bytes() const { return scratch_bytes_; }
  StepRows RowsFrom(int64_t row) const;

  // What LayOut made and Fetch brought. Device memory.
  int64_t n = 0;
  StepRows rows;
  const int32_t* tokens = nullptr;
  const int32_t* splits = nullptr;
  const int32_t* first_partial = nullptr;
  const int32_t* generated = nullptr;  // [n] 1: the token was generated, 0: it is of a prompt
  std::vector<AttentionRange> ranges;  // of the rows that are not expanded
  std::vector<AttentionBlock> blocks;  // of all rows, in order
  bool expand = true;                  // LayOut may choose expanded attention
  // Rows whose logits are wanted, in order, on both sides.
  std::vector<int32_t> wanted;
  const int32_t* wanted_rows = nullptr;

  // Device memory. [max_tokens, ...] each:
  float* x = nullptr;             // [hidden]
  float* normed = nullptr;        // [hidden]
  int32_t* expert_ids = nullptr;  // [k]
  float* expert_weights = nullptr;
  float* router_logits = nullptr;  // [min(max_tokens, kRouted), experts]
  // [piece_tokens, ...] each:
  float* q_a = nullptr;       // [q_lora]
  float* q = nullptr;         // [heads, qk]
  float* kv = nullptr;        // [lora + rope]
  float* latents = nullptr;   // [heads, lora]: the absorbed query, later what attention gives
  uint16_t* query = nullptr;  // [heads, lora + rope]
  float* attended = nullptr;  // [heads, v]
  float* gate = nullptr;      // [inner]
  float* up = nullptr;        // [inner]
  float* partial = nullptr;   // [parts of a launch, heads, lora]
  float2* partial_state = nullptr;
  float* logits = nullptr;  // [kLogitsRows, vocab]
  // The forms of activations, for whatever product is next.
  int8_t* form_q = nullptr;
  float2* form_q_meta = nullptr;
  int8_t* result_q = nullptr;  // as those, for what a product makes that reads them
  float2* result_q_meta = nullptr;
  float* squares = nullptr;  // what norms leave to products (RowFactors), of kMaxColumns rows
  uint16_t* form_h = nullptr;
  float* form_h_scale = nullptr;

 private:
  // The parts of the description, in 4-byte words from its beginning.
  struct Places {
    int64_t angle = 0, token = 0, position = 0, first_page = 0, split = 0, part = 0, want = 0, made = 0,
            pages = 0, table = 0;
  };
  static Places PlacesOf(int64_t n, int64_t pairs);
  void PointAt(const Places& places, int32_t page_tokens);

  const model::ModelConfig c_;
  const int64_t piece_, max_tokens_;
  const int64_t parts_;  // of attention, in one launch; kMaxSplits at least
  int64_t inner_ = 0, form_values_ = 0, form_scales_ = 0;
  uint64_t scratch_bytes_ = 0;
  uint64_t generation_ = 0;  // of the description's place
  Arena device_{Arena::Kind::kDevice};
  // The description of the step, 4-byte words, on both sides; grows with the page tables.
  uint32_t* host_words_ = nullptr;
  uint32_t* device_words_ = nullptr;
  int64_t words_ = 0;  // a multiple of 4
  Places places_;
};

}  // namespace tandem::attention::cuda
