#include "tests/golden/local_experts.h"

#include <cstring>

#include "common/base/status_macros.h"
#include "common/quant/quant.h"
#include "common/threading/thread_pool.h"
#include "services/attention_gpu/experts/shard_cover.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::golden {
namespace {

std::span<const uint8_t> Bytes(const void* p, size_t n) { return {static_cast<const uint8_t*>(p), n}; }

class LocalExperts : public attention::ExpertGroup {
 public:
  LocalExperts(kernels::Precision precision, int threads)
      : precision_(precision), pool_(PoolOptions(threads)) {}

  absl::Status Add(const std::string& path, const expert::ShardRequest& request) {
    expert::LoadOptions load;
    load.request = request;
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<expert::Shard> shard, expert::Shard::Load(path, load));
    expert::Moe::Options options;
    options.precision = precision_;
    moes_.push_back(std::make_unique<expert::Moe>(*shard, pool_, options));
    shards_.push_back(std::move(shard));
    return absl::OkStatus();
  }

  absl::Status Start(const attention::ExpertCall& c) override {
    const size_t pairs = static_cast<size_t>(c.n_tokens) * c.experts_per_token;
    const size_t values = static_cast<size_t>(c.n_tokens) * shards_[0]->plan().hidden_size;
    std::vector<uint16_t> halves;
    expert::Call call;
    call.layer = c.layer;
    call.n_tokens = c.n_tokens;
    call.experts_per_token = c.experts_per_token;
    call.expert_ids = Bytes(c.expert_ids, pairs * sizeof(int32_t));
    call.expert_weights = Bytes(c.expert_weights, pairs * sizeof(float));
    if (precision_ == kernels::Precision::kReference ||
        attention::NeedsFloatActivations(shards_[0]->WeightTypes())) {
      call.activations = Bytes(c.activations, values * sizeof(float));
      call.activation_type = expert::ActivationType::kF32;
    } else {
      for (size_t i = 0; i < values; ++i) halves.push_back(quant::FloatToBf16(c.activations[i]));
      call.activations = Bytes(halves.data(), values * sizeof(uint16_t));
      call.activation_type = expert::ActivationType::kBf16;
    }
    call.answer_type = expert::AnswerType::kF64;
    sum_.assign(values, 0.0);
    std::vector<double> answer(values);
    for (auto& moe : moes_) {
      const std::span<uint8_t> out(reinterpret_cast<uint8_t*>(answer.data()), values * sizeof(double));
      TANDEM_RETURN_IF_ERROR(moe->Forward(call, out).status());
      for (size_t i = 0; i < values; ++i) sum_[i] += answer[i];
    }
    return absl::OkStatus();
  }
  absl::Status Finish(float* out) override {
    for (size_t i = 0; i < sum_.size(); ++i) out[i] = static_cast<float>(sum_[i]);
    return absl::OkStatus();
  }
  absl::Status Recover(absl::Duration) override { return absl::OkStatus(); }
  int processes() const override { return static_cast<int>(moes_.size()); }
  absl::StatusOr<std::vector<std::shared_ptr<const attention::ShardWeights>>> MapWeights() override {
    std::vector<std::shared_ptr<const attention::ShardWeights>> out;
    for (const auto& shard : shards_) {
      out.push_back(std::make_shared<attention::ShardWeights>(WeightsOf(*shard)));
    }
    return out;
  }

 private:
  static threading::ThreadPool::Options PoolOptions(int threads) {
    threading::ThreadPool::Options o;
    o.threads = threads;
    return o;
  }
  const kernels::Precision precision_;
  threading::ThreadPool pool_;
  std::vector<std::unique_ptr<expert::Shard>> shards_;
  std::vector<std::unique_ptr<expert::Moe>> moes_;
  std::vector<double> sum_;
};

attention::WeightStack Stack(const expert::ExpertStack& from, const uint8_t* arena, const std::byte* memory) {
  attention::WeightStack to;
  to.type = from.type;
  to.data = memory + (from.data - arena);
  to.expert_bytes = from.expert_bytes;
  to.rows = from.rows;
  to.cols = from.cols;
  to.row_bytes = from.row_bytes;
  return to;
}

}  // namespace

attention::ShardWeights WeightsOf(const expert::Shard& shard, std::span<const std::byte> memory) {
  const expert::ShardPlan& plan = shard.plan();
  attention::ShardWeights out;
  out.memory = memory;
  out.expert_begin = plan.expert_begin;
  out.expert_end = plan.expert_end;
  out.row_begin = plan.row_begin;
  out.row_end = plan.row_end;
  for (const int64_t block : plan.layers) {
    const expert::ShardLayer* layer = shard.FindLayer(block);
    if (layer == nullptr) continue;
    out.layers.push_back({block, Stack(layer->gate, shard.memory(), memory.data()),
                          Stack(layer->up, shard.memory(), memory.data()),
                          Stack(layer->down, shard.memory(), memory.data())});
  }
  return out;
}

attention::ShardWeights WeightsOf(const expert::Shard& shard) {
  return WeightsOf(shard, {reinterpret_cast<const std::byte*>(shard.memory()), shard.resident_bytes()});
}

absl::StatusOr<std::unique_ptr<attention::ExpertGroup>> MakeLocalExperts(
    const std::string& model_path, const std::vector<expert::ShardRequest>& shards,
    kernels::Precision precision, int threads) {
  auto group = std::make_unique<LocalExperts>(precision, threads);
  for (const expert::ShardRequest& s : shards) TANDEM_RETURN_IF_ERROR(group->Add(model_path, s));
  return group;
}

}  // namespace tandem::golden
