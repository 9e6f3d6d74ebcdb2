#include "services/expert_cpu/weights_offer.h"

#include "tandem/v1/experts.pb.h"

namespace tandem::expert {
namespace {

void DescribeStack(const Shard& shard, const ExpertStack& stack, v1::WeightStack* out) {
  out->set_offset(static_cast<uint64_t>(stack.data - shard.memory()));
  out->set_expert_bytes(stack.expert_bytes);
  out->set_type(static_cast<uint32_t>(stack.type));
  out->set_row_bytes(static_cast<uint64_t>(stack.row_bytes));
}

}  // namespace

void DescribeWeights(const Shard& shard, v1::WeightsOffer* out) {
  const ShardPlan& plan = shard.plan();
  out->set_model_fingerprint(shard.fingerprint());
  out->set_expert_begin(static_cast<uint32_t>(plan.expert_begin));
  out->set_expert_end(static_cast<uint32_t>(plan.expert_end));
  out->set_row_begin(static_cast<uint32_t>(plan.row_begin));
  out->set_row_end(static_cast<uint32_t>(plan.row_end));
  for (const int64_t block : plan.layers) {
    const ShardLayer* layer = shard.FindLayer(block);
    if (layer == nullptr) continue;
    v1::LayerWeights* to = out->add_layers();
    to->set_layer(static_cast<uint32_t>(block));
    DescribeStack(shard, layer->gate, to->mutable_gate());
    DescribeStack(shard, layer->up, to->mutable_up());
    DescribeStack(shard, layer->down, to->mutable_down());
  }
}

}  // namespace tandem::expert
