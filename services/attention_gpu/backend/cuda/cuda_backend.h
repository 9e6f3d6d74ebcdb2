// The backend on one GPU: everything but the routed experts. Where this build has no CUDA, PlanCuda says so.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "common/threading/thread_pool.h"
#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/stream_break_even.h"
#include "services/attention_gpu/experts/stream_share.h"

namespace tandem::attention {

struct CudaBackendOptions {
  int device = 0;
  threading::ThreadPool::Options threads;  // for preparing the weights
  int32_t page_tokens = 32;                // a multiple of 32
  int32_t page_count = 0;                  // of the KV cache
  int32_t max_step_tokens = 512;           // of one Step, all sequences together, as long as nothing streams
  StreamPrefill stream_prefill = {StreamPrefill::Mode::kOff};  // larger steps, whose experts are streamed
  StreamShare stream_share = {StreamShare::Mode::kOff};  // experts of such steps that the processes compute
  int32_t stream_step_tokens = 4096;                     // of such a step
  uint64_t stream_buffer_bytes = 640'000'000;            // of device memory for weights on their way
  bool int8_cache = false;                               // the KV cache in 8 bits, not bfloat16
  int32_t max_graph_rows = 16;  // steps of up to so many sequences that decode are graphs
  std::string bell = "auto";    // how the GPU calls the experts: auto, stream, kernel, host, off
  int32_t defer_experts = 0;    // experts/deferral.h; the bell needs rings of kDeferralSlots slots for it
  uint64_t vram_limit = 0;      // bytes the backend may take; 0: what is free, less a reserve
};

// What will lie in the GPU's memory, in bytes, and whether that is there.
struct CudaPlan {
  std::string gpu;  // "NVIDIA H100 80GB HBM3 (9.0)"
  uint64_t weights = 0;
  uint64_t cache = 0;      // bfloat16
  uint64_t workspace = 0;  // buffers of a step
  uint64_t stream = 0;     // experts' weights on their way, and what streaming needs besides
  uint64_t available = 0;
  uint64_t total() const { return weights + cache + workspace + stream; }
  std::string ToString() const;  // for the log, in MB
};

// Looks at the GPU and at the model before anything is loaded. NotFound: no usable GPU, and what is missing;
// Unimplemented: built without CUDA, or a shape without a kernel; ResourceExhausted: with the numbers, and
// how long a context would fit.
absl::StatusOr<CudaPlan> PlanCuda(const gguf::File& file, const model::ModelConfig& config,
                                  const CudaBackendOptions& options);

// `file` is not needed afterwards. `experts` may be null for a model without MoE layers.
// A token's result depends on its sequence alone as long as steps have at most 64 tokens (bit for bit);
// larger steps use other products (kernels.h) and may differ by rounding.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const gguf::File& file,
                                                           const model::ModelConfig& config,
                                                           const CudaBackendOptions& options,
                                                           std::unique_ptr<ExpertGroup> experts);

}  // namespace tandem::attention
