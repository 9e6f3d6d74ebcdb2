#include "services/attention_gpu/experts/stream_break_even.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"

namespace tandem::attention {
namespace {

constexpr int kCalls = 3;  // of which the median counts

}  // namespace

absl::StatusOr<StreamPrefill> ParseStreamPrefill(const std::string& text) {
  StreamPrefill out;
  if (text == "auto") return out;
  out.mode = StreamPrefill::Mode::kOff;
  if (text == "off") return out;
  out.mode = StreamPrefill::Mode::kFrom;
  if (absl::SimpleAtoi(text, &out.from_tokens) && out.from_tokens >= 1) return out;
  return absl::InvalidArgumentError(
      absl::StrCat("--stream-prefill ", text, ": auto, off or a number of tokens is expected"));
}

std::vector<int32_t> RandomExperts(int64_t tokens, int64_t k, int64_t experts) {
  std::mt19937 random(1);
  std::vector<int32_t> all(static_cast<size_t>(experts)), ids;
  std::iota(all.begin(), all.end(), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      std::uniform_int_distribution<size_t> pick(static_cast<size_t>(i), all.size() - 1);
      std::swap(all[static_cast<size_t>(i)], all[pick(random)]);
    }
    ids.insert(ids.end(), all.begin(), all.begin() + k);
  }
  return ids;
}

absl::StatusOr<double> TimeExpertCall(ExpertGroup& experts, const model::ModelConfig& c, int64_t tokens) {
  if (c.num_moe_layers() < 1) return absl::InvalidArgumentError("the model has no routed experts to time");
  std::mt19937 random(1);
  const int64_t k = c.num_experts_per_tok;
  const std::vector<int32_t> ids = RandomExperts(tokens, k, c.n_routed_experts);
  const std::vector<float> weights(ids.size(), 1.0F / static_cast<float>(k));
  std::vector<float> x(static_cast<size_t>(tokens * c.hidden_size)), out(x.size());
  std::uniform_real_distribution<float> values(-1, 1);
  for (float& v : x) v = values(random);
  ExpertCall call;
  call.n_tokens = static_cast<int32_t>(tokens);
  call.experts_per_token = static_cast<int32_t>(k);
  call.expert_ids = ids.data();
  call.expert_weights = weights.data();
  call.activations = x.data();
  call.bulk = tokens > kMostExactTokens;
  std::vector<double> seconds;
  for (int i = 0; i <= kCalls; ++i) {
    call.layer = static_cast<int32_t>(c.first_k_dense_replace + i % c.num_moe_layers());
    const absl::Time begin = absl::Now();
    TANDEM_RETURN_IF_ERROR(experts.Start(call));
    TANDEM_RETURN_IF_ERROR(experts.Finish(out.data()));
    if (i > 0) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - begin));
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[kCalls / 2];
}

int64_t BreakEvenTokens(double stream_seconds, double call_seconds, int64_t call_tokens) {
  const double tokens = stream_seconds / call_seconds * static_cast<double>(call_tokens);
  if (!(tokens < 1e9)) return std::numeric_limits<int64_t>::max();  // never, NaN included
  return std::max<int64_t>(static_cast<int64_t>(std::ceil(tokens)), 1);
}

}  // namespace tandem::attention
