// A sequence on its way through the scheduler.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/time/time.h"
#include "services/attention_gpu/kv/kv_cache.h"
#include "services/attention_gpu/scheduler/scheduler.h"

namespace tandem::attention {

struct Sequence {
  uint64_t number = 0;  // in order of arrival
  SequenceRequest request;
  EventCallback callback;
  std::vector<int32_t> tokens;  // prompt and generated
  int32_t computed = 0;         // tokens whose cache entries are written and reachable through `kv`
  int32_t limit = 0;            // tokens at which it ends by length
  SequencePages kv;
  std::unordered_map<int32_t, int32_t> counts;  // generated tokens
  int32_t generated = 0;
  int32_t most_computed = 0;  // the highest that `computed` ever was: what preemption cannot count twice
  int32_t cached = 0;         // prompt tokens that others had computed
  bool apart = false;         // in a long step beside the others': not in theirs, and keeps its pages
  // `admitted`: when it came into the batch, of late; `started`: when the first step had tokens of it.
  absl::Time arrived, admitted, started = absl::InfiniteFuture(), first_token, last_token;

  int32_t remaining() const { return static_cast<int32_t>(tokens.size()) - computed; }
  bool decoding() const { return generated > 0 && remaining() == 1; }
};
using SequencePtr = std::unique_ptr<Sequence>;

SequenceStatistics StatisticsOf(const Sequence& s);

}  // namespace tandem::attention
