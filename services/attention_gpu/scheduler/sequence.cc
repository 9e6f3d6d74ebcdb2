#include "services/attention_gpu/scheduler/sequence.h"

namespace tandem::attention {

SequenceStatistics StatisticsOf(const Sequence& s) {
  SequenceStatistics out;
  out.prompt_tokens = static_cast<int32_t>(s.request.prompt.size());
  out.cached_prompt_tokens = s.cached;
  out.generated_tokens = s.generated;
  if (s.started != absl::InfiniteFuture()) out.queued = s.started - s.arrived;
  if (s.generated > 0) {
    out.prefill = s.first_token - s.started;
    out.decode = s.last_token - s.first_token;
  }
  return out;
}

}  // namespace tandem::attention
