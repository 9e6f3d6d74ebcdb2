#include "cli/bench/bench.h"

#include <ostream>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/serve_load.h"
#include "cli/synth/shapes.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

absl::Status Run(const BenchOptions& options, Report& report) {
  if (options.which == "roofline") return BenchRoofline(options, report);
  if (options.which == "moe") return BenchMoe(options, report);
  if (options.which == "roundtrip") return BenchRoundtrip(options, report);
  if (options.which == "load") return BenchLoad(options, report);
  if (options.which == "serve") return BenchServe(options.serve, report);
  return absl::InvalidArgumentError(
      absl::StrCat("\"", options.which, "\": there are roofline, moe, roundtrip, load and serve"));
}

}  // namespace

void AddBenchFlags(Command& command, BenchOptions* options) {
  command.Positional("WHAT", &options->which, "roofline, moe, roundtrip, load or serve")
      .Switch("json", &options->json, "JSON lines instead of a table")
      .Text("isa", &options->isa, "roofline, moe: one instruction set, or all (default: the one in use)")
      .Integer("threads", &options->threads, 0, 8192, "Threads (default: one a physical core)")
      .Integer("repeat", &options->repeat, 0, 1000000, "Passes of each measurement (default: by --seconds)")
      .Number("seconds", &options->seconds, 0, 3600, "Time for each measurement, about (default 2)")
      .Choice("shape", &options->shape, ShapeNames(), "moe: whose dimensions")
      .Choice("type", &options->type, TypeScheme::Names(), "moe: weight types")
      .Text("tokens", &options->tokens, "moe: tokens of a call, with commas (default 1,2,4,8,16,64,512)")
      .Integer("layers", &options->layers, 0, 1000, "moe: distinct layers (default: by memory)")
      .Integer("experts", &options->experts, 0, 65536, "moe: experts of a layer (default: by memory)")
      .Integer("slices", &options->slices, 1, 64,
               "moe: also with so many processes, each with a slice and its share of the threads")
      .Choice("precision", &options->precision, {"fast", "bulk"},
              "moe: exact integer kernels, or bf16 tiles as prefill with a GPU asks for")
      .Integer("pause-us", &options->pause_us, 0, 1000000,
               "moe: microseconds between calls, as a layer's other work takes (default 0)")
      .Integer("megabytes", &options->megabytes, 1, 1000000, "roofline: size of what is read (default 1024)")
      .Integer("calls", &options->calls, 100, 100000000, "roundtrip: calls (default 20000)")
      .Text("model", &options->model, "load: the file; roundtrip: default the demo model")
      .Text("expert-program", &options->expert_program,
            "roundtrip: default tandem-expert beside this program")
      .Integer("load-threads", &options->load_threads, 1, 256, "load: requests in flight (default 8)")
      .NotFromEnvironment("isa")
      .NotFromEnvironment("type")
      .NotFromEnvironment("tokens");
  AddServeLoadFlags(command, &options->serve);
}

int RunBench(const BenchOptions& options, std::ostream& out, std::ostream& err) {
  Report report(options.json, out);
  report.Note(MachineName());
  const absl::Status status = Run(options, report);
  if (status.ok()) return 0;
  err << "tandem bench " << options.which << ": " << std::string(status.message()) << "\n";
  return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
}

}  // namespace tandem::cli
