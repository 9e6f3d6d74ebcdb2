// The inner part of attention over a paged latent cache: one page folded into running softmaxes.
// Bit-identical for every instruction set.
#pragma once

#include <cstdint>

namespace tandem::kernels {

// The state of some rows' running softmaxes. A row is one head of one token.
struct SoftmaxState {
  float* max;  // [rows], -inf before the first page
  float* sum;  // [rows], 0 before the first page
  float* out;  // [rows, values], 0 before the first page; divided by sum it is the attention's result
};

// For each row h, which sees the first n of the keys (n = seen[h], or all of them if `seen` is null):
//   s_p = Dot(query_h, key_p)
//   m' = max(m, s_0 ... s_n-1),  keep = exp(m - m'),  w_p = exp(s_p - m')
//   sum = fma(sum, keep, tree of the 16 lanes of w)
//   out_h = keep * out_h, then fma(w_p, key_p, .) in order of p, over the first `values` entries of key_p.
// A row that sees none is left alone. What a row gets depends on no other row.
// query: [rows, width]; keys: [n, width]; values <= width; scores: scratch of rows * n floats, n <= 4096.
// exp is the kernels' own polynomial (internal.h). Thread-safe for disjoint states.
// Fast from some dozen rows on: each key that comes from far away then serves all of them.
void AttendPage(const float* query, int64_t rows, int64_t width, const float* keys, int64_t n,
                const int32_t* seen, int64_t values, const SoftmaxState& state, float* scores);

}  // namespace tandem::kernels
