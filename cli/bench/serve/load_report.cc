#include "cli/bench/serve/load_report.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/report.h"
#include "cli/util/format.h"

namespace tandem::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string Line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

double Share(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

std::string Grouped(int64_t number) { return cli::Grouped(static_cast<uint64_t>(number)); }

bool HasLimits(const ServeLoadOptions& options) { return options.slo_ttft_ms > 0 || options.slo_itl_ms > 0; }

bool WithinLimits(const RequestOutcome& outcome, const ServeLoadOptions& options) {
  return (options.slo_ttft_ms <= 0 || outcome.first * 1000 <= options.slo_ttft_ms) &&
         (options.slo_itl_ms <= 0 || outcome.mean_gap * 1000 <= options.slo_itl_ms);
}

}  // namespace

Latencies LatenciesOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  Latencies out;
  out.count = static_cast<int64_t>(values.size());
  out.p50 = QuantileOfSorted(values, 0.50);
  out.p90 = QuantileOfSorted(values, 0.90);
  out.p95 = QuantileOfSorted(values, 0.95);
  out.p99 = QuantileOfSorted(values, 0.99);
  out.max = values.empty() ? 0 : values.back();
  return out;
}

LoadFigures FiguresOf(const LoadResults& results, const ServeLoadOptions& options) {
  LoadFigures out;
  std::vector<double> first, mean, end, lateness;
  for (const RequestOutcome& outcome : results.outcomes) {
    ++out.requests;
    lateness.push_back(outcome.lateness);
    if (!outcome.failure.empty()) {
      ++out.failures[outcome.failure];
      out.first_details.try_emplace(outcome.failure, outcome.detail);
      continue;
    }
    ++out.good;
    first.push_back(outcome.first);
    end.push_back(outcome.end);
    if (outcome.completion_tokens > 1) mean.push_back(outcome.mean_gap);
    if (WithinLimits(outcome, options)) ++out.within_limits;
    out.prompt_tokens += outcome.prompt_tokens;
    out.cached_tokens += outcome.cached_tokens;
    out.ideal_tokens += outcome.ideal_cached;
    out.output_tokens += outcome.completion_tokens;
  }
  out.first_token = LatenciesOf(std::move(first));
  out.inter_token = LatenciesOf(results.gaps);
  out.mean_inter_token = LatenciesOf(std::move(mean));
  out.end_to_end = LatenciesOf(std::move(end));
  out.lateness = LatenciesOf(std::move(lateness));
  out.seconds = results.seconds;
  if (out.seconds > 0) {
    out.requests_rate = static_cast<double>(out.good) / out.seconds;
    out.prompt_rate = static_cast<double>(out.prompt_tokens) / out.seconds;
    out.output_rate = static_cast<double>(out.output_tokens) / out.seconds;
    out.goodput = static_cast<double>(out.within_limits) / out.seconds;
  }
  return out;
}

std::string LoadName(const ServeLoadOptions& options) {
  std::string name;
  if (options.concurrency > 0) {
    name = absl::StrCat("closed loop of ", options.concurrency);
  } else if (options.rate > 0) {
    name = absl::StrCat("open loop, ", options.rate, " a second");
  } else {
    name = absl::StrCat("open loop, trace at ", options.trace_speed, " x");
  }
  if (options.trace.empty()) {
    absl::StrAppend(&name, ", ", options.prompt_tokens, " + ", options.output_tokens, " tokens");
    if (options.shared_prefix > 0) absl::StrAppend(&name, ", ", options.shared_prefix, " shared");
    if (options.distinct_prompts > 0) absl::StrAppend(&name, ", ", options.distinct_prompts, " prompts");
  } else {
    absl::StrAppend(&name, ", ", std::filesystem::path(options.trace).filename().string(), ", lengths x ",
                    options.length_scale);
  }
  return name;
}

std::string LoadTable(const LoadFigures& f, const LoadResults& results, const ServeLoadOptions& options) {
  std::string out = absl::StrFormat("%s: %s, seed %d\n", options.url, LoadName(options), options.seed);
  absl::StrAppendFormat(&out, "requests      %d, good %d, failed %d, most at a time %d, %.1f s%s\n",
                        f.requests, f.good, f.requests - f.good, results.most_under_way, f.seconds,
                        results.interrupted ? ", interrupted" : "");
  for (const auto& [kind, count] : f.failures) {
    absl::StrAppendFormat(&out, "  %-20s %6d   first: %s\n", kind, count, f.first_details.at(kind));
  }
  absl::StrAppendFormat(&out, "%-26s %10s %10s %10s %10s %10s\n", "milliseconds", "p50", "p90", "p95", "p99",
                        "max");
  const auto row = [&out](const char* what, const Latencies& l) {
    absl::StrAppendFormat(&out, "  %-24s %10.2f %10.2f %10.2f %10.2f %10.2f\n", what, l.p50 * 1e3,
                          l.p90 * 1e3, l.p95 * 1e3, l.p99 * 1e3, l.max * 1e3);
  };
  row("to the first token", f.first_token);
  row("between tokens", f.inter_token);
  row("the same, a request's mean", f.mean_inter_token);
  row("end to end", f.end_to_end);
  if (options.concurrency == 0) row("sent too late by", f.lateness);
  absl::StrAppendFormat(&out, "throughput    %.2f requests/s, %.1f tokens/s in, %.1f tokens/s out\n",
                        f.requests_rate, f.prompt_rate, f.output_rate);
  if (HasLimits(options)) {
    std::string limits;
    if (options.slo_ttft_ms > 0) absl::StrAppend(&limits, "first token <= ", options.slo_ttft_ms, " ms");
    if (options.slo_itl_ms > 0) {
      absl::StrAppend(&limits, limits.empty() ? "" : ", ", "mean between tokens <= ", options.slo_itl_ms,
                      " ms");
    }
    absl::StrAppendFormat(&out, "goodput       %.2f requests/s (%.1f %% of all) with %s\n", f.goodput,
                          100 * Share(f.within_limits, f.requests), limits);
  }
  absl::StrAppendFormat(
      &out,
      "prompts       %s tokens, cached %s (%.1f %%), by an infinite cache in pages of %d: %s "
      "(%.1f %%)\n",
      Grouped(f.prompt_tokens), Grouped(f.cached_tokens), 100 * Share(f.cached_tokens, f.prompt_tokens),
      options.page_tokens, Grouped(f.ideal_tokens), 100 * Share(f.ideal_tokens, f.prompt_tokens));
  const VerifyCounts& v = results.verify;
  if (options.verify > 0) {
    absl::StrAppendFormat(&out,
                          "verified      %d repeated prompts, %d differ; %d asked again alone, %d differ\n",
                          v.repeated, v.repeated_differing, v.again, v.again_differing);
    if (!v.first_difference.empty()) absl::StrAppend(&out, "              first: ", v.first_difference, "\n");
  }
  if (options.idle_connections > 0) {
    const IdleCrowd::Counts& idle = results.idle;
    absl::StrAppendFormat(&out,
                          "idle          %d of %d connections held to the end, %d refused, %d dropped\n",
                          idle.open, idle.wanted, idle.refused, idle.dropped);
  }
  return out;
}

