// How long calls to expert processes take, whichever way they go.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/round_trip.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention {

// Calls of `n_tokens` tokens of zeros to `layer`, each with `experts_per_token` times the id -1: no expert is
// read. With n_tokens 0 the processes answer without looking further (the bare round trip); with 1 they
// go all the way of a call, but for the weights.
absl::StatusOr<shm::RoundTrip> MeasureEmptyCalls(ExpertGroup& group, int32_t layer, int32_t n_tokens,
                                                 int32_t experts_per_token, int64_t hidden_size,
                                                 int64_t calls, absl::Duration most);

}  // namespace tandem::attention
