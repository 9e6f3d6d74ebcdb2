#include "services/attention_gpu/service/engine_metrics.h"

namespace tandem::attention {
namespace {

void Advance(telemetry::Counter& counter, uint64_t from, uint64_t to) {
  if (to > from) counter.Add(static_cast<double>(to - from));
}

double Ratio(int32_t part, int32_t whole) { return whole > 0 ? static_cast<double>(part) / whole : 0.0; }

}  // namespace

EngineMetrics::EngineMetrics(telemetry::Metrics& m)
    : running_(m.AddGauge("tandem_requests_running", "Sequences in the batch.")),
      waiting_(m.AddGauge("tandem_requests_waiting", "Sequences that wait for a place in the batch.")),
      kv_used_(
          m.AddGauge("tandem_kv_cache_used_ratio", "Share of the KV cache's pages in use by sequences.")),
      kv_cached_(m.AddGauge("tandem_kv_cache_cached_ratio",
                            "Share of the KV cache's pages kept for prompts to come, given up on demand.")),
      host_used_(m.AddGauge("tandem_kv_host_used_ratio", "Share of the host tier's pages in use.")),
      prompt_(m.AddCounter("tandem_prompt_tokens_total", "Prompt tokens computed.")),
      generated_(m.AddCounter("tandem_generated_tokens_total", "Tokens generated.")),
      query_(m.AddCounter("tandem_prefix_cache_query_tokens_total",
                          "Tokens of sequences that entered the batch, looked for in the prefix cache.")),
      hit_(m.AddCounter("tandem_prefix_cache_hit_tokens_total", "Of these, tokens that were not computed.")),
      evicted_(m.AddCounter("tandem_prefix_cache_evicted_pages_total",
                            "Pages that the prefix cache gave up for new ones.")),
      host_stored_(m.AddCounter("tandem_kv_host_stored_pages_total", "Pages moved to the host tier.")),
      host_returned_(m.AddCounter("tandem_kv_host_returned_pages_total", "Pages that came back from it.")),
      host_evicted_(m.AddCounter("tandem_kv_host_evicted_pages_total", "Pages dropped from it.")),
      preemptions_(
          m.AddCounter("tandem_preemptions_total", "Sequences whose pages were taken for earlier ones.")),
      reattach_(m.AddCounter("tandem_expert_reattach_total", "Times that lost experts were attached anew.")) {
}

void EngineMetrics::Update(const SchedulerSnapshot& now) {
  running_.Set(now.running);
  waiting_.Set(now.waiting);
  kv_used_.Set(Ratio(now.kv.used, now.kv.pages));
  kv_cached_.Set(Ratio(now.kv.cached, now.kv.pages));
  host_used_.Set(Ratio(now.kv.host_used, now.kv.host_pages));
  Advance(prompt_, last_.prompt_tokens, now.prompt_tokens);
  Advance(generated_, last_.generated_tokens, now.generated_tokens);
  Advance(query_, last_.query_tokens, now.query_tokens);
  Advance(hit_, last_.hit_tokens, now.hit_tokens);
  Advance(evicted_, last_.kv.evicted, now.kv.evicted);
  Advance(host_stored_, last_.kv.host_stored, now.kv.host_stored);
  Advance(host_returned_, last_.kv.host_returned, now.kv.host_returned);
  Advance(host_evicted_, last_.kv.host_evicted, now.kv.host_evicted);
  Advance(preemptions_, last_.preemptions, now.preemptions);
  Advance(reattach_, last_.expert_recoveries, now.expert_recoveries);
  last_ = now;
}

}  // namespace tandem::attention
