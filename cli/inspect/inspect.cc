#include "cli/inspect/inspect.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/serve/memory_plan.h"
#include "cli/util/format.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "common/model/tensors.h"
#include "common/topology/gpu.h"
#include "common/topology/limits.h"
#include "common/topology/topology.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

struct TypeTotal {
  uint64_t tensors = 0;
  uint64_t values = 0;
  uint64_t bytes = 0;
};

// Everything that is shown, gathered before anything is printed.
struct Report {
  const gguf::File* file = nullptr;
  std::map<std::string, TypeTotal> types;
  absl::Status model_status;  // not OK: why this is no model that can be served
  model::ModelConfig config;
  MemoryPlan plan;
  uint64_t vram_bytes = 0;  // 0: no GPU known
  uint64_t usable_memory = 0;
};

uint64_t Values(const gguf::Tensor& tensor) {
  uint64_t values = 1;
  for (const int64_t n : tensor.ne) values *= static_cast<uint64_t>(n);
  return values;
}

absl::StatusOr<int> Processes(const std::string& numa) {
  if (numa == "auto") {
    TANDEM_ASSIGN_OR_RETURN(const topology::Topology topology, topology::Topology::Detect());
    return static_cast<int>(topology.nodes().size());
  }
  int n = 0;
  const char* end = numa.data() + numa.size();
  const auto [stop, error] = std::from_chars(numa.data(), end, n);
  if (error != std::errc() || stop != end || n < 1 || n > 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("--numa ", numa, ": must be auto or a number from 1 to 64"));
  }
  return n;
}

// Values of flags that do not suit a model that is fine.
absl::Status CheckFlags(const InspectOptions& options, int processes, const model::ModelConfig& config) {
  if (options.context > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--ctx ", options.context, ": the model's context is ",
                                                   config.max_position_embeddings, " tokens"));
  }
  if (options.numa != "auto" && config.n_routed_experts > 0 && processes > config.n_routed_experts) {
    return absl::InvalidArgumentError(
        absl::StrCat("--numa ", options.numa, ": the model has ", config.n_routed_experts, " experts"));
  }
  return absl::OkStatus();
}

