#include "cli/plan/plan.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <ostream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/util.h"
#include "cli/serve/memory_plan.h"
#include "cli/util/format.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/model/cache_sizes.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

// A figure of the machine and where it is from.
struct Figure {
  const char* name;  // of the flag
  double value;
  const char* unit;
  const char* what;
  std::string source;  // "given", "measured", "reference box"
};

// All that is printed.
struct Prediction {
  std::string model;
  ModelBytes bytes;
  MachineFigures machine;
  std::vector<Figure> figures;
  KvType kv = KvType::kBf16;
  int64_t context = 0;
  uint64_t kv_bytes = 0, workspace = 0;
  std::vector<DecodePoint> decode;  // by requests, then by context
  std::vector<PrefillPoint> prefill;
  int64_t break_even = 0;

  // Of the dense weights, those beside the KV cache: a GPU leaves the embedding in the host's memory.
  uint64_t weight_bytes() const { return bytes.dense_bytes() - (machine.gpu ? bytes.embedding : 0); }
  uint64_t device_bytes() const { return weight_bytes() + kv_bytes + workspace; }
  // Bytes of KV cache for which the card has room beside the rest; 0: none.
  double kv_room() const {
    const double room = machine.vram_gb * 1e9 - static_cast<double>(weight_bytes() + workspace);
    return std::max(0.0, room);
  }
  bool Fits(const DecodePoint& p) const { return !machine.gpu || p.kv_bytes <= kv_room(); }
};

absl::Status Figures(const PlanOptions& o, Prediction* p) {
  MachineFigures& m = p->machine;
  m.gpu = o.gpu;
  std::string dram_source = "reference box", sockets_source = dram_source;
  if (o.measure) {
    TANDEM_ASSIGN_OR_RETURN(const MeasuredReads reads, MeasureReads());
    m.dram_gbps = reads.dram_gbps;
    m.sockets = reads.sockets;
    dram_source = sockets_source = "measured";
  }
  if (o.sockets > 0) {
    m.sockets = static_cast<int>(o.sockets);
    sockets_source = "given";
  }
  auto add = [&](const char* name, double given, double* value, const char* unit, const char* what,
                 const std::string& source = "reference box") {
    if (given >= 0) *value = given;
    p->figures.push_back({name, *value, unit, what, given >= 0 ? "given" : source});
  };
  p->figures.push_back({"sockets", static_cast<double>(m.sockets), "",
                        "CPU sockets, each with its own memory", sockets_source});
  add("dram-gbps", o.dram_gbps, &m.dram_gbps, "GB/s", "plain reads, a socket", dram_source);
  add("cpu-efficiency", o.cpu_efficiency, &m.cpu_efficiency, "", "share of that for expert weights");
  add("cpu-tmacs", o.cpu_tmacs, &m.cpu_tmacs, "T/s", "multiply-adds on the CPU, all sockets");
  if (o.cpu_prefill > 0) {
    add("cpu-prefill", o.cpu_prefill, &m.cpu_prefill, "tokens/s", "experts on the CPU, long prompts");
  }
  if (!m.gpu) return absl::OkStatus();
  add("vram-gb", o.vram_gb, &m.vram_gb, "GB", "GPU memory");
  add("vram-gbps", o.vram_gbps, &m.vram_gbps, "GB/s", "its bandwidth");
  add("gpu-efficiency", o.gpu_efficiency, &m.gpu_efficiency, "", "share of that for weights and KV cache");
  add("gpu-tflops", o.gpu_tflops, &m.gpu_tflops, "TFLOP/s", "float16 products");
  add("gpu-compute-efficiency", o.gpu_compute_efficiency, &m.gpu_compute_efficiency, "",
      "share of that for prompts and attention");
  add("pcie-gbps", o.pcie_gbps, &m.pcie_gbps, "GB/s", "host to GPU");
  add("round-trip-us", o.round_trip_us, &m.round_trip_us, "us", "GPU to CPU and back, a layer");
  return absl::OkStatus();
}

