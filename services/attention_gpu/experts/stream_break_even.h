// From how many prompt tokens on it pays to stream the routed experts' weights to the GPU instead of sending
// the tokens to the expert processes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention {

// --stream-prefill.
struct StreamPrefill {
  enum class Mode { kOff, kAuto, kFrom };
  Mode mode = Mode::kAuto;
  int64_t from_tokens = 0;  // kFrom
};
// "auto", "off" or a number of tokens, 1 at least. InvalidArgument says so.
absl::StatusOr<StreamPrefill> ParseStreamPrefill(const std::string& text);

// Made-up routing: for each of `tokens` tokens k different ones of the first `experts` experts, at random;
// the same for the same numbers. [tokens, k]
std::vector<int32_t> RandomExperts(int64_t tokens, int64_t k, int64_t experts);

// Seconds of one call of `tokens` made-up tokens, each with experts chosen at random: the median of calls to
// different layers, after one that warms up. The group's own errors.
absl::StatusOr<double> TimeExpertCall(ExpertGroup& experts, const model::ModelConfig& config, int64_t tokens);

// The least number of tokens that take longer by calls (call_seconds for call_tokens of them, one layer) than
// streaming the layer takes, whatever their number. Calls of fewer tokens cost more a token, so that fewer
// tokens than this may already break even.
int64_t BreakEvenTokens(double stream_seconds, double call_seconds, int64_t call_tokens);

}  // namespace tandem::attention
