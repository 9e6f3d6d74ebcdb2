// The GPU's share of a decode step: a model's own graph, with experts that answer with nothing, at once or
// after a while, which is subtracted.
//
//   cuda_step_benchmark --model FILE [--contexts 8192,131072] [--rows 1,4,16] [--kv-cache-type bf16|int8]
//   [--bell auto] [--defer-experts N] [--expert-us N]
//
// The cache's contents do not matter to the time: nothing is computed beforehand. The ceiling is what must be
// read of the GPU's memory, by the rate of plain reads in the same run.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/time/clock.h"
#include "services/attention_gpu/backend/cuda/ceilings.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/ring_peers_for_test.h"
#include "services/attention_gpu/experts/deferral.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention {
namespace {

constexpr int32_t kPageTokens = 32;
constexpr int64_t kMostTokens = 65536;

class NoExperts : public ExpertGroup {
 public:
  NoExperts(const model::ModelConfig& c, uint32_t slots, absl::Duration time)
      : peers_(
            1,
            {slots, 512, static_cast<uint32_t>(c.num_experts_per_tok), static_cast<uint32_t>(c.hidden_size)},
            [time](const shm::IncomingCall&, size_t) {
              for (const absl::Time end = absl::Now() + time; absl::Now() < end;) {
              }
              return absl::OkStatus();
            }) {}
  absl::Status Start(const ExpertCall&) override { return absl::UnimplementedError("for the GPU alone"); }
  absl::Status Finish(float*) override { return absl::UnimplementedError("for the GPU alone"); }
  absl::Status Recover(absl::Duration) override { return absl::OkStatus(); }
  int processes() const override { return 1; }
  DeviceCalls* device_calls() override { return &peers_; }

