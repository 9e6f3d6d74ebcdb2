// The routed experts called from the host, layer by layer, with copies between: where the GPU cannot call
// them by itself (another host, memory that it cannot map), and where the routing is wanted on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention::cuda {

// Add waits for the GPU and for the processes. Not thread-safe.
class HostExperts : public RoutedExperts {
 public:
  // For calls of up to max_tokens. `group` must outlive this.
  HostExperts(const model::ModelConfig& config, ExpertGroup& group, int64_t max_tokens);
  static uint64_t DeviceBytes(const model::ModelConfig& config, int64_t max_tokens) {
    return static_cast<uint64_t>(max_tokens * config.hidden_size) * sizeof(float);
  }
  ~HostExperts() override;
  absl::Status Allocate();

  // Each call's routing is added to *trace; null: not kept.
  void Trace(std::vector<RoutingTrace>* trace) { trace_ = trace; }

  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override;
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override;

 private:
  const model::ModelConfig c_;
  ExpertGroup& group_;
  std::vector<RoutingTrace>* trace_ = nullptr;
  cudaEvent_t ready_ = nullptr;  // what the call needs is on the host
  Arena device_{Arena::Kind::kDevice}, host_{Arena::Kind::kPinnedHost};
  float* routed_ = nullptr;  // device, [max_tokens, hidden]
  float* host_normed_ = nullptr;
  float* host_routed_ = nullptr;
  int32_t* host_ids_ = nullptr;
  float* host_weights_ = nullptr;
};

}  // namespace tandem::attention::cuda
