// What `tandem bench serve` was asked for.
#pragma once

#include <cstdint>
#include <string>

#include "cli/flags/command_line.h"

namespace tandem::cli {

struct ServeLoadOptions {
  std::string url = "http://127.0.0.1:10002";
  std::string api = "completions";  // or chat
  std::string api_key;
  std::string served_model;      // empty: the first of /v1/models
  std::string prompts = "auto";  // tokens, text
  int64_t concurrency = 0;       // > 0: closed loop
  double rate = 0;               // requests a second, > 0: open loop
  int64_t requests = 0;          // 0: no bound
  double duration = 0;           // seconds in which requests are begun; 0: no bound
  int64_t seed = 1;
  std::string trace;  // file
  std::string trace_format = "auto";
  double trace_speed = 1;
  double length_scale = 1;
  int64_t max_context = 0;  // 0: what the server says
  int64_t prompt_tokens = 128;
  int64_t output_tokens = 64;
  int64_t shared_prefix = 0;
  int64_t distinct_prompts = 0;
  int64_t page_tokens = 32;  // of the ideal prefix cache
  double temperature = 0;
  bool ignore_eos = true;
  int64_t verify = 0;
  double slo_ttft_ms = 0;  // 0: no limit
  double slo_itl_ms = 0;
  int64_t idle_connections = 0;
  double idle_every = 60;  // seconds
  double patience = 600;   // seconds without a byte
  std::string log;         // file for one JSON line a request
};

void AddServeLoadFlags(Command& command, ServeLoadOptions* options);

}  // namespace tandem::cli
