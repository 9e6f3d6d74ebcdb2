// The inner part of attention over a paged latent cache: one page folded into a running softmax.
// Bit-identical for every instruction set.
#pragma once

#include <cstdint>

namespace tandem::kernels {

// The state of `heads` running softmaxes over the same keys.
struct SoftmaxState {
  float* max;  // [heads], -inf before the first page
  float* sum;  // [heads], 0 before the first page
  float* out;  // [heads, values], 0 before the first page; divided by sum it is the attention's result
};

// For each head h:  s_p = Dot(query_h, key_p)
//                   m' = max(m, s_0 ... s_n-1),  keep = exp(m - m'),  w_p = exp(s_p - m')
//                   sum = fma(sum, keep, tree of the 16 lanes of w),  out_h = keep * out_h, then fma(w_p,
//                   key_p, .) in order of p, over the first `values` entries of key_p.
// query: [heads, width]; keys: [n, width]; values <= width; scores: scratch of heads * n floats, n <= 4096.
// exp is the kernels' own polynomial (internal.h). Thread-safe for disjoint states.
void AttendPage(const float* query, int64_t heads, int64_t width, const float* keys, int64_t n,
                int64_t values, const SoftmaxState& state, float* scores);

}  // namespace tandem::kernels
