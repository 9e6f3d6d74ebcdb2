#include "cli/bench/serve/serve_load.h"

#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/load_report.h"
#include "cli/bench/serve/load_run.h"
#include "cli/bench/serve/server_facts.h"
#include "cli/bench/serve/trace.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

absl::Status Check(const ServeLoadOptions& options) {
  const bool traced = !options.trace.empty();
  if (options.concurrency > 0 && options.rate > 0) {
    return absl::InvalidArgumentError(
        "--concurrency (closed loop) and --rate (open loop) exclude each other");
  }
  if (options.concurrency == 0 && options.rate == 0 && !traced) {
    return absl::InvalidArgumentError("one of --concurrency, --rate and --trace is wanted");
  }
  if (options.requests == 0 && options.duration == 0 && !traced) {
    return absl::InvalidArgumentError("--requests or --duration says when it ends");
  }
  if (!traced && options.shared_prefix > options.prompt_tokens) {
    return absl::InvalidArgumentError("--shared-prefix is longer than --prompt-tokens");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchServe(const ServeLoadOptions& options, Report& report) {
  TANDEM_RETURN_IF_ERROR(Check(options));
  LoadPlan plan;
  plan.options = options;
  TANDEM_ASSIGN_OR_RETURN(plan.url, ParseApiUrl(options.url));
  WorkloadOptions workload;
  if (!options.trace.empty()) {
    TANDEM_ASSIGN_OR_RETURN(workload.trace, ReadTrace(options.trace, options.trace_format));
  }
  std::ofstream log;
  if (!options.log.empty()) {
    log.open(options.log, std::ios::trunc);
    if (!log) return absl::InvalidArgumentError(absl::StrCat("--log ", options.log, " cannot be written"));
  }
  TANDEM_ASSIGN_OR_RETURN(plan.facts, AskServer(plan.url, options));
  const bool tokens = !plan.facts.tokens.empty();
  const int64_t context = options.max_context > 0 ? options.max_context : plan.facts.max_context;
  workload.seed = static_cast<uint64_t>(options.seed);
  workload.alphabet = tokens ? static_cast<int64_t>(plan.facts.tokens.size()) : WordCount();
  workload.tokens_per_unit = plan.facts.tokens_per_word;
  workload.overhead_tokens = plan.facts.overhead_tokens;
  workload.trace_speed = options.trace_speed;
  workload.length_scale = options.length_scale;
  workload.max_context = context;
  workload.prompt_tokens = options.prompt_tokens;
  workload.output_tokens = options.output_tokens;
  workload.shared_prefix = options.shared_prefix;
  workload.distinct_prompts = options.distinct_prompts;
  workload.rate = options.rate;
  TANDEM_ASSIGN_OR_RETURN(Workload requests, Workload::Create(std::move(workload)));
  report.Note(
      absl::StrCat("model ", plan.facts.model, ", context ",
                   context > 0 ? absl::StrCat(context) : std::string("not known"), ", prompts as ",
                   tokens ? "token ids" : absl::StrCat("words of ", plan.facts.tokens_per_word, " tokens")));
  TANDEM_ASSIGN_OR_RETURN(const LoadResults results, RunLoad(plan, std::move(requests)));
  for (const RequestOutcome& outcome : results.outcomes) {
    if (log.is_open()) log << OutcomeJson(outcome);
  }
  const LoadFigures figures = FiguresOf(results, options);
  if (report.json()) {
    report.Raw(LoadJson(figures, results, options, MachineName()));
  } else {
    report.Raw(LoadTable(figures, results, options));
  }
  if (AllWell(figures, results)) return absl::OkStatus();
  return absl::DataLossError(results.interrupted ? "interrupted" : "not all went well, see above");
}

}  // namespace tandem::cli
