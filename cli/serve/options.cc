#include "cli/serve/options.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

// The checks below are the services' own (ParseStreamPrefill, ParseStreamShare), made before anything starts.
std::string CheckStreamPrefill(const std::string& text) {
  int64_t tokens = 0;
  if (text.empty() || text == "auto" || text == "off") return "";
  if (absl::SimpleAtoi(text, &tokens) && tokens >= 1) return "";
  return absl::StrCat(text, ": auto, off or a number of tokens is expected");
}

std::string CheckStreamShare(const std::string& text) {
  int percent = 0;
  if (text.empty() || text == "auto" || text == "off") return "";
  if (absl::SimpleAtoi(text, &percent) && percent >= 0 && percent <= 100) return "";
  return absl::StrCat(text, ": auto, off or a number from 0 to 100 is expected");
}

std::string CheckNuma(const std::string& text) {
  constexpr int kMostNodes = 64;  // of tandem-expert's --numa-nodes
  int nodes = 0;
  if (text == "auto" || (absl::SimpleAtoi(text, &nodes) && nodes >= 1 && nodes <= kMostNodes)) return "";
  return absl::StrCat(text, ": must be auto or a number from 1 to ", kMostNodes);
}

}  // namespace

// Ranges are no wider than those of the services, whose errors come late and between other processes' lines.
void AddServeFlags(Command& command, ServeOptions* o) {
  constexpr int64_t kMaxPort = 65535;
  command
      .Text("model", &o->model,
            "GGUF file, first file of a split one, or folder; none: the bundled demo model", {"gguf-path"})
      .Text("model-path", &o->model_path, "The same, taken where --model is not given")
      .Text("host", &o->host, "Address to listen at; 0.0.0.0 for the network (default 127.0.0.1)")
      .Integer("port", &o->port, 0, kMaxPort, "HTTP port, 0 for a free one (default 10002)")
      .Integer("grpc-port", &o->grpc_port, 0, kMaxPort, "gRPC port, 0 for a free one (default 10003)")
      .Integer("metrics-base-port", &o->metrics_base_port, 0, kMaxPort - 1000,
               "Metrics of attention at this port, of expert n at 10 + 2n above, at --host (an IPv6 one: at "
               "127.0.0.1, \"::\": at 0.0.0.0); 0 for free ones (default: HTTP port + 9)")
      .Integer("cpu-infer", &o->cpu_infer, 0, 4096,
               "Threads of all expert processes (default: one a physical core)")
      .Text("gpu", &o->gpu, "auto, none or a device number (default auto)")
      .Text("numa", &o->numa, "auto, or a number of NUMA nodes to make of this machine (default auto)")
      .Integer("expert-processes", &o->expert_processes, 0, 64, "Expert processes (default: one a NUMA node)",
               {"experts-processes"})
      .Integer("ctx", &o->context, 0, 1 << 24,
               "Longest sequence in tokens (default: what the model and memory allow)",
               {"cache-lens", "ctx-size"})
      .Integer("max-batch-size", &o->max_batch_size, 0, 4096, "Sequences decoded together")
      .Integer("chunk-size", &o->chunk_size, 0, 65536, "Prompt tokens taken in one step")
      .Integer("max-waiting", &o->max_waiting, 0, 1 << 20,
               "Sequences that may wait beyond those; more get 429 (0: the engine's default)")
      .Integer("kv-tokens", &o->kv_tokens, 0, int64_t{1} << 30,
               "Tokens of KV cache for all sequences together (default: by --ctx and memory)")
      .Choice("prefix-cache", &o->prefix_cache, {"on", "off"}, "Keep what prompts that begin alike share")
      .Number("kv-host-gb", &o->kv_host_gb, 0, 1e6,
              "10^9 bytes of host memory for pages that the prefix cache has to give up (default: a quarter "
              "of the memory that is left, at most 8)")
      .Number("max-decode-slowdown", &o->max_decode_slowdown, -1, 1e6,
              "How many times prompts may stretch the time between running streams' tokens (default 2)")
      .Number("vram-gb", &o->vram_gb, 0, 1e6,
              "10^9 bytes of GPU memory to use at most (default: what is free)", {"vram"})
      .Choice("kv-cache-type", &o->kv_cache_type, {"bf16", "int8"},
              "Values of a GPU's KV cache; int8 takes half the room")
      .Integer(
          "defer-experts", &o->defer_experts, 0, 1023,
          "So many of a generated token's experts, the least weighty ones, are added a layer later: faster "
          "with a GPU, other answers (default 0)")
      .Text("stream-prefill", &o->stream_prefill,
            "Prompts of so many tokens take the experts' weights to the GPU: auto, off or a number (default "
            "auto: where it is faster; needs weights in shared memory)")
      .Text("stream-share", &o->stream_share,
            "Of such prompts' experts, those that the CPU computes meanwhile: auto, off or a percentage "
            "(default auto: by what start-up measures)")
      .Integer(
          "stream-chunk-size", &o->stream_chunk_size, 0, 65536,
          "Prompt tokens of such a step; 0: a context's, at most 16384, where the GPU has room, else less, "
          "4096 at least (default 0)")
      .Choice("arena", &o->arena, {"auto", "hugetlb", "shared-huge", "shared", "private"},
              "Memory of the experts' weights (default auto: huge pages if there are any)")
      .Text("expert-groups", &o->expert_groups,
            "Group-limited routing: auto, off, or N/M for N groups of which M are kept (default auto)")
      .Choice("precision", &o->precision, {"fast", "reference"}, "Arithmetic of the CPU backend")
      .Text("model-name", &o->model_name, "Name of the model in the API (default: the file's)")
      .Text("api-key", &o->api_key, "Ask clients for this key (better given as TANDEM_API_KEY)")
      .Switch("memory-check", &o->memory_check, "Refuse a model that does not fit into memory (default true)")
      .Check("numa", CheckNuma)
      .Check("stream-prefill", CheckStreamPrefill)
      .Check("stream-share", CheckStreamShare);
  for (const char* foreign :
       {"optimize-config-path", "optimize-rule-path", "max-new-tokens", "force-think", "backend-type",
        "page-size", "architectures", "type", "concurrent-chat", "log-level", "web"}) {
    command.Ignored(foreign);
  }
}

}  // namespace tandem::cli
