#include "services/attention_gpu/service/options.h"

#include <map>
#include <string>

#include <CLI/CLI.hpp>

#include "common/flags/sources.h"
#include "services/attention_gpu/experts/stream_break_even.h"
#include "services/attention_gpu/experts/stream_share.h"

namespace tandem::attention {

ParsedOptions ParseOptions(int argc, char** argv) {
  ParsedOptions out;
  Options& o = out.options;
  CLI::App app("tandem-attention: attention, dense layers, KV cache and sampling of a DeepSeek model");
  app.set_version_flag("--version", TANDEM_VERSION);
  app.add_option("--model", o.model, "GGUF file, first file of a split model, or folder")->required();
  app.add_option("--listen", o.listen, "gRPC address, host:port or unix:PATH; repeatable")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--metrics-listen", o.metrics_listen, "host:port of /metrics; empty: none")
      ->capture_default_str();
  app.add_option("--expert", o.experts, "address of an expert process; repeatable")->delimiter(',');
  app.add_option("--expert-transport", o.expert_transport,
                 "calls through shared memory (ring), over gRPC, or auto: ring where it is on this host")
      ->check(CLI::IsMember({"auto", "ring", "grpc"}))
      ->capture_default_str();
  app.add_option(
         "--expert-spin-us", o.expert_spin_us,
         "microseconds to look for an answer in shared memory before sleeping; -1: by the CPUs to spare")
      ->check(CLI::Range(int64_t{-1}, int64_t{60'000'000}));
  app.add_option("--expert-groups", o.expert_groups, "group-limited routing: auto, off or N/M")
      ->capture_default_str();
  app.add_option("--precision", o.precision, "fast or reference")
      ->check(CLI::IsMember({"fast", "reference"}))
      ->capture_default_str();
  app.add_option("--gpu", o.gpu,
                 "auto (the first GPU, or the CPU where none can be used), none, or a device number")
      ->capture_default_str();
  app.add_option("--vram-gb,--vram", o.vram_gb,
                 "10^9 bytes that may be taken of the GPU's memory; 0: what is free")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--gpu-bell", o.gpu_bell,
                 "how the GPU calls experts on this host: by stream memory operations, kernels or host "
                 "functions (stream, kernel, host), auto: the fastest that works; off: the host calls")
      ->check(CLI::IsMember({"auto", "stream", "kernel", "host", "off"}))
      ->capture_default_str();
  app.add_option("--kv-cache-type", o.kv_cache_type,
                 "values of the GPU's KV cache: bf16, or int8 in half the room")
      ->check(CLI::IsMember({"bf16", "int8"}))
      ->capture_default_str();
  app.add_option("--defer-experts", o.defer_experts,
                 "so many of a generated token's experts, those of the smallest weights, are added a layer "
                 "later, while the next one's attention runs; changes answers; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option(
         "--stream-prefill", o.stream_prefill,
         "with a GPU: prompts of so many tokens take the experts' weights to it over PCIe; auto: where "
         "that is faster, by what start-up measures; off: never")
      ->check([](const std::string& text) {
        const auto parsed = ParseStreamPrefill(text);
        return parsed.ok() ? std::string() : std::string(parsed.status().message());
      })
      ->capture_default_str();
  app.add_option("--stream-share", o.stream_share,
                 "of such prompts' experts, those that the processes compute while the others' weights come: "
                 "auto: by what start-up measures, none while others decode; a percentage, always; off: none")
      ->check([](const std::string& text) {
        const auto parsed = ParseStreamShare(text);
        return parsed.ok() ? std::string() : std::string(parsed.status().message());
      })
      ->capture_default_str();
  app.add_option(
         "--stream-chunk-size", o.stream_chunk_size,
         "prompt tokens of a step that streams; 0: a context's, at most 16384, where the GPU has room, else "
         "less, 4096 at least")
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  app.add_option(
         "--stream-buffer-mb", o.stream_buffer_mb,
         "10^6 bytes of GPU memory for the experts' weights on their way; 0: 384 to 6144, by the step, the "
         "context and what room there is")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  app.add_option("--cpus", o.cpus, "pin the threads to these CPUs, such as 0-7,16");
  app.add_option("--threads", o.threads, "compute threads; 0: one per allowed CPU")
      ->check(CLI::Range(0, 4096));
  app.add_option("--ctx", o.ctx, "tokens a sequence may have; 0: the model's, at most 8192")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24));
  app.add_option("--kv-tokens", o.kv_tokens,
                 "tokens of KV cache for all sequences together; 0: by --ctx, --max-batch-size and memory")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
  app.add_option("--memory-check", o.memory_check,
                 "refuse weights and a KV cache that do not fit into the memory that is available")
      ->capture_default_str();
  app.add_option("--max-batch-size", o.max_batch_size, "sequences that run together")
      ->check(CLI::Range(1, 4096));
  app.add_option("--max-waiting", o.max_waiting, "sequences that may wait beyond those")
      ->check(CLI::Range(0, 1 << 20));
  app.add_option("--max-unread-tokens", o.max_unread_tokens,
                 "tokens (with their alternatives) of a stream that may wait for its reader; past that it is "
                 "cancelled")
      ->check(CLI::Range(1, 1 << 30));
  app.add_option(
         "--chunk-size", o.chunk_size,
         "prompt tokens of a step; 0: 512 on the CPU; on a GPU 256 beside streamed prompts, else 1024")
      ->check(CLI::Range(0, 65536));
  app.add_option("--mixed-chunk-size", o.mixed_chunk_size,
                 "prompt tokens of a step beside running sequences, at most")
      ->check(CLI::Range(1, 65536));
  app.add_option(
         "--max-decode-slowdown", o.max_decode_slowdown,
         "prompts may stretch the time between tokens of running sequences this many times, by measured "
         "step times; 0: only --mixed-chunk-size limits them")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--prefix-cache", o.prefix_cache,
                 "keep computed pages for prompts that begin alike: on or off")
      ->transform(CLI::CheckedTransformer(std::map<std::string, bool>{{"on", true}, {"off", false}}))
      ->default_str("on");
  app.add_option(
         "--kv-host-gb", o.kv_host_gb,
         "10^9 bytes of host memory for pages that the prefix cache has to give up; default: a quarter "
         "of what is left, at most 8")
      ->check(CLI::Range(0.0, 1e6));
  app.add_option("--expert-patience", o.expert_patience, "seconds to wait for lost experts")
      ->check(CLI::Range(0.0, 86400.0));
  app.add_option("--expert-timeout", o.expert_timeout, "seconds one expert call may take")
      ->check(CLI::Range(0.001, 86400.0));
  app.add_option("--attach-patience", o.attach_patience, "seconds to wait for experts at start-up")
      ->check(CLI::Range(0.0, 86400.0));
  app.add_option("--drain-timeout", o.drain_timeout, "seconds that running sequences get at a stop")
      ->check(CLI::Range(0.0, 86400.0));
  app.add_option("--tls-cert", o.tls.certificate_file, "PEM certificate for TCP listeners");
  app.add_option("--tls-key", o.tls.key_file, "PEM key");
  app.add_option("--tls-ca", o.tls.ca_file, "PEM CA that peers' certificates must come from");
  flags::AddEnvironmentAndFile(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e);
    out.exit_code = code == 0 ? 0 : 2;
    return out;
  }
  out.run = true;
  return out;
}

}  // namespace tandem::attention
