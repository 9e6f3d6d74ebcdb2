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
#include "services/attention_gpu/experts/deferral.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention::cuda {

// Add waits for the GPU and for the processes, for what is deferred too: here it saves no time. Not
// thread-safe.
class HostExperts : public RoutedExperts {
 public:
  // For calls of up to max_tokens, some of which defer experts if `defers`. `group` must outlive this.
  HostExperts(const model::ModelConfig& config, ExpertGroup& group, int64_t max_tokens, bool defers);
  static uint64_t DeviceBytes(const model::ModelConfig& config, int64_t max_tokens, bool defers) {
    return static_cast<uint64_t>(max_tokens * config.hidden_size) * sizeof(float) * (defers ? 2 : 1);
  }
  ~HostExperts() override;
  absl::Status Allocate();

  // Each call's routing is added to *trace; null: not kept.
  void Trace(std::vector<RoutingTrace>* trace) { trace_ = trace; }

  bool TakesFactors() const override { return true; }
  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override;
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override;

 private:
  absl::Status AddAnswers(const RoutedCall& call, cudaStream_t stream);
  absl::Status Fetch(const RoutedCall& call, const int32_t* ids, const float* weights, float* host,
                     float* device, cudaStream_t stream);

  const model::ModelConfig c_;
  ExpertGroup& group_;
  std::vector<RoutingTrace>* trace_ = nullptr;
  cudaEvent_t ready_ = nullptr;  // what the call needs is on the host
  Arena device_{Arena::Kind::kDevice}, host_{Arena::Kind::kPinnedHost};
  // Device, [max_tokens, hidden] each: the layer's answer, and what the layer before has deferred.
  float *routed_ = nullptr, *deferred_ = nullptr;
  float* host_normed_ = nullptr;
  float *host_routed_ = nullptr, *host_deferred_ = nullptr;
  int32_t *host_ids_ = nullptr, *host_defers_ = nullptr;
  float* host_weights_ = nullptr;
  SplitRouting split_;
};

}  // namespace tandem::attention::cuda