std::string LoadJson(const LoadFigures& f, const LoadResults& results, const ServeLoadOptions& options,
                     const std::string& machine) {
  const auto begin = [&](const std::string& what) {
    return Json{{"bench", "serve"},
                {"machine", machine},
                {"shape", LoadName(options)},
                {"url", options.url},
                {"what", what}};
  };
  Json summary = begin("summary");
  summary.update({{"requests", f.requests},
                  {"good", f.good},
                  {"failures", f.failures},
                  {"interrupted", results.interrupted},
                  {"most_under_way", results.most_under_way},
                  {"connections", results.connections},
                  {"tokens", f.prompt_tokens + f.output_tokens},
                  {"prompt_tokens", f.prompt_tokens},
                  {"output_tokens", f.output_tokens},
                  {"seconds", f.seconds},
                  {"requests_per_second", f.requests_rate},
                  {"prompt_tokens_per_second", f.prompt_rate},
                  {"tokens_per_second", f.output_rate}});
  if (HasLimits(options)) {
    summary.update({{"slo_ttft_ms", options.slo_ttft_ms},
                    {"slo_itl_ms", options.slo_itl_ms},
                    {"goodput_requests_per_second", f.goodput},
                    {"goodput_ratio", Share(f.within_limits, f.requests)}});
  }
  summary.update({{"cached_tokens", f.cached_tokens},
                  {"ideal_cached_tokens", f.ideal_tokens},
                  {"page_tokens", options.page_tokens}});
  if (options.verify > 0) {
    summary.update({{"repeated", results.verify.repeated},
                    {"repeated_differing", results.verify.repeated_differing},
                    {"asked_again", results.verify.again},
                    {"asked_again_differing", results.verify.again_differing}});
  }
  if (options.idle_connections > 0) {
    summary.update({{"idle_wanted", results.idle.wanted},
                    {"idle_open", results.idle.open},
                    {"idle_refused", results.idle.refused},
                    {"idle_dropped", results.idle.dropped},
                    {"idle_requests", results.idle.requests}});
  }
  std::string out = Line(summary);
  const auto add = [&](const char* what, const Latencies& l) {
    Json line = begin(what);
    line["count"] = l.count;
    for (const auto& [name, value] :
         {std::pair{"p50_us", l.p50}, std::pair{"p90_us", l.p90}, std::pair{"p95_us", l.p95},
          std::pair{"p99_us", l.p99}, std::pair{"max_us", l.max}}) {
      line[name] = value * 1e6;
    }
    out += Line(line);
  };
  add("time to first token", f.first_token);
  add("inter-token", f.inter_token);
  add("mean inter-token of a request", f.mean_inter_token);
  add("end to end", f.end_to_end);
  if (options.concurrency == 0) add("lateness", f.lateness);
  return out;
}

std::string OutcomeJson(const RequestOutcome& o) {
  Json line = {{"index", o.index}, {"due", o.due}, {"late", o.lateness}};
  if (o.failure.empty()) {
    line["first"] = o.first;
    line["end"] = o.end;
    line["mean_gap"] = o.mean_gap;
    line["prompt_tokens"] = o.prompt_tokens;
    line["cached_tokens"] = o.cached_tokens;
    line["ideal_cached_tokens"] = o.ideal_cached;
    line["completion_tokens"] = o.completion_tokens;
  } else {
    line["failure"] = o.failure;
    line["detail"] = o.detail;
    line["end"] = o.end;
    line["asked_prompt"] = o.asked_prompt;
    line["asked_output"] = o.asked_output;
  }
  return Line(line);
}

bool AllWell(const LoadFigures& figures, const LoadResults& results) {
  return figures.requests > 0 && figures.good == figures.requests && !results.interrupted &&
         results.verify.repeated_differing == 0 && results.verify.again_differing == 0 &&
         results.idle.refused == 0 && results.idle.dropped == 0;
}

}  // namespace tandem::cli
