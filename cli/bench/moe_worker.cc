#include "cli/bench/moe_worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "cli/bench/util.h"
#include "cli/synth/random_blocks.h"
#include "common/base/status_macros.h"
#include "common/kernels/read_ceiling.h"
#include "services/expert_cpu/moe/choose_reading.h"

namespace tandem::cli {

absl::StatusOr<std::unique_ptr<MoeWorker>> MoeWorker::Make(const MoeRunnerOptions& options,
                                                           const expert::ShardRequest& request) {
  std::unique_ptr<MoeWorker> worker(new MoeWorker());
  worker->pool_ = PinnedPool(options.cpus);
  expert::GenerateOptions generate = options.generate;
  generate.request = request;
  const double rms = 1 / std::sqrt(static_cast<double>(generate.config.hidden_size));
  generate.fill = [seed = options.seed, rms](gguf::TensorType type, uint64_t number,
                                             std::span<uint8_t> blocks) {
    FillRandomBlocks(type, rms, seed + (number << 32), 0, blocks);
  };
  TANDEM_ASSIGN_OR_RETURN(worker->shard_, expert::GenerateShard(generate, *worker->pool_));
  expert::Moe::Options moe;
  moe.max_tokens = options.max_tokens;
  worker->moe_ = std::make_unique<expert::Moe>(*worker->shard_, *worker->pool_, moe);
  TANDEM_RETURN_IF_ERROR(expert::ChooseReading(*worker->shard_, *worker->moe_, {}).status());
  return worker;
}

double MoeWorker::Read(uint64_t bytes) {
  const uint64_t all = shard_->resident_bytes();
  bytes = std::min(bytes, all);
  if (next_ + bytes > all) next_ = 0;
  const uint8_t* from = shard_->memory() + next_;
  next_ += bytes;
  return kernels::MeasureReadBandwidth(*pool_, from, static_cast<int64_t>(bytes));
}

namespace {

class LocalRunner final : public MoeRunner {
 public:
  LocalRunner(std::unique_ptr<MoeWorker> worker, const MoeRunnerOptions& options)
      : worker_(std::move(worker)),
        k_(options.generate.config.num_experts_per_tok),
        hidden_(options.generate.config.hidden_size),
        bulk_(options.bulk),
        ids_(static_cast<size_t>(options.max_tokens * k_)),
        weights_(ids_.size()),
        activations_(static_cast<size_t>(options.max_tokens * hidden_)),
        answer_(activations_.size()) {}

  std::span<int32_t> ids() override { return ids_; }
  std::span<float> weights() override { return weights_; }
  std::span<uint16_t> activations() override { return activations_; }
  std::span<const float> answer() override { return answer_; }
  uint64_t resident_bytes() const override { return worker_->shard().resident_bytes(); }
  absl::StatusOr<double> Read(uint64_t bytes) override { return worker_->Read(bytes); }

  absl::StatusOr<Result> Forward(const MoeCall& call) override {
    const auto pairs = static_cast<size_t>(call.n_tokens * k_);
    const auto values = static_cast<size_t>(call.n_tokens * hidden_);
    const auto bytes = [](const auto* data, size_t n) {
      return std::span(reinterpret_cast<const uint8_t*>(data), n * sizeof *data);
    };
    expert::Call c;
    c.layer = call.layer;
    c.n_tokens = call.n_tokens;
    c.experts_per_token = k_;
    c.expert_ids = bytes(ids_.data(), pairs);
    c.expert_weights = bytes(weights_.data(), pairs);
    c.activations = bytes(activations_.data(), values);
    c.activation_type = expert::ActivationType::kBf16;
    c.bulk = bulk_;
    const Stopwatch watch;
    TANDEM_ASSIGN_OR_RETURN(
        const expert::CallStatistics statistics,
        worker_->moe().Forward(c, {reinterpret_cast<uint8_t*>(answer_.data()), values * sizeof(float)}));
    return Result{watch.Seconds(), static_cast<double>(statistics.weight_bytes_read)};
  }

 private:
  const std::unique_ptr<MoeWorker> worker_;
  const int64_t k_, hidden_;
  const bool bulk_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
  std::vector<uint16_t> activations_;
  std::vector<float> answer_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MoeRunner>> MakeLocalRunner(const MoeRunnerOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(auto worker, MoeWorker::Make(options, expert::ShardRequest()));
  return std::unique_ptr<MoeRunner>(new LocalRunner(std::move(worker), options));
}

}  // namespace tandem::cli
