// In a streamed layer some experts can be computed by the expert processes while the others' weights come
// over PCIe: which ones, and what that takes. Arithmetic on counts and on what start-up has measured.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::attention {

// Tokens of a layer that the processes can have a share in: their ring takes 86 KB of memory for each of R1.
constexpr int64_t kMostSharedTokens = 4096;

// GPU memory for weights on their way in a step of `tokens`, where there is room: what comes over PCIe 5.0
// while an H100 computes everything else of a layer of R1, but for contexts of more than 32768 tokens half of
// that: R1 with 128 K tokens of int8 cache takes less than 20 GB then.
constexpr uint64_t kLeastStreamBytes = 640'000'000;  // of steps that can be shared
constexpr uint64_t AmpleStreamBytes(int64_t tokens, int64_t context) {
  constexpr uint64_t kEach = 245'000, kEachOfLong = 125'000;  // bytes a token
  constexpr int64_t kLong = 32768;
  // For steps of more than 16384 tokens: 5.6 GB were no faster than 4.0 with so many.
  constexpr uint64_t kMost = 6'144'000'000;
  if (tokens <= kMostSharedTokens) return kLeastStreamBytes;
  return std::min((context > kLong ? kEachOfLong : kEach) * static_cast<uint64_t>(tokens), kMost);
}

// --stream-share.
struct StreamShare {
  enum class Mode { kOff, kAuto, kPercent };
  Mode mode = Mode::kAuto;
  int percent = 0;  // kPercent: of a layer's experts that have tokens, 0 to 100
};
// "auto", "off" or a number from 0 to 100. InvalidArgument says so.
absl::StatusOr<StreamShare> ParseStreamShare(const std::string& text);

// What an expert that a call names takes the processes, with so many tokens.
struct CallExpert {
  double tokens = 0;
  double seconds = 0;
};

// Seconds of a layer's parts, measured while copies and processes are both at work: they share the memory's
// bandwidth.
struct ShareCosts {
  double stream_expert = 0;              // an expert's weights over the bus
  double call_token = 0;                 // a token of a call: its activations there, its answer back
  std::vector<CallExpert> call_experts;  // by rising tokens, and seconds that do not fall; at least one
  double call_factor = 1;                // of call_experts, by what later calls have shown
  // Everything else of a layer, before the routing is known: so long the processes have nothing to do.
  double rest = 0, rest_token = 0;
  // What calls take when nothing is copied, as a share of what they take beside copies.
  double alone = 1;
};

// An expert with that many tokens: between two of call_experts in proportion, below the first one as much as
// there (a tile of tokens is not cheaper half full), above the last one it goes on as before it.
double CallExpertSeconds(const ShareCosts& costs, double tokens);
// Those with shared[e] together, counts[e] their tokens.
double CallExpertsSeconds(const ShareCosts& costs, std::span<const int32_t> counts,
                          const std::vector<bool>& shared);
// Learns from calls whose experts took `seconds` and should have taken `expected`: goes half of the way, up
// to a factor of 2 in all, and none of it where they are less than a twentieth apart, so that what is steady
// stays.
void LearnCallFactor(double expected, double seconds, ShareCosts* costs);

// Seconds of a layer in which `streamed` experts come over the bus, `ahead` of which can come before the
// routing is known, and the processes compute others, which take `calls` of them; 0: none.
double SharedLayerSeconds(const ShareCosts& costs, int64_t tokens, int64_t streamed, int64_t ahead,
                          double calls);

// What the processes compute: shared[e] for each expert, counts[e] its tokens. Those with the fewest tokens,
// the last first where they have as many, until both sides would end together. Not those that are ahead[e],
// whose weights are on their way already. A function of its arguments alone.
std::vector<bool> ChooseShared(const ShareCosts& costs, int64_t tokens, std::span<const int32_t> counts,
                               const std::vector<bool>& ahead);
// A percentage of the experts that have tokens, rounded; in the same order, those that are ahead at last.
std::vector<bool> ChoosePercent(int percent, std::span<const int32_t> counts, const std::vector<bool>& ahead);

// Which prompts there are to be, for a break-even.
struct ShareShape {
  int64_t experts = 0;            // of a layer
  int64_t experts_per_token = 0;  // k
  int64_t ahead = 0;              // experts copied before the routing is known
  int64_t call_tokens = 0;        // of a step whose tokens go to the processes instead
  int64_t most_tokens = 0;        // of a shared step
};
// Seconds of a call of so many tokens with experts chosen evenly, beside copies.
double SharedCallSeconds(const ShareCosts& costs, const ShareShape& shape, int64_t tokens);
// Seconds of a layer of a streamed step of so many tokens, experts chosen evenly; nothing of one with more
// than shape.most_tokens is shared.
double StreamedLayerSeconds(const ShareCosts& costs, const ShareShape& shape, int64_t tokens);
// Of a prompt's `tokens`, how many its next step is to have at most, of up to `most`: shape.most_tokens where
// it needs no more, or where several shared steps are faster than one that is too large to be shared.
int64_t ShareStepTokens(const ShareCosts& costs, const ShareShape& shape, int64_t tokens, int64_t most);
// From how many tokens on a layer is faster shared than by calls alone, experts chosen evenly; max() of the
// type: never. Not below kMostExactTokens + 1 tokens, up to which products are exact.
int64_t ShareBreakEven(const ShareCosts& costs, const ShareShape& shape);

}  // namespace tandem::attention
