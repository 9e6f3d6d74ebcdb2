// Reductions over a warp and over a block.
#pragma once

namespace tandem::attention::cuda {

template <typename T, typename Op>
__device__ __forceinline__ T WarpReduce(T v, const Op& op) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// All kThreads threads of the block must call it; all get the result. One at a time per call site.
template <int kThreads, typename T, typename Op>
__device__ __forceinline__ T BlockReduce(T v, const Op& op) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ T parts[kThreads / 32];
  v = WarpReduce(v, op);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
  __syncthreads();
  T total = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) total = op(total, parts[i]);
  __syncthreads();
  return total;
}

}  // namespace tandem::attention::cuda