absl::Status Model(const PlanOptions& o, Prediction* p) {
  if (!o.model.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const auto file, gguf::File::Open(o.model, {.map_data = false}));
    TANDEM_ASSIGN_OR_RETURN(p->bytes, BytesOfFile(*file));
    p->model = Printable(p->bytes.config.name.empty() ? o.model : p->bytes.config.name);
  } else {
    TANDEM_ASSIGN_OR_RETURN(const SynthPlan plan, PlanSynth(o.synth));
    p->bytes = BytesOfPlan(plan);
    p->model = absl::StrCat("shape ", o.synth.shape, ", ", o.synth.type);
  }
  return absl::OkStatus();
}

// What is asked for, one number each.
struct Questions {
  std::vector<int64_t> requests, contexts, prompts;
};

absl::StatusOr<Questions> Ask(const PlanOptions& o) {
  Questions q;
  TANDEM_ASSIGN_OR_RETURN(q.requests, ParseNumbers("requests", o.requests, 1 << 20));
  TANDEM_ASSIGN_OR_RETURN(q.contexts, ParseNumbers("contexts", o.contexts, 1 << 24));
  TANDEM_ASSIGN_OR_RETURN(q.prompts, ParseNumbers("prompts", o.prompts, 1 << 24));
  for (const double above_0 : {o.dram_gbps, o.cpu_efficiency, o.cpu_tmacs, o.vram_gbps, o.gpu_efficiency,
                               o.gpu_tflops, o.gpu_compute_efficiency, o.pcie_gbps}) {
    if (above_0 == 0) {
      return absl::InvalidArgumentError("bandwidths, rates and efficiencies must be above 0");
    }
  }
  return q;
}

absl::StatusOr<Prediction> Predict(const PlanOptions& o, const Questions& q) {
  Prediction p;
  TANDEM_RETURN_IF_ERROR(Model(o, &p));
  TANDEM_RETURN_IF_ERROR(Figures(o, &p));
  const MachineFigures& m = p.machine;
  p.kv = o.kv_type == "int8" ? KvType::kInt8 : KvType::kBf16;
  p.context = o.context > 0 ? o.context : model::DefaultContext(p.bytes.config);
  p.kv_bytes = static_cast<uint64_t>(p.context) * KvBytesPerToken(p.bytes.config, p.kv);
  p.workspace = WorkspaceBytes(p.bytes.config);
  const int64_t most = p.bytes.config.max_position_embeddings;
  for (const int64_t n : q.requests) {
    for (const int64_t context : q.contexts) {
      if (most > 0 && context > most) continue;
      p.decode.push_back(PredictDecode(p.bytes, m, p.kv, n, context));
    }
  }
  for (const int64_t n : q.prompts) {
    if (most > 0 && n > most) continue;
    p.prefill.push_back(PredictPrefill(p.bytes, m, o.prefill, n));
  }
  p.break_even = StreamBreakEven(p.bytes, m, o.prefill);
  return p;
}

std::string Milliseconds(double seconds) {
  return seconds < 0.01 ? absl::StrFormat("%.2f", 1e3 * seconds) : absl::StrFormat("%.1f", 1e3 * seconds);
}

std::string Number(double value) {
  return value >= 100 ? absl::StrFormat("%.0f", value) : absl::StrFormat("%.3g", value);
}

void PrintDecode(const Prediction& p, std::ostream& out) {
  const bool moe = p.bytes.routed > 0;
  out << "\nDecode: milliseconds of a step, tokens/s of all requests together\n";
  out << absl::StrFormat("  %8s %9s %8s %8s %8s %8s %9s %9s  %s\n", "requests", "context", "experts",
                         p.machine.gpu ? "GPU ms" : "dense ms", "CPU ms", "step ms", "tokens/s", "each",
                         "bound by");
  for (size_t i = 0; i < p.decode.size(); ++i) {
    const DecodePoint& d = p.decode[i];
    const bool several = i + 1 < p.decode.size() && p.decode[i + 1].requests == d.requests;
    if (several && i > 0 && p.decode[i - 1].requests != d.requests) out << "\n";
    out << absl::StrFormat("  %8d %9s ", d.requests, Grouped(static_cast<uint64_t>(d.context)));
    if (!p.Fits(d)) {
      out << absl::StrFormat("the KV cache does not fit: %s\n",
                             FormatBytes(static_cast<uint64_t>(d.kv_bytes)));
      continue;
    }
    const double cpu = d.read + d.multiply, rate = d.tokens_per_second();
    out << absl::StrFormat("%8s %8s %8s %8s %9s %9s  %s\n", moe ? absl::StrFormat("%.1f", d.distinct) : "-",
                           Milliseconds(std::max(0.0, d.step - cpu)), Milliseconds(cpu), Milliseconds(d.step),
                           Number(rate), Number(rate / static_cast<double>(d.requests)),
                           std::string(BoundName(d.bound)));
  }
  if (moe) {
    out << "  experts: distinct ones a layer, of " << p.bytes.config.n_routed_experts
        << "; CPU: routed experts; "
        << (p.machine.gpu ? "GPU: all else, with the round trips\n" : "dense: all else\n");
  }
}

