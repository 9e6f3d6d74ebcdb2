// The small kernels of a step: cache entries, queries, routing, the likeliest token.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/reduce.cuh"
#include "services/attention_gpu/backend/cuda/route.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kSmallest = 1e-30f;  // a latent whose largest value is below counts as zero

__device__ __forceinline__ uint16_t Bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
__device__ __forceinline__ uint16_t F16(float v) { return __half_as_ushort(__float2half_rn(v)); }

// Value i of a rotated vector: pairs (2j, 2j + 1) turn by the angle whose (cos, sin) stand at angles[j].
__device__ __forceinline__ float Rotated(const float* v, const float2* angles, int i) {
  const float2 cs = angles[i >> 1];
  return i & 1 ? v[i - 1] * cs.y + v[i] * cs.x : v[i] * cs.x - v[i + 1] * cs.y;
}

__device__ __forceinline__ void WriteEntry(const CacheWriteParams& p, int64_t t) {
  const int position = p.rows.position[t];
  if (position < 0) return;
  const int width = p.lora + p.rope;
  const float* kv = p.kv + t * width;
  float sum = 0;
  for (int i = threadIdx.x; i < p.lora; i += kThreads) sum = fmaf(kv[i], kv[i], sum);
  sum = BlockReduce<kThreads>(sum, [](float a, float b) { return a + b; });
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.lora) + p.eps);
  const int64_t page = p.rows.pages[p.rows.first_page[t] + position / p.rows.page_tokens];
  unsigned char* entry =
      static_cast<unsigned char*>(p.cache) +
      (page * p.rows.page_tokens + position % p.rows.page_tokens) * CacheRowBytes(p.type, p.lora, p.rope);
  const float2* angles = reinterpret_cast<const float2*>(p.rows.rope) + t * (p.rope / 2);
  auto latent = [&](int i) { return kv[i] * inverse * p.weight[i]; };
  if (p.type == kCacheBf16) {
    for (int i = threadIdx.x; i < width; i += kThreads) {
      reinterpret_cast<uint16_t*>(entry)[i] =
          Bf16(i < p.lora ? latent(i) : Rotated(kv + p.lora, angles, i - p.lora));
    }
    return;
  }
  // What is not finite makes the scale so: every product with the entry shows it.
  float largest = 0;
  for (int i = threadIdx.x; i < p.lora; i += kThreads) {
    const float size = fabsf(latent(i));
    largest = fmaxf(largest, size <= 3.402823466e38f ? size : INFINITY);
  }
  largest = BlockReduce<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  const bool finite = largest < INFINITY;
  const float to_bytes = finite && largest > kSmallest ? 127.0f / largest : 0.0f;
  for (int i = threadIdx.x; i < p.lora; i += kThreads) {
    entry[i] = static_cast<unsigned char>(128 + (finite ? __float2int_rn(latent(i) * to_bytes) : 0));
  }
  uint16_t* rotated = reinterpret_cast<uint16_t*>(entry + p.lora);
  for (int i = threadIdx.x; i < p.rope; i += kThreads) rotated[i] = F16(Rotated(kv + p.lora, angles, i));
  if (threadIdx.x == 0) {
    reinterpret_cast<float*>(rotated + p.rope)[0] = !finite ? NAN : to_bytes > 0 ? largest / 127.0f : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) CacheWrite(const CacheWriteParams p) {
  LetNextBegin();
  AwaitEarlier();
  WriteEntry(p, blockIdx.x);
}

// Blocks behind the last head write the row's cache entry, if there is one to write.
__global__ void __launch_bounds__(kThreads) Query(const QueryParams p, const CacheWriteParams write) {
  LetNextBegin();
  if (blockIdx.x == p.heads && threadIdx.x == 0) PrefetchToL2(write.weight, write.lora * 4);
  AwaitEarlier();
  const int64_t t = blockIdx.y, h = t * p.heads + blockIdx.x;
  if (blockIdx.x == p.heads) {
    WriteEntry(write, t);
    return;
  }
  if (p.rows.position[t] < 0) return;
  const int width = p.lora + p.rope;
  const float* absorbed = p.absorbed + h * p.lora;
  const float* rest = p.q + h * (p.nope + p.rope) + p.nope;
  const float2* angles = reinterpret_cast<const float2*>(p.rows.rope) + t * (p.rope / 2);
  uint16_t* out = p.out + h * width;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const float v = (i < p.lora ? absorbed[i] : Rotated(rest, angles, i - p.lora)) * p.scale;
    out[i] = p.type == kCacheBf16 ? Bf16(v) : F16(v);
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(32) Route(const RouteParams p) {
  LetNextBegin();
  RouteToken<kPerLane>(p, blockIdx.x, [](int, int32_t, float) {});
}

constexpr int kArgmaxThreads = 1024;

__global__ void __launch_bounds__(kArgmaxThreads) Argmax(const ArgmaxParams p) {
  const float* logits = p.logits + blockIdx.x * p.vocab;
  Best best{kOut, static_cast<int32_t>(p.vocab)};
  for (int64_t i = threadIdx.x; i < p.vocab; i += kArgmaxThreads) {
    const float l = logits[i];
    best = Better(best, {isnan(l) ? kOut : l, static_cast<int32_t>(i)});
  }
  __shared__ Best parts[kArgmaxThreads / 32];
  best = WarpBest(best);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = best;
  __syncthreads();
  if (threadIdx.x < 32) {
    best = WarpBest(parts[threadIdx.x]);
    if (threadIdx.x == 0) p.token[blockIdx.x] = best.index;
  }
}

}  // namespace

cudaError_t LaunchCacheWrite(const CacheWriteParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  return LaunchEarly(CacheWrite, static_cast<unsigned>(p.n), kThreads, 0, stream, p);
}

cudaError_t LaunchQuery(const QueryParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  return LaunchEarly(Query, dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.n)), kThreads, 0,
                     stream, p, CacheWriteParams());
}

cudaError_t LaunchQueryAndCacheWrite(const QueryParams& p, const CacheWriteParams& write,
                                     cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  if (write.n != p.n) return cudaErrorInvalidValue;
  return LaunchEarly(Query, dim3(static_cast<unsigned>(p.heads) + 1, static_cast<unsigned>(p.n)), kThreads, 0,
                     stream, p, write);
}

cudaError_t LaunchRoute(const RouteParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  if (!CanRoute(p)) return cudaErrorInvalidValue;
  return LaunchEarly(FewExperts(p) ? Route<kFewPerLane> : Route<kMostPerLane>, static_cast<unsigned>(p.n), 32,
                     0, stream, p);
}

cudaError_t LaunchArgmax(const ArgmaxParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  Argmax<<<static_cast<unsigned>(p.n), kArgmaxThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