// Why the file cannot be served; fills in config and plan where it can. `flags`: what CheckFlags says, and
// then there is no plan.
absl::Status Describe(const gguf::File& file, const InspectOptions& options, int processes, Report& report,
                      absl::Status& flags) {
  TANDEM_ASSIGN_OR_RETURN(report.config, model::ReadModelConfig(file));
  TANDEM_RETURN_IF_ERROR(model::BindTensors(file, report.config).status());
  for (int64_t layer = 0; layer < report.config.num_hidden_layers; ++layer) {
    if (report.config.n_routed_experts == 0 || !report.config.IsMoe(layer)) continue;
    TANDEM_RETURN_IF_ERROR(model::BindExperts(file, report.config, layer).status());
  }
  flags = CheckFlags(options, processes, report.config);
  if (!flags.ok()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(report.plan, PlanMemory(file, report.config, options.context, processes));
  return absl::OkStatus();
}

std::string ShardText(const ExpertShard& shard, size_t count) {
  if (shard.sliced) return absl::StrCat("slice ", shard.index, " of ", count, " of every expert");
  return absl::StrCat("experts ", shard.first_expert, " to ", shard.last_expert);
}

std::string TensorLine(const gguf::Tensor& t, size_t width) {
  return absl::StrFormat("  %-*s %-5s %-24s %10s\n", static_cast<int>(width), Printable(t.name),
                         std::string(gguf::TypeName(t.type)), t.ShapeString(), FormatBytes(t.nbytes));
}

void PrintModel(const Report& r, std::ostream& out) {
  const model::ModelConfig& c = r.config;
  const auto line = [&out](const char* what, const std::string& value) {
    out << absl::StrFormat("  %-12s %s\n", what, value);
  };
  out << "\nModel\n";
  line("layers", absl::StrCat(c.num_hidden_layers, ", of which ", c.first_k_dense_replace,
                              " dense; hidden size ", c.hidden_size));
  line("attention", absl::StrCat("MLA: ", c.num_attention_heads, " heads, q_lora_rank ", c.q_lora_rank,
                                 ", kv_lora_rank ", c.kv_lora_rank, ", rope ", c.qk_rope_head_dim, ", nope ",
                                 c.qk_nope_head_dim, ", values ", c.v_head_dim));
  if (c.n_routed_experts > 0) {
    line("experts", absl::StrCat(c.n_routed_experts, " of ", c.moe_intermediate_size, ", ",
                                 c.num_experts_per_tok, " a token, ", c.n_shared_experts, " shared"));
    line("routing",
         absl::StrCat(c.scoring_func == model::ScoringFunc::kSigmoid ? "sigmoid" : "softmax",
                      c.n_group > 1 ? absl::StrCat(", best ", c.topk_group, " of ", c.n_group, " groups")
                                    : ", no groups",
                      " (", c.expert_groups_source, ")"));
  }
  line("context", Grouped(static_cast<uint64_t>(c.max_position_embeddings)) + " tokens");
  line("vocabulary", Grouped(static_cast<uint64_t>(c.vocab_size)));
}

void PrintPlan(const Report& r, std::ostream& out) {
  const MemoryPlan& p = r.plan;
  const auto line = [&out](const std::string& what, uint64_t bytes, const std::string& note) {
    out << absl::StrFormat("  %-26s %10s%s%s\n", what, FormatBytes(bytes), note.empty() ? "" : "  ", note);
  };
  out << "\nMemory for " << Grouped(static_cast<uint64_t>(p.context)) << " tokens of context\n";
  line("GPU: dense weights", p.gpu_weight_bytes(), "attention, shared experts, dense layers, head");
  line("GPU: KV cache", p.kv_bytes, absl::StrCat(Grouped(p.kv_bytes_per_token), " bytes a token, bf16"));
  line("GPU: workspace", p.workspace_bytes, "estimate");
  std::string fits;
  if (r.vram_bytes > 0) {
    fits = absl::StrCat(p.gpu_bytes() <= r.vram_bytes ? "fits into " : "does NOT fit into ",
                        FormatBytes(r.vram_bytes));
  }
  line("GPU: together", p.gpu_bytes(), fits);
  const uint64_t fixed = p.gpu_weight_bytes() + p.workspace_bytes;
  if (r.vram_bytes > fixed && p.gpu_bytes() > r.vram_bytes && p.kv_bytes_per_token > 0) {
    out << "  (" << Grouped((r.vram_bytes - fixed) / p.kv_bytes_per_token) << " tokens of context would)\n";
  }
  if (p.embedding_bytes > 0) line("host: token embedding", p.embedding_bytes, "a row for a token");
  for (const ExpertShard& shard : p.shards) {
    line(absl::StrCat("socket ", shard.index, ": experts"), shard.bytes, ShardText(shard, p.shards.size()));
  }
  line("all of it", p.total_bytes(),
       r.usable_memory == 0
           ? ""
           : absl::StrCat(
                 p.total_bytes() <= r.usable_memory ? "on the CPU alone it fits into the " : "more than the ",
                 FormatBytes(r.usable_memory), " of memory available here"));
}

void PrintText(const Report& r, const InspectOptions& options, std::ostream& out) {
  const gguf::File& file = *r.file;
  const auto name = file.GetString("general.name");
  const auto architecture = file.GetString("general.architecture");
  out << Printable(file.path()) << "\n";
  out << absl::StrFormat("  %-12s GGUF v%d, %s in %d file%s, %d keys, %d tensors\n", "file", file.version(),
                         FormatBytes(file.file_bytes()), file.paths().size(),
                         file.paths().size() == 1 ? "" : "s", file.metadata().size(), file.tensors().size());
  out << absl::StrFormat("  %-12s %s\n", "name", name.ok() ? Printable(*name) : "(none)");
  out << absl::StrFormat("  %-12s %s\n", "architecture",
                         architecture.ok() ? Printable(*architecture) : "(none)");
  uint64_t values = 0;
  for (const auto& [type, total] : r.types) values += total.values;
  out << absl::StrFormat("  %-12s %s (%s)\n", "parameters", Grouped(values), FormatCount(values));
  if (r.config.num_hidden_layers > 0) PrintModel(r, out);
  out << "\nTensors by type\n";
  for (const auto& [type, total] : r.types) {
    out << absl::StrFormat(
        "  %-8s %5d tensors %18s values %10s  %5.2f bits a value\n", type, total.tensors,
        Grouped(total.values), FormatBytes(total.bytes),
        total.values == 0 ? 0.0 : 8.0 * static_cast<double>(total.bytes) / static_cast<double>(total.values));
  }
  if (r.model_status.ok()) PrintPlan(r, out);
  if (options.metadata) {
    out << "\nMetadata\n";
    for (const auto& [key, value] : file.metadata()) {
      out << "  " << Printable(key) << " = " << Printable(value.DebugString()) << "\n";
    }
  }
  if (options.tensors) {
    size_t width = 20;
    for (const gguf::Tensor& tensor : file.tensors()) width = std::max(width, tensor.name.size());
    out << "\nTensors\n";
    for (const gguf::Tensor& tensor : file.tensors()) out << TensorLine(tensor, width);
  }
}

void PrintJson(const Report& r, const InspectOptions& options, std::ostream& out) {
  const gguf::File& file = *r.file;
  json types = json::object();
  uint64_t values = 0;
  for (const auto& [type, total] : r.types) {
    types[type] = {{"tensors", total.tensors}, {"values", total.values}, {"bytes", total.bytes}};
    values += total.values;
  }
  json report = {{"path", file.path()},
                 {"version", file.version()},
                 {"file_bytes", file.file_bytes()},
                 {"files", file.paths().size()},
                 {"tensor_count", file.tensors().size()},
                 {"parameters", values},
                 {"types", types},
                 {"fingerprint", file.Fingerprint()}};
  for (const char* key : {"general.name", "general.architecture"}) {
    if (const auto text = file.GetString(key); text.ok()) report[std::string(key).substr(8)] = *text;
  }
  if (r.model_status.ok()) {
    json shards = json::array();
    for (const ExpertShard& shard : r.plan.shards) {
      json item = {{"index", shard.index}, {"bytes", shard.bytes}};
      if (shard.sliced) {
        item["slice"] = absl::StrCat(shard.index, "/", r.plan.shards.size());
      } else {
        item["experts"] = {shard.first_expert, shard.last_expert};
      }
      shards.push_back(item);
    }
    report["memory"] = {{"context", r.plan.context},
                        {"dense_bytes", r.plan.dense_bytes},
                        {"embedding_bytes", r.plan.embedding_bytes},
                        {"kv_bytes_per_token", r.plan.kv_bytes_per_token},
                        {"kv_bytes", r.plan.kv_bytes},
                        {"workspace_bytes", r.plan.workspace_bytes},
                        {"gpu_bytes", r.plan.gpu_bytes()},
                        {"expert_bytes", r.plan.expert_bytes},
                        {"experts", shards},
                        {"total_bytes", r.plan.total_bytes()}};
    if (r.vram_bytes > 0) report["memory"]["vram_bytes"] = r.vram_bytes;
  } else {
    report["error"] = std::string(r.model_status.message());
  }
  if (options.metadata) {
    json metadata = json::object();
    for (const auto& [key, value] : file.metadata()) metadata[key] = value.DebugString(1 << 20);
    report["metadata"] = metadata;
  }
  if (options.tensors) {
    json tensors = json::array();
    for (const gguf::Tensor& t : file.tensors()) {
      tensors.push_back({{"name", t.name},
                         {"type", std::string(gguf::TypeName(t.type))},
                         {"shape", std::vector<int64_t>(t.ne, t.ne + t.n_dims)},
                         {"bytes", t.nbytes}});
    }
    report["tensors"] = tensors;
  }
  out << report.dump(2, ' ', false, json::error_handler_t::replace) << "\n";
}

}  // namespace