void PrintPrefill(const Prediction& p, std::ostream& out) {
  if (p.prefill.empty()) return;
  const bool both = p.machine.gpu && p.bytes.routed > 0;
  out << "\nPrefill of one prompt" << (both ? ": experts on the CPU, or streamed to the GPU" : "") << "\n";
  const auto row = [&](const std::string& tokens, const std::string& cpu, const std::string& cpu_rate,
                       const std::string& cpu_bound, const std::string& stream,
                       const std::string& stream_rate, const std::string& stream_bound,
                       const std::string& shared) {
    out << absl::StrFormat("  %9s %9s %9s  ", tokens, cpu, cpu_rate);
    if (both) {
      out << absl::StrFormat("%-15s %9s %9s  %-14s  %5s\n", cpu_bound, stream, stream_rate, stream_bound,
                             shared);
    } else {
      out << cpu_bound << "\n";
    }
  };
  row("tokens", both ? "CPU s" : "seconds", "tokens/s", "bound by", "stream s", "tokens/s", "bound by",
      "CPU %");
  for (const PrefillPoint& f : p.prefill) {
    const auto n = static_cast<double>(f.tokens);
    row(Grouped(static_cast<uint64_t>(f.tokens)), Number(f.on_cpu), Number(n / f.on_cpu),
        std::string(BoundName(f.cpu_bound)), Number(f.streamed), both ? Number(n / f.streamed) : "",
        std::string(BoundName(f.stream_bound)), Number(100 * f.shared));
  }
  if (!both) return;
  out << "  CPU %: of a streamed prompt's experts, those that the CPU computes meanwhile\n";
  if (p.break_even > 0) {
    out << "  streaming is faster from " << Grouped(static_cast<uint64_t>(p.break_even))
        << (p.break_even == 1 ? " token on\n" : " tokens on\n");
  } else {
    out << "  streaming is never faster\n";
  }
}

void PrintText(const Prediction& p, std::ostream& out) {
  const ModelBytes& b = p.bytes;
  const uint64_t all = b.dense_bytes() + b.routed;
  out << p.model << ": " << FormatCount(b.parameters) << " parameters, " << FormatBytes(all)
      << "\n\nFigures\n";
  bool reference = false;
  for (const Figure& f : p.figures) {
    out << absl::StrFormat("  --%-23s %8s %-8s  %-9s  %s\n", f.name, Number(f.value), f.unit,
                           f.source == "reference box" ? "reference" : f.source, f.what);
    reference = reference || f.source == "reference box";
  }
  if (reference) {
    out << "  reference: of two EPYC 7542 with 8 x DDR4-3200 each and an RTX 4090, not of this machine\n";
  }
  out << "\nMemory\n";
  const uint64_t per_token = KvBytesPerToken(b.config, p.kv);
  const char* type = p.kv == KvType::kInt8 ? "8 bits" : "bf16";
  const auto line = [&](const std::string& what, uint64_t bytes, const std::string& more = "") {
    out << absl::StrFormat("  %-28s %10s%s%s\n", what, FormatBytes(bytes), more.empty() ? "" : "   ", more);
  };
  const char* place = p.machine.gpu ? "GPU" : "RAM";
  line(absl::StrCat(place, ": dense weights"), p.weight_bytes());
  line(absl::StrCat(place, ": KV cache, ", type), p.kv_bytes,
       absl::StrCat(Grouped(static_cast<uint64_t>(p.context)), " tokens of ", FormatBytes(per_token)));
  line(absl::StrCat(place, ": workspace"), p.workspace, "an estimate");
  if (p.machine.gpu) {
    const double room = p.kv_room() / static_cast<double>(per_token);
    const auto card = static_cast<uint64_t>(p.machine.vram_gb * 1e9);
    std::string more = absl::StrCat("of ", FormatBytes(card), "; room for ",
                                    Grouped(static_cast<uint64_t>(room)), " tokens of KV cache");
    if (p.device_bytes() > card) more = absl::StrCat("DOES NOT FIT, ", more);
    line("GPU: all", p.device_bytes(), more);
    if (b.embedding > 0) line("RAM: token embedding", b.embedding, "a row for a token");
  }
  if (b.routed > 0) {
    const double a_token =
        b.ExpertBytes() * static_cast<double>(b.config.num_experts_per_tok * b.config.num_moe_layers());
    line(absl::StrCat("RAM: experts, ", p.machine.sockets > 1 ? "each socket" : "all"),
         b.routed / static_cast<uint64_t>(p.machine.sockets),
         absl::StrCat(FormatBytes(static_cast<uint64_t>(b.ExpertBytes())), " an expert, ",
                      FormatBytes(static_cast<uint64_t>(a_token)), " read for a token alone"));
  }
  PrintDecode(p, out);
  PrintPrefill(p, out);
}

