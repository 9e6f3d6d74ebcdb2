#include "services/attention_gpu/backend/cuda/host_experts.h"

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

HostExperts::HostExperts(const model::ModelConfig& config, ExpertGroup& group, int64_t max_tokens)
    : c_(config), group_(group) {
  device_.Want(&routed_, max_tokens * c_.hidden_size);
  host_.Want(&host_normed_, max_tokens * c_.hidden_size);
  host_.Want(&host_routed_, max_tokens * c_.hidden_size);
  host_.Want(&host_ids_, max_tokens * c_.num_experts_per_tok);
  host_.Want(&host_weights_, max_tokens * c_.num_experts_per_tok);
}

HostExperts::~HostExperts() {
  if (ready_ != nullptr) cudaEventDestroy(ready_);
}

absl::Status HostExperts::Allocate() {
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "an event"));
  TANDEM_RETURN_IF_ERROR(device_.Allocate("the experts' answers"));
  return host_.Allocate("calls to the experts");
}

absl::Status HostExperts::Ask(const RoutedCall& call, cudaStream_t stream) {
  const auto to_host = [&](auto* to, const auto* from, int64_t count) {
    return ToStatus(cudaMemcpyAsync(to, from, count * sizeof(*to), cudaMemcpyDeviceToHost, stream),
                    "copying to the host");
  };
  const int64_t pairs = call.n * c_.num_experts_per_tok;
  TANDEM_RETURN_IF_ERROR(to_host(host_ids_, call.ids, pairs));
  TANDEM_RETURN_IF_ERROR(to_host(host_weights_, call.weights, pairs));
  TANDEM_RETURN_IF_ERROR(to_host(host_normed_, call.normed, call.n * c_.hidden_size));
  return ToStatus(cudaEventRecord(ready_, stream), "the router");
}

absl::Status HostExperts::Add(const RoutedCall& call, cudaStream_t stream) {
  const int64_t k = c_.num_experts_per_tok, values = call.n * c_.hidden_size;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(ready_), "the layers before the experts"));
  const auto layer = static_cast<int32_t>(call.layer);
  if (trace_ != nullptr) {
    trace_->push_back(
        {layer, {host_ids_, host_ids_ + call.n * k}, {host_weights_, host_weights_ + call.n * k}});
  }
  const ExpertCall expert_call{
      layer, static_cast<int32_t>(call.n), static_cast<int32_t>(k), host_ids_, host_weights_, host_normed_};
  TANDEM_RETURN_IF_ERROR(group_.Start(expert_call));
  // The copy of the layer before is done: the event above came after it on the stream.
  TANDEM_RETURN_IF_ERROR(group_.Finish(host_routed_));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMemcpyAsync(routed_, host_routed_, values * sizeof(float), cudaMemcpyHostToDevice, stream),
               "the experts' answer"));
  return ToStatus(LaunchAdd(call.x, routed_, values, stream), "the experts' answer");
}

}  // namespace tandem::attention::cuda
