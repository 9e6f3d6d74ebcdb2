// The reference backend: everything but the routed experts on this process's CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/kernels/kernels.h"
#include "common/model/config.h"
#include "common/threading/thread_pool.h"
#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention {

struct CpuBackendOptions {
  kernels::Precision precision = kernels::Precision::kFast;
  threading::ThreadPool::Options threads;
  int32_t page_tokens = 32;
  int32_t page_count = 0;         // of the KV cache
  int32_t max_step_tokens = 512;  // of one Step, all sequences together
  // The experts compute on the CPUs that the threads use: then they are waited for before the shared expert
  // is computed, since two processes in each other's way are slower than one after the other.
  bool experts_share_cpus = false;
  int32_t defer_experts = 0;  // experts/deferral.h; it brings no speed here
};

// `file` must outlive the backend. `experts` may be null for a model without MoE layers.
// A token's result depends on its sequence alone, not on what else is in the batch, bit for bit.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const gguf::File& file,
                                                          const model::ModelConfig& config,
                                                          const CpuBackendOptions& options,
                                                          std::unique_ptr<ExpertGroup> experts);

}  // namespace tandem::attention
