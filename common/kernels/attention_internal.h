// The units behind attention.h; plain data and function pointers only, like internal.h.
#pragma once

#include <stdint.h>

namespace tandem::kernels::internal {

struct FoldArgs {
  float* scores;  // [heads, n]: scores in, weights out
  int64_t heads;
  int64_t n;
  const float* keys;  // [n, width]
  int64_t width;
  int64_t values;
  float* max;  // [heads]
  float* sum;  // [heads]
  float* out;  // [heads, values]
};

using FoldFn = void (*)(const FoldArgs& args);
FoldFn ScalarFold();
FoldFn Avx2Fold();  // nullptr where this build has no such unit
FoldFn Avx512Fold();

}  // namespace tandem::kernels::internal
