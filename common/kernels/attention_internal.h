// The units behind attention.h; plain data and function pointers only, like internal.h.
#pragma once

#include <stdint.h>

namespace tandem::kernels::internal {

struct PageArgs {
  const float* query;  // [rows, width]
  int64_t rows;
  int64_t width;
  const float* keys;  // [n, width]
  int64_t n;
  const int32_t* seen;  // [rows], in [0, n]; nullptr: n for all
  int64_t values;
  float* max;     // [rows]
  float* sum;     // [rows]
  float* out;     // [rows, values]
  float* scores;  // [rows, n], scratch
};

using PageFn = void (*)(const PageArgs& args);
PageFn ScalarPage();
PageFn Avx2Page();  // nullptr where this build has no such unit
PageFn Avx512Page();

}  // namespace tandem::kernels::internal
