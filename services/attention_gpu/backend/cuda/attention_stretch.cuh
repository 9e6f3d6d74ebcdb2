// What both attention kernels (attention.cu, warpgroup_attention.cu) have in common: how a row's context is
// cut, and a softmax whose weights are relative to a score that need not be the largest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

constexpr float kLog2E = 1.4426950408889634f;
// The weights of a softmax are relative to a score that was the largest when it was chosen: another one is
// chosen only where one is larger by this. Sums are rarely rescaled then.
constexpr float kSlack = 4.0f;
struct Stretch {
  int begin, end;
};
__device__ __forceinline__ int StretchLength(int tokens, int splits) {
  return ((tokens + splits - 1) / splits + kAttentionTile - 1) / kAttentionTile * kAttentionTile;
}
// Part `split` of [0, tokens) cut into `splits`; may be empty.
__device__ __forceinline__ Stretch StretchOf(int tokens, int splits, int split) {
  const int length = StretchLength(tokens, splits), begin = min(split * length, tokens);
  return {begin, min(begin + length, tokens)};
}
// Of row t, part `split`; empty for padding and behind the row's last part.
__device__ __forceinline__ Stretch StretchOf(const AttentionParams& p, int64_t t, int split) {
  const int position = p.rows.position[t], splits = p.splits[t];
  return position < 0 || split >= splits ? Stretch{0, 0} : StretchOf(position + 1, splits, split);
}

__device__ __forceinline__ float Exp2(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

template <bool kHalf>
__device__ __forceinline__ uint32_t Pack(float a, float b) {
  if constexpr (kHalf) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
// The sum of two bfloat16.
__device__ __forceinline__ float SumOfBf16(uint32_t packed) {
  return __uint_as_float(packed << 16) + __uint_as_float(packed & 0xffff0000u);
}

}  // namespace tandem::attention::cuda
