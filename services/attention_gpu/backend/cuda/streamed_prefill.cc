#include "services/attention_gpu/backend/cuda/streamed_prefill.h"

#include <algorithm>
#include <utility>

#include "common/base/status_macros.h"
#include "common/telemetry/log.h"

namespace tandem::attention::cuda {
namespace {

constexpr uint64_t kMeasuredBytes = uint64_t{512} << 20;

}  // namespace

void StreamedPrefill::Open() {
  Close();
  if (options_.when.mode == StreamPrefill::Mode::kOff) return;
  const absl::Status status = TryOpen();
  if (status.ok()) return;
  Close();
  const std::string why(status.message());
  if (options_.when.mode == StreamPrefill::Mode::kAuto) {
    spdlog::info("prompts are not streamed: {}", why);
  } else {
    spdlog::warn("--stream-prefill: prompts are not streamed: {}", why);
  }
}

absl::Status StreamedPrefill::TryOpen() {
  TANDEM_ASSIGN_OR_RETURN(auto maps, group_.MapWeights());
  TANDEM_ASSIGN_OR_RETURN(experts_, StreamedExperts::Create(std::move(maps), c_, options_.stream));
  spdlog::info("experts can be streamed: {}", experts_->Description());
  if (from_tokens_ == 0 && options_.when.mode == StreamPrefill::Mode::kFrom) {
    from_tokens_ = options_.when.from_tokens;
  }
  if (from_tokens_ == 0) TANDEM_RETURN_IF_ERROR(Measure());
  if (from_tokens_ > options_.stream.max_tokens) {
    return absl::FailedPreconditionError("it would pay from more tokens on than a step takes");
  }
  spdlog::info("prompts of {} tokens and more are streamed", from_tokens_);
  return absl::OkStatus();
}

absl::Status StreamedPrefill::Measure() {
  TANDEM_ASSIGN_OR_RETURN(const double rate, experts_->MeasureCopy(kMeasuredBytes));
  const auto layer_bytes = static_cast<double>(experts_->LayerBytes(c_.first_k_dense_replace));
  TANDEM_ASSIGN_OR_RETURN(const double call, TimeExpertCall(group_, c_, options_.call_tokens));
  const double layer = layer_bytes / rate;
  spdlog::info("weights come at {:.1f} GB/s, {:.2f} ms a layer; the processes take {:.2f} ms for {} tokens",
               rate / 1e9, layer * 1e3, call * 1e3, options_.call_tokens);
  from_tokens_ = BreakEvenTokens(layer, call, options_.call_tokens);
  return absl::OkStatus();
}

absl::StatusOr<RoutedExperts*> StreamedPrefill::Begin() {
  if (experts_ == nullptr) return nullptr;
  TANDEM_RETURN_IF_ERROR(experts_->Begin());
  return experts_.get();
}

}  // namespace tandem::attention::cuda