void PrintJson(const Prediction& p, std::ostream& out) {
  const ModelBytes& b = p.bytes;
  json report = {{"model", p.model},
                 {"parameters", b.parameters},
                 {"memory",
                  {{"dense_bytes", b.dense_bytes()},
                   {"kv_bytes", p.kv_bytes},
                   {"kv_bytes_per_token", KvBytesPerToken(b.config, p.kv)},
                   {"context", p.context},
                   {"workspace_bytes", p.workspace},
                   {"device_bytes", p.device_bytes()},
                   {"routed_expert_bytes", b.routed},
                   {"routed_expert_bytes_a_socket", b.routed / static_cast<uint64_t>(p.machine.sockets)},
                   {"expert_bytes", b.ExpertBytes()}}}};
  if (p.machine.gpu) {
    report["memory"]["fits"] = static_cast<double>(p.device_bytes()) <= p.machine.vram_gb * 1e9;
    report["stream_break_even_tokens"] = p.break_even;
  }
  json figures = json::object();
  for (const Figure& f : p.figures) figures[f.name] = {{"value", f.value}, {"source", f.source}};
  report["figures"] = figures;
  report["decode"] = json::array();
  for (const DecodePoint& d : p.decode) {
    report["decode"].push_back({{"requests", d.requests},
                                {"context", d.context},
                                {"distinct_experts", d.distinct},
                                {"weights_seconds", d.weights},
                                {"kv_seconds", d.kv},
                                {"shared_expert_seconds", d.shared},
                                {"expert_read_seconds", d.read},
                                {"expert_multiply_seconds", d.multiply},
                                {"round_trip_seconds", d.round_trips},
                                {"seconds", d.step},
                                {"tokens_per_second", d.tokens_per_second()},
                                {"kv_bytes", d.kv_bytes},
                                {"fits", p.Fits(d)},
                                {"bound", std::string(BoundName(d.bound))}});
  }
  report["prefill"] = json::array();
  for (const PrefillPoint& f : p.prefill) {
    json point = {
        {"tokens", f.tokens}, {"cpu_seconds", f.on_cpu}, {"cpu_bound", std::string(BoundName(f.cpu_bound))}};
    if (p.machine.gpu) {
      point["streamed_seconds"] = f.streamed;
      point["streamed_bound"] = std::string(BoundName(f.stream_bound));
      point["streamed_shared_ratio"] = f.shared;
    }
    report["prefill"].push_back(point);
  }
  out << report.dump(2, ' ', false, json::error_handler_t::replace) << "\n";
}

}  // namespace

