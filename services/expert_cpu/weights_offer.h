// Where a shard's weights lie, as Experts.Weights tells it.
#pragma once

#include "services/expert_cpu/shard/shard.h"

namespace tandem::v1 {
class WeightsOffer;
}

namespace tandem::expert {

// Fills in everything but the socket and the token.
void DescribeWeights(const Shard& shard, v1::WeightsOffer* out);

}  // namespace tandem::expert