 private:
  cuda::testing::Peers peers_;
};

// Bytes a second.
absl::StatusOr<double> ReadCeiling() {
  constexpr int64_t kBytes = int64_t{1} << 30;
  uint8_t* data = nullptr;
  uint32_t* sink = nullptr;
  cuda::Arena arena(cuda::Arena::Kind::kDevice);
  arena.Want(&data, kBytes);
  arena.Want(&sink, 1);
  absl::Status status = arena.Allocate("the read ceiling");
  if (status.ok()) status = cuda::ToStatus(cudaMemset(data, 1, kBytes), "the read ceiling");
  std::vector<double> seconds;
  for (int i = 0; i < 9 && status.ok(); ++i) {
    const absl::Time begin = absl::Now();
    for (int k = 0; k < 4; ++k) {
      status.Update(cuda::ToStatus(cuda::LaunchRead(data, kBytes, sink, nullptr), "the read ceiling"));
    }
    status.Update(cuda::ToStatus(cudaDeviceSynchronize(), "the read ceiling"));
    seconds.push_back(absl::ToDoubleSeconds(absl::Now() - begin) / 4);
  }
  if (!status.ok()) return status;
  std::sort(seconds.begin(), seconds.end());
  return kBytes / seconds[seconds.size() / 2];
}

struct Flags {
  std::string model, bell = "auto", cache_type = "bf16";
  std::vector<int64_t> contexts = {8192, 131072}, rows = {1, 4, 16};
  int32_t defer_experts = 0;
  int32_t expert_us = 0;
};

absl::Status Measure(const Flags& flags) {
  auto file = gguf::File::Open(flags.model);
  if (!file.ok()) return file.status();
  const auto config = model::ReadModelConfig(**file, "auto");
  if (!config.ok()) return config.status();
  const bool int8 = flags.cache_type == "int8";
  CudaBackendOptions o;
  o.threads.threads = 8;
  o.page_tokens = kPageTokens;
  const int64_t longest = *std::max_element(flags.contexts.begin(), flags.contexts.end());
  // As many as the rows would need each, as far as it matters to how attention is cut.
  const int64_t most = longest * *std::max_element(flags.rows.begin(), flags.rows.end());
  o.page_count = static_cast<int32_t>(std::max(longest, std::min(most, kMostTokens)) / kPageTokens + 16);
  o.bell = flags.bell;
  o.int8_cache = int8;
  o.defer_experts = flags.defer_experts;
  const auto plan = PlanCuda(**file, *config, o);
  if (!plan.ok()) return plan.status();
  std::printf("%s\n", plan->ToString().c_str());
  auto backend =
      CreateCudaBackend(**file, *config, o,
                        std::make_unique<NoExperts>(*config, flags.defer_experts > 0 ? kDeferralSlots : 1,
                                                    absl::Microseconds(flags.expert_us)));
  if (!backend.ok()) return backend.status();
  const auto ceiling = ReadCeiling();
  if (!ceiling.ok()) return ceiling.status();
  const int64_t row_bytes = cuda::CacheRowBytes(int8 ? cuda::kCacheInt8 : cuda::kCacheBf16,
                                                config->kv_lora_rank, config->qk_rope_head_dim);
  // Of the embedding one row is read; the rest of the weights whole.
  const gguf::Tensor* embedding = (*file)->FindTensor("token_embd.weight");
  const double weights = static_cast<double>(plan->weights - (embedding != nullptr ? embedding->nbytes : 0));
  std::printf("reads %.0f GB/s; %.2f GB of weights a step, %lld layers\n", *ceiling / 1e9, weights / 1e9,
              static_cast<long long>(config->num_hidden_layers));
  const SamplingParams greedy;
  const std::unordered_map<int32_t, int32_t> counts;
  for (const int64_t context : flags.contexts) {
    for (const int64_t rows : flags.rows) {
      // All rows look at the same pages but for the one they write.
      std::vector<std::vector<int32_t>> pages(rows);
      StepBatch batch;
      const int64_t of_context = (context + kPageTokens - 1) / kPageTokens;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p + 1 < of_context; ++p) pages[r].push_back(static_cast<int32_t>(p));
        pages[r].push_back(static_cast<int32_t>(o.page_count - 1 - r % 15));
        StepSequence s;
        s.first = static_cast<int32_t>(r);
        s.count = 1;
        s.position = static_cast<int32_t>(context - 1);
        s.pages = pages[r];
        s.generated_from = 0;
        s.sample = true;
        s.params = &greedy;
        s.counts = &counts;
        batch.sequences.push_back(s);
        batch.tokens.push_back(static_cast<int32_t>(100 + r));
      }
      std::vector<double> seconds;
      StepResult result;
      for (int i = 0; i < 14; ++i) {
        const absl::Time begin = absl::Now();
        absl::Status status = (*backend)->Step(batch, &result);
        if (!status.ok()) return status;
        if (i >= 3) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - begin));
      }
      std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
      const double median = seconds[seconds.size() / 2] -
                            1e-6 * static_cast<double>(config->num_moe_layers() * flags.expert_us);
      const double bytes =
          weights + static_cast<double>(rows * context * row_bytes * config->num_hidden_layers);
      std::printf(
          "context %7lld, %2lld rows: %7.2f ms a step beside expert calls of %d us, %.3f of the bound %.2f "
          "ms\n",
          static_cast<long long>(context), static_cast<long long>(rows), 1e3 * median, flags.expert_us,
          bytes / *ceiling / median, 1e3 * bytes / *ceiling);
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace tandem::attention

int main(int argc, char** argv) {
  CLI::App app("Times the GPU's share of decode steps");
  tandem::attention::Flags flags;
  app.add_option("--model", flags.model, "a GGUF file")->required();
  app.add_option("--contexts", flags.contexts, "positions that a row sees")->delimiter(',');
  app.add_option("--rows", flags.rows, "sequences of a step")->delimiter(',');
  app.add_option("--kv-cache-type", flags.cache_type, "bf16 or int8")->check(CLI::IsMember({"bf16", "int8"}));
  app.add_option("--bell", flags.bell, "auto, stream, kernel or host");
  app.add_option("--expert-us", flags.expert_us, "so long the experts take; 0: they answer at once");
  app.add_option("--defer-experts", flags.defer_experts, "of a token, as tandem-attention");
  CLI11_PARSE(app, argc, argv);
  if (flags.expert_us > 0 && flags.defer_experts > 0) {
    std::fprintf(stderr, "--expert-us: what deferred calls hide cannot be subtracted\n");
    return 2;
  }
  const absl::Status status = tandem::attention::Measure(flags);
  if (!status.ok()) std::fprintf(stderr, "cuda_step_benchmark: %s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}
