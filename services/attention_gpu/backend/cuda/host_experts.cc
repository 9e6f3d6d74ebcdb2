#include "services/attention_gpu/backend/cuda/host_experts.h"

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

HostExperts::HostExperts(const model::ModelConfig& config, ExpertGroup& group, int64_t max_tokens,
                         bool defers)
    : c_(config), group_(group) {
  device_.Want(&routed_, max_tokens * c_.hidden_size);
  host_.Want(&host_normed_, max_tokens * c_.hidden_size);
  host_.Want(&host_routed_, max_tokens * c_.hidden_size);
  host_.Want(&host_ids_, max_tokens * c_.num_experts_per_tok);
  host_.Want(&host_weights_, max_tokens * c_.num_experts_per_tok);
  if (!defers) return;
  device_.Want(&deferred_, max_tokens * c_.hidden_size);
  host_.Want(&host_deferred_, max_tokens * c_.hidden_size);
  host_.Want(&host_defers_, max_tokens);
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
  if (call.route != nullptr) TANDEM_RETURN_IF_ERROR(ToStatus(LaunchRoute(*call.route, stream), "the router"));
  TANDEM_RETURN_IF_ERROR(to_host(host_ids_, call.ids, pairs));
  TANDEM_RETURN_IF_ERROR(to_host(host_weights_, call.weights, pairs));
  const float* normed = call.normed;
  if (call.factors.squares != nullptr) {  // routed_ is free until the answer comes
    TANDEM_RETURN_IF_ERROR(
        ToStatus(LaunchScaleRows(call.normed, call.factors, routed_, call.n, c_.hidden_size, stream),
                 "activations for the experts"));
    normed = routed_;
  }
  TANDEM_RETURN_IF_ERROR(to_host(host_normed_, normed, call.n * c_.hidden_size));
  if (call.defer > 0) TANDEM_RETURN_IF_ERROR(to_host(host_defers_, call.defers, call.n));
  return ToStatus(cudaEventRecord(ready_, stream), "the router");
}

absl::Status HostExperts::Add(const RoutedCall& call, cudaStream_t stream) {
  TANDEM_RETURN_IF_ERROR(AddAnswers(call, stream));
  if (call.next == nullptr) return absl::OkStatus();
  return ToStatus(LaunchNormForm(*call.next, stream), "a norm");
}

absl::Status HostExperts::AddAnswers(const RoutedCall& call, cudaStream_t stream) {
  const int64_t k = c_.num_experts_per_tok;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(ready_), "the layers before the experts"));
  const auto layer = static_cast<int32_t>(call.layer);
  if (trace_ != nullptr) {
    trace_->push_back(
        {layer, {host_ids_, host_ids_ + call.n * k}, {host_weights_, host_weights_ + call.n * k}});
  }
  const auto add = [&](const float* values) {
    return ToStatus(LaunchAdd(call.x, values, call.n * c_.hidden_size, stream), "the experts' answer");
  };
  if (call.defer > 0 && call.index > 0) TANDEM_RETURN_IF_ERROR(add(deferred_));
  if (call.defer == 0 || call.last) {
    TANDEM_RETURN_IF_ERROR(Fetch(call, host_ids_, host_weights_, host_routed_, routed_, stream));
    return add(routed_);
  }
  split_.Assign(host_ids_, host_weights_, {host_defers_, static_cast<size_t>(call.n)}, k, call.defer);
  TANDEM_RETURN_IF_ERROR(
      Fetch(call, split_.ids.data(), split_.weights.data(), host_routed_, routed_, stream));
  TANDEM_RETURN_IF_ERROR(add(routed_));
  return Fetch(call, split_.later_ids.data(), split_.later_weights.data(), host_deferred_, deferred_, stream);
}

// The processes' answer for these experts into `device`, by way of `host`. The copy that had `host` before is
// done: the event that Add has waited for came after it on the stream.
absl::Status HostExperts::Fetch(const RoutedCall& call, const int32_t* ids, const float* weights, float* host,
                                float* device, cudaStream_t stream) {
  TANDEM_RETURN_IF_ERROR(
      group_.Start({static_cast<int32_t>(call.layer), static_cast<int32_t>(call.n),
                    static_cast<int32_t>(c_.num_experts_per_tok), ids, weights, host_normed_,
                    call.n > kMostExactTokens}));
  TANDEM_RETURN_IF_ERROR(group_.Finish(host));
  return ToStatus(
      cudaMemcpyAsync(device, host, call.n * c_.hidden_size * sizeof(float), cudaMemcpyHostToDevice, stream),
      "the experts' answer");
}

}  // namespace tandem::attention::cuda