void AddPlanFlags(Command& command, PlanOptions* o) {
  constexpr double kMost = 1e6;
  command.Text("model", &o->model, "A GGUF file, of which the header is read; default: --shape")
      .Choice("shape", &o->synth.shape, ShapeNames(), "Whose dimensions, without a file")
      .Choice("type", &o->synth.type, TypeScheme::Names(), "Weight types, without a file")
      .Integer("moe-layers", &o->synth.moe_layers, 0, 1000,
               "Layers with routed experts; default: the shape's")
      .Integer("dense-layers", &o->synth.dense_layers, 0, 1000, "Dense layers; default: the shape's")
      .Integer("experts", &o->synth.experts, 1, 65536, "Routed experts of a layer; default: the shape's")
      .Switch("measure", &o->measure, "Take --dram-gbps and --sockets from this machine")
      .Integer("sockets", &o->sockets, 1, 64, "CPU sockets (2)")
      .Number("dram-gbps", &o->dram_gbps, 0, kMost, "What plain reads reach, a socket: GB/s (174)")
      .Number("cpu-efficiency", &o->cpu_efficiency, 0, 1, "The share of it for expert weights (0.85)")
      .Number("cpu-tmacs", &o->cpu_tmacs, 0, kMost,
              "Multiply-adds with quantized weights, all sockets: 10^12 a second (4)")
      .Number("cpu-prefill", &o->cpu_prefill, 0, 1e9,
              "Tokens/s of all routed experts on the CPU in long prompts, if measured")
      .Switch("gpu", &o->gpu, "--no-gpu: the CPU does all")
      .Number("vram-gb", &o->vram_gb, 0, kMost, "GPU memory: GB (24)")
      .Number("vram-gbps", &o->vram_gbps, 0, kMost, "Its bandwidth: GB/s (1008)")
      .Number("gpu-efficiency", &o->gpu_efficiency, 0, 1, "The share of it that kernels reach (0.6)")
      .Number("gpu-tflops", &o->gpu_tflops, 0, kMost, "float16 products: TFLOP/s (165)")
      .Number("gpu-compute-efficiency", &o->gpu_compute_efficiency, 0, 1,
              "The share of it that kernels reach (0.35)")
      .Number("pcie-gbps", &o->pcie_gbps, 0, kMost, "Copies to the GPU: GB/s (25)")
      .Number("round-trip-us", &o->round_trip_us, 0, kMost, "GPU to CPU and back, a layer: microseconds (16)")
      .Integer("ctx", &o->context, 0, 1 << 24, "Tokens of the KV cache (the model's context, at most 8192)")
      .Choice("kv-type", &o->kv_type, {"bf16", "int8"}, "Values of the KV cache")
      .Text("requests", &o->requests, "Requests at a time (1,4,8,16,64)")
      .Text("contexts", &o->contexts, "Tokens that each has (1024,8192,32768,131072)")
      .Text("prompts", &o->prompts, "Tokens of a prompt (512,4096,16384,65536)")
      .Integer("chunk-size", &o->prefill.chunk, 1, 1 << 20,
               "Prompt tokens of a step, experts on the CPU (256)")
      .Integer("stream-tokens", &o->prefill.stream_chunk, 1, 1 << 20,
               "Prompt tokens of a pass, experts streamed (16384)")
      .Integer("stream-buffer-mb", &o->prefill.stream_buffer_mb, 0, 1 << 20,
               "10^6 bytes of GPU memory for experts on their way (0: 640 to 6144 by the pass's tokens)")
      .Switch(
          "stream-share", &o->prefill.share,
          "--no-stream-share: a pass's experts all come to the GPU, none is computed by the CPU meanwhile")
      .Switch("json", &o->json, "Print JSON");
}

int RunPlan(const PlanOptions& options, std::ostream& out, std::ostream& err) {
  const auto failed = [&err](const absl::Status& status, int code) {
    err << "tandem plan: " << Printable(std::string(status.message())) << "\n";
    return code;
  };
  const absl::StatusOr<Questions> questions = Ask(options);
  if (!questions.ok()) return failed(questions.status(), 2);
  const absl::StatusOr<Prediction> p = Predict(options, *questions);
  if (!p.ok())
    return failed(p.status(), options.model.empty() && absl::IsInvalidArgument(p.status()) ? 2 : 1);
  options.json ? PrintJson(*p, out) : PrintText(*p, out);
  return 0;
}

}  // namespace tandem::cli
