// What the sampler's kernels need of a row of logits: its order, weights, and ways through it by one block.
#pragma once

#include <cstdint>

#include "services/attention_gpu/backend/cuda/reduce.cuh"
#include "services/attention_gpu/backend/cuda/sampling_kernels.h"

namespace tandem::attention::cuda {

using Key = SamplingKey;
constexpr Key kNoKey = ~Key{0};  // behind every token

__device__ __forceinline__ float Clean(float l) { return isnan(l) ? -INFINITY : l; }

// Falls as the logit grows; the same for both zeros.
__device__ __forceinline__ uint32_t OrderOf(float l) {
  const uint32_t bits = __float_as_uint(l == 0.0f ? 0.0f : l);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float LogitOfOrder(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order : ~order & 0x7fffffffu);
}
__device__ __forceinline__ Key KeyOf(float l, int token) {
  return Key{OrderOf(l)} << 32 | static_cast<uint32_t>(token);
}
__device__ __forceinline__ float LogitOf(Key k) { return LogitOfOrder(static_cast<uint32_t>(k >> 32)); }
__device__ __forceinline__ int TokenOf(Key k) { return static_cast<int>(static_cast<uint32_t>(k)); }

struct Smaller {
  template <typename T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <typename T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return b > a ? b : a;
  }
};
struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

// exp(-distance). Far from the best, float32 is as exact as 2^-44 of the best's weight needs, and much faster
// on cards with few double units.
constexpr double kFar = 17.0;

// The weight of each token as Sample() defines it, relative to that of the best logit (finite).
struct Weights {
  double best;
  double inverse_temperature;

  __device__ __forceinline__ double Exact(float l) const {
    return exp((static_cast<double>(l) - best) * inverse_temperature);
  }
  // In units of 2^-44, for sums in any order.
  __device__ __forceinline__ Key Fixed(float l) const {
    const double distance = (best - static_cast<double>(l)) * inverse_temperature;
    if (distance > kFar) return __float2ull_rn(expf(-static_cast<float>(distance)) * 0x1p44f);
    return __double2ull_rn(exp(-distance) * 0x1p44);
  }
  // Bins of falling logits.
  __device__ __forceinline__ int Bin(float l) const { return BinAt(static_cast<float>(best) - l); }
  static __device__ __forceinline__ int BinAt(float distance) {
    return static_cast<int>(fminf(distance * 32.0f, static_cast<float>(kSamplingBins - 1)));
  }
};

// Calls f(logit, token) for the tokens [begin, end) of a row, some by each of the block's threads, always the
// same ones by the same. `begin`: a multiple of 4.
// Each thread has kAhead loads of four logits under way.
template <int kThreads, int kAhead = 2, typename F>
__device__ __forceinline__ void ForEach(const float* row, int begin, int end, const F& f) {
  if (begin >= end) return;
  if ((reinterpret_cast<uintptr_t>(row) & 15) != 0) {
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) f(Clean(__ldcg(row + i)), i);
    return;
  }
  const float4* fours = reinterpret_cast<const float4*>(row);
  const int last = end >> 2;
  for (int i = (begin >> 2) + static_cast<int>(threadIdx.x); i < last; i += kAhead * kThreads) {
    float4 v[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u * kThreads < last) v[u] = __ldcg(fours + i + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = 4 * (i + u * kThreads);
      if (at >= 4 * last) break;
      f(Clean(v[u].x), at);
      f(Clean(v[u].y), at + 1);
      f(Clean(v[u].z), at + 2);
      f(Clean(v[u].w), at + 3);
    }
  }
  for (int i = 4 * last + static_cast<int>(threadIdx.x); i < end; i += kThreads) f(Clean(__ldcg(row + i)), i);
}

// Sums over the threads before, in a fixed order. All kThreads threads must call it.
template <typename T>
struct Prefix {
  T before;     // of the threads before this one
  T inclusive;  // and its own
};
template <int kThreads, typename T>
__device__ __forceinline__ Prefix<T> BlockPrefix(T v) {
  __shared__ T parts[kThreads / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  T sum = v;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const T other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum = other + sum;
  }
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    T part = lane < kThreads / 32 ? parts[lane] : T{};
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const T other = __shfl_up_sync(0xffffffffu, part, step);
      if (lane >= step) part = other + part;
    }
    if (lane < kThreads / 32) parts[lane] = part;
  }
  __syncthreads();
  const T offset = warp > 0 ? parts[warp - 1] : T{};
  T before = __shfl_up_sync(0xffffffffu, sum, 1);
  if (lane == 0) before = T{};
  __syncthreads();
  return {offset + before, offset + sum};
}

// Rising order of keys[0, n); room for the next power of two, 64 at least, by kThreads threads. Bitonic:
// stages over short distances stay within a warp.
template <int kThreads>
__device__ __noinline__ void SortKeys(Key* keys, int n) {
  int size = 64;
  while (size < n) size <<= 1;
  for (int i = n + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = kNoKey;
  __syncthreads();
  for (int run = 2; run <= size; run <<= 1) {
    for (int step = run >> 1; step > 0; step >>= 1) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int a = 2 * i - (i & (step - 1)), b = a + step;
        const Key x = keys[a], y = keys[b];
        if ((x > y) == ((a & run) == 0)) {
          keys[a] = y;
          keys[b] = x;
        }
      }
      // Pairs up to 32 apart lie within the 64 keys of one warp, as do those of the next stage if it is
      // shorter.
      if (step > 32 || (step == 1 && run >= 64)) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

}  // namespace tandem::attention::cuda
