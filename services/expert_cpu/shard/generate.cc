#include "services/expert_cpu/shard/generate.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"

namespace tandem::expert {

class ShardGenerator {
 public:
  static absl::StatusOr<std::unique_ptr<Shard>> Plan(const GenerateOptions& options, uint64_t* bytes) {
    std::unique_ptr<Shard> shard(new Shard());
    TANDEM_ASSIGN_OR_RETURN(shard->plan_, MakeShardPlan(options.config, options.request));
    const ShardPlan& plan = shard->plan_;
    if (plan.layers.size() != options.layers.size()) {
      return absl::InvalidArgumentError(absl::StrCat("types of ", options.layers.size(),
                                                     " layers are given, the model has ", plan.layers.size(),
                                                     " MoE layers"));
    }
    shard->model_name_ = "generated";
    shard->layers_.resize(static_cast<size_t>(options.config.num_hidden_layers));
    *bytes = 0;
    for (size_t i = 0; i < options.layers.size(); ++i) {
      const GeneratedLayer& types = options.layers[i];
      ShardLayer& layer = shard->layers_[static_cast<size_t>(plan.layers[i])];
      TANDEM_RETURN_IF_ERROR(
          Place(plan, types.gate, plan.rows(), plan.hidden_size, layer, layer.gate, bytes));
      TANDEM_RETURN_IF_ERROR(Place(plan, types.up, plan.rows(), plan.hidden_size, layer, layer.up, bytes));
      TANDEM_RETURN_IF_ERROR(
          Place(plan, types.down, plan.hidden_size, plan.rows(), layer, layer.down, bytes));
    }
    return shard;
  }

  static absl::Status Fill(const GenerateOptions& options, uint64_t bytes, Shard& shard,
                           threading::ThreadPool& pool) {
    TANDEM_ASSIGN_OR_RETURN(shard.arena_, Arena::Allocate(bytes, options.arena));
    uint64_t offset = 0, number = 0;
    const int64_t experts = shard.plan_.experts();
    for (const int64_t block : shard.plan_.layers) {
      ShardLayer& layer = shard.layers_[static_cast<size_t>(block)];
      for (ExpertStack* stack : {&layer.gate, &layer.up, &layer.down}) {
        uint8_t* base = shard.arena_.data() + offset;
        stack->data = base;
        offset += stack->expert_bytes * static_cast<uint64_t>(experts);
        pool.ParallelFor(experts, 1, [&](int64_t begin, int64_t end, int) {
          for (int64_t e = begin; e < end; ++e) {
            options.fill(stack->type, number + static_cast<uint64_t>(e),
                         {base + static_cast<uint64_t>(e) * stack->expert_bytes,
                          static_cast<size_t>(stack->rows * stack->row_bytes)});
          }
        });
        number += static_cast<uint64_t>(experts);
      }
    }
    return absl::OkStatus();
  }

 private:
  static absl::Status Place(const ShardPlan& plan, gguf::TensorType type, int64_t rows, int64_t cols,
                            ShardLayer& layer, ExpertStack& stack, uint64_t* bytes) {
    const gguf::TypeInfo info = gguf::GetTypeInfo(type);
    if (!info.supported || cols % info.block_size != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("rows of ", cols, " values do not fit the type ", std::string(info.name)));
    }
    stack.type = type;
    stack.rows = rows;
    stack.cols = cols;
    stack.row_bytes = gguf::RowBytes(type, cols);
    const auto own = static_cast<uint64_t>(rows) * static_cast<uint64_t>(stack.row_bytes);
    const auto padded = CheckedRoundUp<uint64_t>(own, 64);
    const auto all =
        padded ? CheckedMul<uint64_t>(*padded, static_cast<uint64_t>(plan.experts())) : std::nullopt;
    const auto end = all ? CheckedAdd<uint64_t>(*bytes, *all) : std::nullopt;
    if (!end) return absl::InvalidArgumentError("more bytes than can be counted");
    stack.expert_bytes = *padded;
    layer.expert_weight_bytes += own;
    *bytes = *end;
    return absl::OkStatus();
  }
};

absl::StatusOr<uint64_t> GeneratedBytes(const GenerateOptions& options) {
  uint64_t bytes = 0;
  TANDEM_RETURN_IF_ERROR(ShardGenerator::Plan(options, &bytes).status());
  return bytes;
}

absl::StatusOr<std::unique_ptr<Shard>> GenerateShard(const GenerateOptions& options,
                                                     threading::ThreadPool& pool) {
  uint64_t bytes = 0;
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<Shard> shard, ShardGenerator::Plan(options, &bytes));
  TANDEM_RETURN_IF_ERROR(ShardGenerator::Fill(options, bytes, *shard, pool));
  return shard;
}

}  // namespace tandem::expert
