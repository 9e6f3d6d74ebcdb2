#include "services/attention_gpu/backend/cuda/shared_calls.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/shm/call_region.h"
#include "services/attention_gpu/backend/cuda/grouped_products.h"

namespace tandem::attention::cuda {

absl::StatusOr<std::unique_ptr<SharedCalls>> SharedCalls::Open(const model::ModelConfig& config,
                                                               ExpertGroup& group, BellKind kind, int device,
                                                               int64_t max_tokens) {
  if (config.n_routed_experts > kMostSet) {
    return absl::UnimplementedError(absl::StrCat(config.n_routed_experts, " experts a layer"));
  }
  std::unique_ptr<SharedCalls> out(new SharedCalls(config));
  TANDEM_ASSIGN_OR_RETURN(out->group_, group.Beside(max_tokens));
  TANDEM_ASSIGN_OR_RETURN(out->bell_, Bell::Open(config, out->group_->device_calls(), kind, device));
  out->rings_ = out->group_->device_calls()->rings();
  out->max_tokens_ = std::min(max_tokens, out->bell_->max_tokens());
  out->device_.Want(&out->ids_, out->max_tokens_ * config.num_experts_per_tok);
  TANDEM_RETURN_IF_ERROR(out->device_.Allocate("calls beside streamed experts"));
  return out;
}

uint64_t SharedCalls::DeviceBytes(const model::ModelConfig& c, int64_t max_tokens) {
  return static_cast<uint64_t>(max_tokens * c.num_experts_per_tok) * sizeof(int32_t) + 256;
}

SharedCalls::~SharedCalls() {
  if (open_) (void)bell_->Finish(added_, absl::CancelledError("the step was given up"));
}

absl::Status SharedCalls::Ask(const RoutedCall& call, const std::vector<bool>& shared, cudaStream_t stream) {
  if (open_) return absl::FailedPreconditionError("a call beside streamed experts is under way");
  if (call.n < 1 || call.n > max_tokens_) {
    return absl::InvalidArgumentError(
        absl::StrCat(call.n, " tokens; from 1 to ", max_tokens_, " can be in a call"));
  }
  KeepExpertsParams p;
  p.ids = call.ids;
  p.pairs = call.n * c_.num_experts_per_tok;
  p.out = ids_;
  for (size_t e = 0; e < shared.size(); ++e) {
    if (shared[e]) p.keep[e / 32] |= uint32_t{1} << e % 32;
  }
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchKeepExperts(p, stream), "calls beside streamed experts"));
  TANDEM_RETURN_IF_ERROR(bell_->Begin(1));
  open_ = true;
  added_ = false;
  RoutedCall one = call;
  one.index = 0;
  one.ids = ids_;
  return bell_->Ask(one, stream);
}

absl::Status SharedCalls::Add(const RoutedCall& call, cudaStream_t stream) {
  RoutedCall one = call;
  one.index = 0;
  TANDEM_RETURN_IF_ERROR(bell_->Add(one, stream));
  added_ = true;
  return absl::OkStatus();
}

absl::StatusOr<double> SharedCalls::Finish() {
  if (!open_) return absl::FailedPreconditionError("no call beside streamed experts");
  open_ = false;
  TANDEM_RETURN_IF_ERROR(bell_->Finish(added_, absl::CancelledError("the step was given up")));
  uint64_t nanoseconds = 0;
  for (const DeviceRing& ring : rings_) {  // of one slot
    nanoseconds =
        std::max(nanoseconds, shm::ReadOnce(ring.layout.Control(ring.region, 0).answer.nanoseconds));
  }
  return 1e-9 * static_cast<double>(nanoseconds);
}

}  // namespace tandem::attention::cuda
