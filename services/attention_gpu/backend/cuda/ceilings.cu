#include "services/attention_gpu/backend/cuda/ceilings.h"

#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 2048;
constexpr int kTiles = 8;  // independent sums of a warp

__global__ void __launch_bounds__(kThreads) Read(const uint4* data, int64_t n, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __ldg(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < n; i += stride) {
    const uint4 v = __ldg(data + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678u) *sink = sum;  // never, as far as the compiler knows
}

__global__ void __launch_bounds__(kThreads) TensorWork(float* sink) {
  const uint32_t lane = threadIdx.x & 31;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i)
    a[i] = 0x2c002c00u + lane * 65537u * (i + 1);  // small float16 numbers, all different
  const uint32_t b0 = 0x2a002a00u + lane * 65537u, b1 = 0x2b002b00u + lane * 65537u;
  float sum[kTiles][4] = {};
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) MmaF16(sum[t], a, b0, b1);
  }
  float total = 0;
  for (int t = 0; t < kTiles; ++t) total += sum[t][0] + sum[t][1] + sum[t][2] + sum[t][3];
  if (total == 1.2345f) *sink = total;
}

}  // namespace

cudaError_t LaunchRead(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  Read<<<processors * 16, kThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

cudaError_t LaunchTensorWork(float* sink, double* flops, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int blocks = processors * 8;
  TensorWork<<<blocks, kThreads, 0, stream>>>(sink);
  *flops = 2.0 * 16 * 8 * 16 * kTiles * kRounds * (kThreads / 32) * blocks;
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
