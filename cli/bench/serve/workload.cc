#include "cli/bench/serve/workload.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/prefix_ideal.h"

namespace tandem::cli {
namespace {

// Sequences of units that have nothing in common.
enum : uint64_t { kArrivals = 1, kSharedPrefix, kOwn, kBlock };

uint64_t Stream(uint64_t seed, uint64_t kind, int64_t id) {
  return Mix(Mix(Mix(seed) ^ kind) ^ static_cast<uint64_t>(id));
}

}  // namespace

absl::StatusOr<Workload> Workload::Create(WorkloadOptions options) {
  if (options.max_context > 0 && options.max_context < 2) {
    return absl::InvalidArgumentError("--max-context: a prompt and an answer need two tokens at least");
  }
  if (options.trace.empty() && options.max_context > 0 &&
      options.prompt_tokens + options.output_tokens > options.max_context) {
    return absl::InvalidArgumentError(absl::StrCat("--prompt-tokens ", options.prompt_tokens,
                                                   " and --output-tokens ", options.output_tokens,
                                                   " do not fit the context of ", options.max_context));
  }
  return Workload(std::move(options));
}

std::optional<int64_t> Workload::size() const {
  if (options_.trace.empty()) return std::nullopt;
  return static_cast<int64_t>(options_.trace.size());
}

int64_t Workload::Units(double tokens) const {
  return std::max<int64_t>(0, std::llround(tokens / options_.tokens_per_unit));
}

void Workload::Extend(uint64_t stream, int64_t length, std::vector<int32_t>* prompt) const {
  for (uint64_t i = 0; static_cast<int64_t>(prompt->size()) < length; ++i) {
    prompt->push_back(static_cast<int32_t>(Mix(stream + i) % static_cast<uint64_t>(options_.alphabet)));
  }
}

std::optional<PlannedRequest> Workload::Next() {
  const bool traced = !options_.trace.empty();
  if (traced && next_ >= static_cast<int64_t>(options_.trace.size())) return std::nullopt;
  const int64_t index = next_++;
  PlannedRequest request;
  if (options_.rate > 0) {
    // (0, 1]: 53 bits, so that the logarithm is finite.
    const uint64_t bits = Stream(options_.seed, kArrivals, index) >> 11;
    clock_ += -std::log((static_cast<double>(bits) + 1) / 9007199254740992.0) / options_.rate;
    request.arrival = clock_;
  } else if (traced) {
    request.arrival = options_.trace[static_cast<size_t>(index)].seconds / options_.trace_speed;
  }
  if (!traced) {
    request.output_tokens = options_.output_tokens;
    const int64_t length =
        std::max<int64_t>(1, Units(static_cast<double>(options_.prompt_tokens) - options_.overhead_tokens));
    const int64_t shared = std::min(length, Units(static_cast<double>(options_.shared_prefix)));
    Extend(Stream(options_.seed, kSharedPrefix, 0), shared, &request.prompt);
    const int64_t id = options_.distinct_prompts > 0 ? index % options_.distinct_prompts : index;
    Extend(Stream(options_.seed, kOwn, id), length, &request.prompt);
    return request;
  }
  const TraceRequest& from = options_.trace[static_cast<size_t>(index)];
  const auto scaled = [this](int64_t tokens) {
    return std::max<int64_t>(1, std::llround(static_cast<double>(tokens) * options_.length_scale));
  };
  int64_t prompt_tokens = scaled(from.prompt_tokens);
  request.output_tokens = scaled(from.output_tokens);
  if (options_.max_context > 0) {
    request.output_tokens = std::min(request.output_tokens, options_.max_context / 2);
    prompt_tokens = std::min(prompt_tokens, options_.max_context - request.output_tokens);
  }
  const int64_t length =
      std::max<int64_t>(1, Units(static_cast<double>(prompt_tokens) - options_.overhead_tokens));
  // A block's place follows from its number alone, so that equal ids at equal places give equal text, and
  // what is cut off is cut off at the end.
  const double block_tokens = static_cast<double>(kTraceBlockTokens) * options_.length_scale;
  for (size_t b = 0; b < from.blocks.size() && static_cast<int64_t>(request.prompt.size()) < length; ++b) {
    const int64_t end = std::min(length, Units(block_tokens * static_cast<double>(b + 1)));
    Extend(Stream(options_.seed, kBlock, from.blocks[b]), end, &request.prompt);
  }
  Extend(Stream(options_.seed, kOwn, index), length, &request.prompt);
  return request;
}

}  // namespace tandem::cli
