// What `tandem serve` was asked for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/flags/command_line.h"

namespace tandem::cli {

struct ServeOptions {
  std::string model;       // empty: the demo model
  std::string model_path;  // KTransformers' --model_path: used where there is no --model
  std::string host = "127.0.0.1";
  int64_t port = 10002;            // 0: a free one
  int64_t grpc_port = 10003;       // 0: a free one
  int64_t metrics_base_port = -1;  // -1: port + 9; 0: free ones
  int64_t cpu_infer = 0;           // threads of all expert processes; 0: one a physical core
  std::string gpu = "auto";        // auto, none or a device number
  std::string numa = "auto";       // auto or a number of nodes
  int64_t expert_processes = 0;    // 0: one a NUMA node
  int64_t context = 0;             // tokens; 0: the engine's default
  int64_t max_batch_size = 0;      // sequences decoded together; 0: the engine's default
  int64_t chunk_size = 0;          // prompt tokens of a step; 0: the engine's default
  int64_t max_waiting = 0;         // sequences that may wait; 0: the engine's default
  int64_t kv_tokens = 0;           // of KV cache for all sequences together; 0: the engine's default
  double kv_host_gb = -1;          // 10^9 bytes for pages that the prefix cache gives up; below 0: by memory
  std::string prefix_cache = "on";
  double max_decode_slowdown = -1;  // below 0: the engine's default
  double vram_gb = 0;               // 0: what is free
  std::string kv_cache_type = "bf16";
  int64_t defer_experts = 0;       // of a token's, added a layer later
  std::string stream_prefill;      // empty: the engine's default
  std::string stream_share;        // empty: the engine's default
  int64_t stream_chunk_size = -1;  // -1: the engine's default
  std::string arena;               // of the expert processes; empty: their default
  std::string expert_groups = "auto";
  std::string precision = "fast";
  std::string model_name;  // by which clients know it; empty: the file's
  std::string api_key;     // that clients must give; empty: none
  bool memory_check = true;
};

void AddServeFlags(Command& command, ServeOptions* options);

}  // namespace tandem::cli
