// The int8 form of activations (kernels.h), made by whoever has the values.
#pragma once

#include <cfloat>
#include <cstdint>

namespace tandem::attention::cuda {

constexpr float kSmallest = 1e-30f;  // a block whose largest value is below counts as zero

// |v|, with infinity for what is not finite.
__device__ __forceinline__ float Magnitude(float v) {
  const float a = fabsf(v);
  return a <= FLT_MAX ? a : INFINITY;
}
__device__ __forceinline__ float Magnitude(const float4& v) {
  return fmaxf(fmaxf(Magnitude(v.x), Magnitude(v.y)), fmaxf(Magnitude(v.z), Magnitude(v.w)));
}

// Where the int8 form goes, and of how many rows it is.
struct Int8Form {
  int8_t* q;
  float2* meta;
  int64_t rows, cols, heads;
};

// Eight neighbouring lanes hold 32 values, four each: the int8 form of value group i (of 4) of a row. A block
// with a value that is not finite gets the scale NaN, so that every product with it is NaN.
__device__ __forceinline__ void QuantizeFour(const float4& v, int64_t row, int64_t i, const Int8Form& form) {
  const unsigned lanes = 0xffu << (threadIdx.x & 24);
  float largest = Magnitude(v);
#pragma unroll
  for (int step = 4; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, step));
  const bool finite = largest <= FLT_MAX;
  const float inverse = finite && largest > kSmallest ? 127.0f / largest : 0.0f;
  char4 out = make_char4(0, 0, 0, 0);
  if (finite) {
    out.x = static_cast<signed char>(__float2int_rn(v.x * inverse));
    out.y = static_cast<signed char>(__float2int_rn(v.y * inverse));
    out.z = static_cast<signed char>(__float2int_rn(v.z * inverse));
    out.w = static_cast<signed char>(__float2int_rn(v.w * inverse));
  }
  int sum = out.x + out.y + out.z + out.w;
#pragma unroll
  for (int step = 4; step > 0; step >>= 1) sum += __shfl_xor_sync(lanes, sum, step);
  const int64_t column = row / form.heads, head = row % form.heads, groups = (form.rows / form.heads + 7) / 8;
  const int64_t at = ((head * groups + column / 8) * (form.cols >> 5) + (i >> 3)) * 8 + column % 8;
  reinterpret_cast<char4*>(form.q)[at * 8 + (i & 7)] = out;
  if ((threadIdx.x & 7) == 0) {
    const float d = !finite ? NAN : inverse > 0.0f ? largest / 127.0f : 0.0f;
    form.meta[at] = make_float2(d, d * static_cast<float>(sum));
  }
}

// The same of 32 values that a warp's lanes have, one each. `at`: which 32 values of the form they are.
__device__ __forceinline__ void QuantizeOne(float v, int64_t at, int8_t* q, float2* meta) {
  float largest = Magnitude(v);
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  const bool finite = largest <= FLT_MAX;
  const float inverse = finite && largest > kSmallest ? 127.0f / largest : 0.0f;
  const int out = finite ? __float2int_rn(v * inverse) : 0;
  const int sum = __reduce_add_sync(0xffffffffu, out);
  q[at * 32 + (threadIdx.x & 31)] = static_cast<int8_t>(out);
  if ((threadIdx.x & 31) == 0) {
    const float d = !finite ? NAN : inverse > 0.0f ? largest / 127.0f : 0.0f;
    meta[at] = make_float2(d, d * static_cast<float>(sum));
  }
}

}  // namespace tandem::attention::cuda
