#include "services/gateway/session/gateway_metrics.h"

namespace tandem::gateway {
namespace {

const std::vector<double> kRates = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000};

}  // namespace

GatewayMetrics::GatewayMetrics(telemetry::Metrics& m)
    : prompt_tokens(
          m.AddCounter("tandem_prompt_tokens_total", "Prompt tokens of requests that were started.")),
      cached_prompt_tokens(m.AddCounter("tandem_prompt_tokens_cached_total",
                                        "Prompt tokens that the engine did not need to compute.")),
      generated_tokens(m.AddCounter("tandem_generated_tokens_total", "Tokens generated.")),
      resumes(
          m.AddCounter("tandem_stream_resumes_total", "Sequences that went on after their engine was lost.")),
      prefill_rate(m.AddHistogram("tandem_prefill_tokens_per_second",
                                  "Computed prompt tokens per second of a request's prefill.", kRates)),
      decode_rate(m.AddHistogram("tandem_decode_tokens_per_second",
                                 "Tokens per second of a request after its first token.", kRates)),
      time_to_first_token(m.AddHistogram("tandem_time_to_first_token_seconds",
                                         "From a request's arrival to its first token.",
                                         telemetry::RequestBuckets())),
      inter_token(m.AddHistogram("tandem_inter_token_seconds", "Time between two tokens of a sequence.",
                                 telemetry::RequestBuckets())),
      request_seconds(m.AddHistogram("tandem_request_seconds", "From a request's arrival to its end.",
                                     telemetry::RequestBuckets())),
      queue_seconds(m.AddHistogram("tandem_queue_seconds", "Time a sequence waited in the engine's queue.",
                                   telemetry::RequestBuckets())),
      tokenize_seconds(m.AddHistogram("tandem_tokenize_seconds", "Time to render and tokenize a prompt.",
                                      telemetry::RequestBuckets())),
      running(m.AddGauge("tandem_requests_running", "Sequences that are being decoded.")),
      waiting(m.AddGauge("tandem_requests_waiting", "Sequences that wait for their first token.")),
      ready(m.AddGauge("tandem_ready",
                       "1 if requests are accepted, 0 while starting, draining or without engine.")) {
  static constexpr const char* kNames[] = {"ok", "invalid", "refused", "cancelled", "timeout", "error"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    outcomes_[i] = &m.AddCounter("tandem_requests_total", "Generation requests by their outcome.",
                                 {{"outcome", kNames[i]}});
  }
}

}  // namespace tandem::gateway
