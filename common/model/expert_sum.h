// The sum over routed experts, in an order-free arithmetic: however the experts are shared out over threads,
// processes and hosts, the same bits come out.
//
// y[o] = sum over the token's experts e and the leaves b of the intermediate dimension (kernels::kLeaf
// columns)
//        of w[e] * p[e, b, o],   p = the leaf's part of the down projection, float32.
// Each term is formed exactly in double (24 + 24 bits), rounded to a multiple of 2^-30 and added in double.
// Sums of such multiples below 2^21 in size are exact, hence independent of their order. The total is rounded
// to float32 once. (Larger values lose only the order-independence; infinities and NaN pass through.)
#pragma once

#include <cstdint>

namespace tandem::model {

// 1.5 * 2^22: a double of this size has an ulp of 2^-30, so adding and subtracting it rounds to that grid.
inline constexpr double kGridShift = 6291456.0;

}  // namespace tandem::model
