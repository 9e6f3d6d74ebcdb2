#include "services/attention_gpu/scheduler/pacer.h"

#include <algorithm>

namespace tandem::attention {
namespace {

// Steps for which a measurement of the undisturbed time is trusted: a probe in as many costs prompts 3 %.
constexpr uint64_t kProbeEvery = 32;
// The share of the permitted slowdown that is aimed at; the rest is for the scatter of the times.
constexpr double kAim = 0.75;
constexpr double kNewWeight = 0.3;
constexpr int32_t kFirstChunk = 4;

// A moving average that one stall of the machine does not carry away.
double Blend(double old, double now) {
  if (old <= 0) return now;
  return old + kNewWeight * (std::clamp(now, old / 2, old * 2) - old);
}

}  // namespace

Pacer::Pacer(double slowdown, int32_t max_chunk, int32_t max_decoding)
    : slowdown_(slowdown), max_chunk_(max_chunk), undisturbed_(max_decoding + 1) {}

int32_t Pacer::Chunk(int32_t decoding) {
  if (slowdown_ <= 0) return max_chunk_;
  const Undisturbed& u = undisturbed_[decoding];
  if (u.at == 0 || step_ - u.at >= kProbeEvery) return 0;
  if (seconds_per_prompt_token_ <= 0) return std::min(kFirstChunk, max_chunk_);
  const double room = (slowdown_ - 1) * kAim * u.seconds / seconds_per_prompt_token_;
  return static_cast<int32_t>(std::clamp(room, 1.0, static_cast<double>(max_chunk_)));
}

void Pacer::Observe(int32_t decoding, int32_t prompt_tokens, double seconds) {
  ++step_;
  if (decoding <= 0) return;
  Undisturbed& u = undisturbed_[decoding];
  if (prompt_tokens == 0) {
    // Contexts grow while a value lies unused: an old one is no base for an average.
    const bool old = u.at == 0 || step_ - u.at > 4 * kProbeEvery;
    u.seconds = old ? seconds : Blend(u.seconds, seconds);
    u.at = step_;
  } else if (u.at != 0) {
    const double extra = std::max(seconds - u.seconds, seconds * 0.01);
    seconds_per_prompt_token_ = Blend(seconds_per_prompt_token_, extra / prompt_tokens);
  }
}

}  // namespace tandem::attention