void AddInspectFlags(Command& command, InspectOptions* o) {
  command.Positional("FILE", &o->file, "GGUF file, first file of a split one, or folder")
      .Text("numa", &o->numa, "Expert processes to plan for: auto (one a NUMA node here) or a number")
      .Number("vram", &o->vram_gb, 0, 1e6, "GPU memory in GB to plan for (default: that of the GPU here)")
      .Integer("ctx", &o->context, 0, 1 << 24, "Tokens of context to plan for (default: the model's)")
      .Switch("tensors", &o->tensors, "List every tensor")
      .Switch("metadata", &o->metadata, "List every key")
      .Switch("json", &o->json, "Print JSON");
}

int RunInspect(const InspectOptions& options, std::ostream& out, std::ostream& err) {
  const absl::StatusOr<int> processes = Processes(options.numa);
  if (!processes.ok()) {
    err << "tandem inspect: " << std::string(processes.status().message()) << "\n";
    return absl::IsInvalidArgument(processes.status()) ? 2 : 1;
  }
  const auto file = gguf::File::Open(options.file, {.map_data = false});
  if (!file.ok()) {
    err << "tandem inspect: " << Printable(std::string(file.status().message())) << "\n";
    return 1;
  }
  Report report;
  report.file = file->get();
  for (const gguf::Tensor& tensor : (*file)->tensors()) {
    TypeTotal& total = report.types[std::string(gguf::TypeName(tensor.type))];
    ++total.tensors;
    total.values += Values(tensor);
    total.bytes += tensor.nbytes;
  }
  absl::Status flags;
  report.model_status = Describe(**file, options, *processes, report, flags);
  if (!flags.ok()) {
    err << "tandem inspect: " << std::string(flags.message()) << "\n";
    return 2;
  }
  report.usable_memory = topology::ReadMemoryInfo().UsableBytes();
  report.vram_bytes = static_cast<uint64_t>(options.vram_gb * 1e9);
  if (options.vram_gb == 0) {
    const topology::GpuReport gpus = topology::DetectGpus();
    if (!gpus.gpus.empty()) report.vram_bytes = gpus.gpus.front().memory_bytes;
  }
  options.json ? PrintJson(report, options, out) : PrintText(report, options, out);
  if (report.model_status.ok()) return 0;
  err << "tandem inspect: this file cannot be served: "
      << Printable(std::string(report.model_status.message())) << "\n";
  return 1;
}

}  // namespace tandem::cli
