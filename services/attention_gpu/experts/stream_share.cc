#include "services/attention_gpu/experts/stream_share.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention {
namespace {

double RestSeconds(const ShareCosts& c, int64_t tokens) {
  return c.rest + c.rest_token * static_cast<double>(tokens);
}

// Experts that have tokens, those first that the processes should have.
std::vector<size_t> ByTokens(std::span<const int32_t> counts, const std::vector<bool>& ahead) {
  std::vector<size_t> order;
  for (size_t e = 0; e < counts.size(); ++e) {
    if (counts[e] > 0) order.push_back(e);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    if (ahead[a] != ahead[b]) return static_cast<bool>(ahead[b]);
    return counts[a] != counts[b] ? counts[a] < counts[b] : a > b;
  });
  return order;
}

// Of `experts` experts that share `pairs` evenly: how many tokens each has.
std::vector<int32_t> Even(int64_t experts, int64_t pairs) {
  std::vector<int32_t> counts(static_cast<size_t>(experts));
  for (int64_t e = 0; e < experts; ++e) {
    counts[static_cast<size_t>(e)] = static_cast<int32_t>((pairs + e) / experts);
  }
  return counts;
}

// Experts that so many tokens meet when they choose independently.
int64_t Met(const ShareShape& shape, int64_t tokens) {
  const auto experts = static_cast<double>(shape.experts);
  const double missed = 1 - static_cast<double>(shape.experts_per_token) / experts;
  return std::max<int64_t>(std::llround(experts * (1 - std::pow(missed, static_cast<double>(tokens)))), 1);
}

}  // namespace

absl::StatusOr<StreamShare> ParseStreamShare(const std::string& text) {
  StreamShare out;
  if (text == "auto") return out;
  out.mode = StreamShare::Mode::kOff;
  if (text == "off") return out;
  out.mode = StreamShare::Mode::kPercent;
  if (absl::SimpleAtoi(text, &out.percent) && out.percent >= 0 && out.percent <= 100) return out;
  return absl::InvalidArgumentError(
      absl::StrCat("--stream-share ", text, ": auto, off or a number from 0 to 100 is expected"));
}

double CallExpertSeconds(const ShareCosts& c, double tokens) {
  const std::vector<CallExpert>& at = c.call_experts;
  if (at.empty()) return 0;
  if (at.size() == 1 || tokens <= at[0].tokens) {
    return c.call_factor * at[0].seconds * (at.size() == 1 ? std::max(1.0, tokens / at[0].tokens) : 1);
  }
  size_t i = 1;
  while (i + 1 < at.size() && tokens > at[i].tokens) ++i;
  const double slope = (at[i].seconds - at[i - 1].seconds) / (at[i].tokens - at[i - 1].tokens);
  return c.call_factor * (at[i - 1].seconds + slope * (tokens - at[i - 1].tokens));
}

double CallExpertsSeconds(const ShareCosts& c, std::span<const int32_t> counts,
                          const std::vector<bool>& shared) {
  double sum = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    if (shared[e] && counts[e] > 0) sum += CallExpertSeconds(c, counts[e]);
  }
  return sum;
}

void LearnCallFactor(double expected, double seconds, ShareCosts* c) {
  constexpr double kSteady = 0.05, kMost = 2;
  if (!(expected > 0) || !(seconds > 0) || std::abs(seconds / expected - 1) < kSteady) return;
  c->call_factor = std::clamp(c->call_factor * std::sqrt(seconds / expected), 1 / kMost, kMost);
}

double SharedLayerSeconds(const ShareCosts& c, int64_t tokens, int64_t streamed, int64_t ahead,
                          double calls) {
  const double rest = RestSeconds(c, tokens);
  const double copies = static_cast<double>(streamed) * c.stream_expert;
  const double behind = static_cast<double>(std::max<int64_t>(streamed - ahead, 0)) * c.stream_expert;
  const double bus = std::max(copies, rest + behind);
  return calls == 0 ? bus : std::max(bus, rest + c.call_token * static_cast<double>(tokens) + calls);
}

