// The weighted sum over the leaves of a down projection, as common/model/expert_sum.h defines it, for the
// layout that kernels::MatMulLeaves writes. Vectorized per instruction set; the same bits from each.
#pragma once

#include <cstdint>

#include "common/kernels/kernels.h"

namespace tandem::expert {

// sum[r] += over b of ToGrid(weight * parts[r * leaves + b]), r in [0, rows).
using AccumulateLeavesFn = void (*)(float weight, const float* parts, int64_t rows, int64_t leaves,
                                    double* sum);

// The fastest for `isa`.
AccumulateLeavesFn AccumulateLeavesFor(kernels::Isa isa);

}  // namespace tandem::expert
