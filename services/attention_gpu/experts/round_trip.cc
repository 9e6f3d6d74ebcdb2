#include "services/attention_gpu/experts/round_trip.h"

#include <vector>

#include "common/base/status_macros.h"

namespace tandem::attention {

absl::StatusOr<shm::RoundTrip> MeasureEmptyCalls(ExpertGroup& group, int32_t layer, int32_t n_tokens,
                                                 int32_t experts_per_token, int64_t hidden_size,
                                                 int64_t calls, absl::Duration most) {
  const auto pairs = static_cast<size_t>(n_tokens) * static_cast<size_t>(experts_per_token);
  const auto values = static_cast<size_t>(n_tokens) * static_cast<size_t>(hidden_size);
  const std::vector<int32_t> ids(pairs, -1);
  const std::vector<float> weights(pairs, 0.0F), x(values, 0.0F);
  std::vector<float> out(values);
  const ExpertCall call{layer, n_tokens, experts_per_token, ids.data(), weights.data(), x.data()};
  return shm::MeasureRoundTrips(calls / 10, calls, most, [&]() -> absl::Status {
    TANDEM_RETURN_IF_ERROR(group.Start(call));
    return group.Finish(out.data());
  });
}

}  // namespace tandem::attention