std::vector<bool> ChooseShared(const ShareCosts& c, int64_t tokens, std::span<const int32_t> counts,
                               const std::vector<bool>& ahead) {
  const std::vector<size_t> order = ByTokens(counts, ahead);
  const auto all = static_cast<int64_t>(order.size());
  const int64_t before =
      std::count_if(order.begin(), order.end(), [&](size_t e) { return static_cast<bool>(ahead[e]); });
  int64_t best = 0;
  double calls = 0, seconds = SharedLayerSeconds(c, tokens, all, before, 0);
  for (int64_t n = 1; n <= all - before; ++n) {
    calls += CallExpertSeconds(c, counts[order[static_cast<size_t>(n - 1)]]);
    const double now = SharedLayerSeconds(c, tokens, all - n, before, calls);
    if (now >= seconds) continue;
    seconds = now;
    best = n;
  }
  std::vector<bool> shared(counts.size());
  for (int64_t i = 0; i < best; ++i) shared[order[static_cast<size_t>(i)]] = true;
  return shared;
}

std::vector<bool> ChoosePercent(int percent, std::span<const int32_t> counts,
                                const std::vector<bool>& ahead) {
  const std::vector<size_t> order = ByTokens(counts, ahead);
  const size_t n = (order.size() * static_cast<size_t>(percent) + 50) / 100;
  std::vector<bool> shared(counts.size());
  for (size_t i = 0; i < n; ++i) shared[order[i]] = true;
  return shared;
}

double SharedCallSeconds(const ShareCosts& c, const ShareShape& shape, int64_t tokens) {
  const auto met = static_cast<double>(Met(shape, tokens)), n = static_cast<double>(tokens);
  return c.call_token * n +
         met * CallExpertSeconds(c, n * static_cast<double>(shape.experts_per_token) / met);
}

double StreamedLayerSeconds(const ShareCosts& c, const ShareShape& shape, int64_t tokens) {
  const int64_t used = Met(shape, tokens);
  if (tokens > shape.most_tokens) {
    return SharedLayerSeconds(c, tokens, used, std::min(used, shape.ahead), 0);
  }
  const std::vector<int32_t> counts = Even(used, tokens * shape.experts_per_token);
  std::vector<bool> ahead(counts.size());
  std::fill_n(ahead.begin(), std::min(used, shape.ahead), true);
  const std::vector<bool> shared = ChooseShared(c, tokens, counts, ahead);
  const int64_t given = std::count(shared.begin(), shared.end(), true);
  return SharedLayerSeconds(c, tokens, used - given, std::min(used, shape.ahead),
                            CallExpertsSeconds(c, counts, shared));
}

int64_t ShareStepTokens(const ShareCosts& c, const ShareShape& shape, int64_t tokens, int64_t most) {
  if (tokens <= shape.most_tokens) return shape.most_tokens;
  const int64_t whole = std::min(tokens, most);
  double pieces = 0;
  for (int64_t at = 0; at < whole; at += shape.most_tokens) {
    pieces += StreamedLayerSeconds(c, shape, std::min(shape.most_tokens, whole - at));
  }
  return pieces < StreamedLayerSeconds(c, shape, whole) ? shape.most_tokens : whole;
}

int64_t ShareBreakEven(const ShareCosts& c, const ShareShape& shape) {
  for (int64_t n = kMostExactTokens + 1; n <= shape.most_tokens; ++n) {
    double calls = 0;
    for (int64_t at = 0; at < n; at += shape.call_tokens) {
      const int64_t now = std::min(shape.call_tokens, n - at);
      calls += RestSeconds(c, now) + c.alone * SharedCallSeconds(c, shape, now);
    }
    if (StreamedLayerSeconds(c, shape, n) <= calls) return n;
  }
  return std::numeric_limits<int64_t>::max();
}

}  // namespace tandem::attention
