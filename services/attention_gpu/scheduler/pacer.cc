#include "services/attention_gpu/scheduler/pacer.h"

#include <algorithm>

namespace tandem::attention {
namespace {

// Steps for which a measurement of the undisturbed time is trusted: a probe in as many costs prompts 3 %.
constexpr uint64_t kProbeEvery = 32;
// The share of the permitted slowdown that is aimed at; the rest is for the scatter of the times.
constexpr double kAim = 0.75;
// What a single disturbed step may take if that makes disturbed steps fewer.
constexpr double kUnseenSeconds = 0.010;
constexpr double kStepsPerDisturbed = 22;
// What steps may take in any case where prompts are urgent: tokens that come at this pace are a smooth text.
constexpr double kSmoothSeconds = 0.030;
// A stall of the machine during a disturbed step is not the prompt's.
constexpr double kLargestDebt = 2 * kStepsPerDisturbed;  // allowances

// Fewer prompt tokens alone in a step say little of what a prompt costs.
constexpr int32_t kWorthKnowing = 32;

// A moving average that one stall of the machine does not carry away.
double Blend(double old, double now, double weight, double clamp) {
  if (old <= 0) return now;
  return old + weight * (std::clamp(now, old / clamp, old * clamp) - old);
}

}  // namespace

Pacer::Pacer(double slowdown, int32_t max_chunk, int32_t max_decoding)
    : slowdown_(slowdown), max_chunk_(max_chunk), undisturbed_(max_decoding + 1) {}

double Pacer::Allowance(int32_t decoding) const {
  const double seconds = undisturbed_[decoding].seconds;
  const double calm = (slowdown_ - 1) * kAim * seconds;
  return urgency_ > 1 ? std::max(urgency_ * calm, kSmoothSeconds - seconds) : calm;
}

int32_t Pacer::Chunk(int32_t decoding) const {
  if (slowdown_ <= 0) return max_chunk_;
  const Undisturbed& u = undisturbed_[decoding];
  if (u.at == 0 || step_ - u.at >= kProbeEvery) return 0;
  if (seconds_per_prompt_token_ <= 0) return 1;
  const double allowance = Allowance(decoding);
  double room = allowance - debt_;
  if (allowance < seconds_per_prompt_token_) {
    if (debt_ >= allowance) return 0;
    room = std::max(std::min(kStepsPerDisturbed * allowance, kUnseenSeconds - u.seconds),
                    seconds_per_prompt_token_);
  }
  // Not much more than last time: what is known is the cost of a chunk of about that size.
  const double most = std::min(urgency_ > 1 ? 1e9 : max_chunk_, 2.0 * last_chunk_ + 1);
  return static_cast<int32_t>(std::clamp(room / seconds_per_prompt_token_, 0.0, most));
}

void Pacer::Observe(int32_t decoding, int32_t prompt_tokens, double seconds) {
  ++step_;
  if (decoding <= 0) {
    if (prompt_tokens >= kWorthKnowing || seconds_per_token_alone_ <= 0) {
      seconds_per_token_alone_ =
          Blend(seconds_per_token_alone_, seconds / std::max(1, prompt_tokens), 0.3, 4);
    }
    return;
  }
  Undisturbed& u = undisturbed_[decoding];
  double extra = 0;
  if (prompt_tokens == 0) {
    // Contexts grow while a value lies unused: an old one is no base for an average.
    const bool old = u.at == 0 || step_ - u.at > 4 * kProbeEvery;
    u.seconds = old ? seconds : Blend(u.seconds, seconds, 0.3, 2);
    u.at = step_;
  } else if (u.at != 0) {
    extra = std::max(seconds - u.seconds, seconds * 0.01);
    seconds_per_prompt_token_ = Blend(seconds_per_prompt_token_, extra / prompt_tokens, 0.5, 4);
    last_chunk_ = prompt_tokens;
  }
  const double allowance = Allowance(decoding);
  debt_ = std::clamp(debt_ + extra - allowance, 0.0, kLargestDebt * allowance);
}

}  // namespace tandem::attention
