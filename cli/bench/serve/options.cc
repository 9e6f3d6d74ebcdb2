#include "cli/bench/serve/options.h"

namespace tandem::cli {

void AddServeLoadFlags(Command& command, ServeLoadOptions* o) {
  constexpr int64_t kMany = 1'000'000'000;
  command.Text("url", &o->url, "serve: the server (default http://127.0.0.1:10002)")
      .Choice("api", &o->api, {"completions", "chat"}, "serve: the endpoint")
      .Text("api-key", &o->api_key, "serve: sent as a bearer token")
      .Text("served-model", &o->served_model, "serve: the model's name (default: the first of /v1/models)")
      .Choice("prompts", &o->prompts, {"auto", "tokens", "text"},
              "serve: prompts as token ids (completions, needs /tokenize) or as words")
      .Integer("concurrency", &o->concurrency, 0, 1'000'000, "serve: closed loop: requests under way")
      .Number("rate", &o->rate, 0, 1e6, "serve: open loop: arrivals a second (Poisson)")
      .Integer("requests", &o->requests, 0, kMany, "serve: end after so many")
      .Number("duration", &o->duration, 0, 1e7, "serve: begin no more after so many seconds")
      .Integer("seed", &o->seed, 0, kMany, "serve: of arrivals and contents (default 1)")
      .Text("trace", &o->trace, "serve: requests of this file; open loop unless --concurrency is given")
      .Choice("trace-format", &o->trace_format, {"auto", "mooncake", "azure"}, "serve: of --trace")
      .Number("trace-speed", &o->trace_speed, 1e-6, 1e6, "serve: 2: twice as fast as it was (default 1)")
      .Number("length-scale", &o->length_scale, 1e-6, 1e3, "serve: factor for the trace's lengths")
      .Integer("max-context", &o->max_context, 0, kMany,
               "serve: tokens a prompt and its answer may have (default: what the server says)")
      .Integer("prompt-tokens", &o->prompt_tokens, 1, kMany, "serve: without a trace (default 128)")
      .Integer("output-tokens", &o->output_tokens, 1, kMany, "serve: without a trace (default 64)")
      .Integer("shared-prefix", &o->shared_prefix, 0, kMany,
               "serve: without a trace: so many of the prompt's tokens are the same in all")
      .Integer("distinct-prompts", &o->distinct_prompts, 0, kMany,
               "serve: without a trace: so many prompts, in turn (default: all differ)")
      .Integer("page-tokens", &o->page_tokens, 1, 65536, "serve: page of the ideal prefix cache (default 32)")
      .Number("temperature", &o->temperature, 0, 2, "serve: above 0 each request has its seed (default 0)")
      .Switch("ignore-eos", &o->ignore_eos, "serve: answers have the full length (default; --no-ignore-eos)")
      .Integer("verify", &o->verify, 0, 100000,
               "serve: ask so many again, alone, and compare; equal greedy prompts are compared, too")
      .Number("slo-ttft-ms", &o->slo_ttft_ms, 0, 1e7, "serve: goodput: time to the first token")
      .Number("slo-itl-ms", &o->slo_itl_ms, 0, 1e7, "serve: goodput: mean time between a request's tokens")
      .Integer("idle-connections", &o->idle_connections, 0, 1'000'000,
               "serve: open so many more and leave them alone")
      .Number("idle-every", &o->idle_every, 0, 1e6,
              "serve: seconds after which each of them asks /health again (default 60; 0: never)")
      .Number("patience", &o->patience, 0.001, 1e6, "serve: seconds without a byte (default 600)")
      .Text("log", &o->log, "serve: write one JSON line a request to this file");
  // What of these stands in the environment is meant for the server.
  for (const char* name : {"url", "api", "prompts", "rate", "requests", "duration", "seed", "trace",
                           "temperature", "patience", "log"}) {
    command.NotFromEnvironment(name);
  }
}

}  // namespace tandem::cli
