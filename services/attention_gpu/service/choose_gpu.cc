#include "services/attention_gpu/service/choose_gpu.h"

#include <algorithm>
#include <charconv>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/telemetry/log.h"
#include "services/attention_gpu/experts/stream_share.h"

namespace tandem::attention {
namespace {

// Steps of up to kMostSharedTokens are the least: the processes take a part of those. Beyond, every pass of a
// prompt takes all weights over the bus, so the fewer the better; but so many tokens at most.
constexpr int32_t kManyStreamTokens = 16384;
// Contexts up to this pass at once, with so little memory that the whole of R1 takes less than 13 GB.
constexpr int32_t kShortContext = 8192;
constexpr uint64_t kTightStreamBytes = 384'000'000;

}  // namespace

absl::StatusOr<std::optional<CudaBackendOptions>> ChooseGpu(const Options& o, const gguf::File& file,
                                                            const model::ModelConfig& c,
                                                            CudaBackendOptions wanted, int32_t context,
                                                            int32_t most_pages) {
  if (o.gpu == "none") return std::nullopt;
  const bool automatic = o.gpu == "auto";
  if (!automatic) {
    const char* end = o.gpu.data() + o.gpu.size();
    const auto [stop, error] = std::from_chars(o.gpu.data(), end, wanted.device);
    if (error != std::errc() || stop != end || wanted.device < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--gpu ", o.gpu, ": must be auto, none or a device number"));
    }
  }
  if (o.precision == "reference") {
    if (automatic) return std::nullopt;
    return absl::InvalidArgumentError(
        absl::StrCat("--gpu ", o.gpu, ": --precision reference is the CPU backend's alone"));
  }
  wanted.vram_limit = static_cast<uint64_t>(o.vram_gb * 1e9);
  absl::StatusOr<CudaPlan> plan;
  const int32_t least_pages = wanted.page_count;
  const std::vector<StreamStep> steps = StreamSteps(o, context);
  for (const StreamStep& step : steps) {
    wanted.stream_step_tokens = step.tokens;
    wanted.stream_buffer_bytes = step.buffer_bytes;
    // Steps larger than the least are not worth a cache of a single sequence.
    const bool larger = step.tokens > steps.back().tokens;
    wanted.page_count = larger ? std::max(least_pages, std::min(most_pages, 2 * least_pages)) : least_pages;
    plan = PlanCuda(file, c, wanted);
    if (!absl::IsResourceExhausted(plan.status())) break;
  }
  if (absl::IsResourceExhausted(plan.status()) && wanted.stream_prefill.mode == StreamPrefill::Mode::kAuto) {
    wanted.stream_prefill.mode = StreamPrefill::Mode::kOff;
    plan = PlanCuda(file, c, wanted);
    if (plan.ok()) spdlog::info("there is no room on the GPU for streaming experts (--stream-prefill)");
  }
  if (plan.ok()) {
    wanted.page_count = PagesThatFit(*plan, wanted.page_count, most_pages);
    plan = PlanCuda(file, c, wanted);
  }
  if (plan.ok()) {
    spdlog::info("GPU {}: {}", wanted.device, plan->ToString());
    if (plan->stream > 0) {
      spdlog::info("streamed steps have up to {} tokens, {} MB of weights on their way",
                   wanted.stream_step_tokens, wanted.stream_buffer_bytes / 1'000'000);
    }
    return wanted;
  }
  if (!automatic) return Annotate(plan.status(), absl::StrCat("--gpu ", o.gpu));
  spdlog::info("no GPU is used: {}", std::string(plan.status().message()));
  return std::nullopt;
}

std::vector<StreamStep> StreamSteps(const Options& o, int32_t context) {
  std::vector<StreamStep> out;
  // No step has more than a context, unless many sequences share it.
  const int64_t most = int64_t{context} * o.max_batch_size;
  const auto add = [&](int64_t tokens, uint64_t bytes) {
    const StreamStep step{
        static_cast<int32_t>(std::min(tokens, most)),
        o.stream_buffer_mb > 0 ? static_cast<uint64_t>(o.stream_buffer_mb) * 1'000'000 : bytes};
    if (out.empty() || out.back() != step) out.push_back(step);
  };
  const auto add_all = [&](int64_t tokens) {
    // As much as a step of this context likes, as one of a long context does, and the least.
    add(tokens, AmpleStreamBytes(std::min(tokens, most), context));
    add(tokens, AmpleStreamBytes(std::min(tokens, most), INT32_MAX));
    add(tokens, kLeastStreamBytes);
  };
  if (o.stream_chunk_size > 0) {
    add_all(o.stream_chunk_size);
    return out;
  }
  if (context > kShortContext) {
    add_all(std::min(context, kManyStreamTokens));
    add_all(kShortContext);
  } else if (context > kMostSharedTokens) {
    add(context, kTightStreamBytes);
  }
  add(kMostSharedTokens, kLeastStreamBytes);
  add(kMostSharedTokens, kTightStreamBytes);
  return out;
}

int32_t PagesThatFit(const CudaPlan& plan, int32_t least, int32_t most) {
  if (plan.total() >= plan.available || plan.cache == 0 || least <= 0) return least;
  const uint64_t page = (plan.cache + least - 1) / least;
  const uint64_t more = (plan.available - plan.total()) / 10 * 9 / page;
  return static_cast<int32_t>(std::max<uint64_t>(least, std::min<uint64_t>(most, least + more)));
}

}  // namespace tandem::attention
