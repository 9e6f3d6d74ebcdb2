// The flags of tandem-attention, which may also come from the environment and a file: common/flags/sources.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/rpc/server.h"

namespace tandem::attention {

struct Options {
  std::string model;
  std::vector<std::string> listen = {"127.0.0.1:10010"};
  std::string metrics_listen = "127.0.0.1:10011";  // empty: none
  std::vector<std::string> experts;
  std::string expert_transport = "auto";  // or ring, grpc
  int64_t expert_spin_us = -1;            // -1: by the CPUs to spare
  std::string expert_groups = "auto";
  std::string precision = "fast";
  std::string gpu = "auto";  // or none, or a device number
  std::string gpu_bell = "auto";
  std::string kv_cache_type = "bf16";   // of the GPU's KV cache
  int32_t defer_experts = 0;            // of a token's experts, those added a layer later
  double vram_gb = 0;                   // 10^9 bytes that may be taken of the GPU's memory; 0: what is free
  std::string stream_prefill = "auto";  // or off, or the least tokens of a prompt
  std::string stream_share = "auto";    // or off, or a percentage
  int32_t stream_chunk_size = 0;        // prompt tokens of a step that streams; 0: by context and memory
  int64_t stream_buffer_mb = 0;         // 10^6 bytes of GPU memory for weights on their way; 0: by the step
  std::string cpus;                     // list such as 0-7,16; empty: not pinned
  int threads = 0;                      // 0: one per allowed CPU
  int64_t ctx = 0;                      // 0: the model's context, at most 8192
  int64_t kv_tokens = 0;                // 0: chosen from ctx, max_batch_size and memory
  int32_t max_batch_size = 16;
  int32_t max_waiting = 256;
  int64_t max_unread_tokens = 4096;
  int32_t chunk_size = 0;  // 0: 512 on the CPU; on a GPU 256 beside streamed prompts, else 1024
  int32_t mixed_chunk_size = 64;
  bool memory_check = true;  // refuse what does not fit into the memory that is available
  double max_decode_slowdown = 2;
  bool prefix_cache = true;
  double kv_host_gb = -1;         // below 0: by the memory that is left
  double expert_patience = 60;    // seconds
  double expert_timeout = 60;     // seconds
  double attach_patience = 3600;  // seconds
  double drain_timeout = 30;      // seconds
  rpc::TlsOptions tls;
};

// What to do after parsing: run, or leave with this exit code (help, version, bad flag; the text is printed).
struct ParsedOptions {
  bool run = false;
  int exit_code = 0;
  Options options;
};
ParsedOptions ParseOptions(int argc, char** argv);

}  // namespace tandem::attention
