// The small kernels of a step: cache entries, queries, routing, the likeliest token.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/reduce.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostExperts = 1024;
constexpr float kOut = -INFINITY;
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

// The largest value and its index; the lower index of equal ones.
struct Best {
  float value;
  int32_t index;
};
__device__ __forceinline__ Best Better(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
__device__ __forceinline__ Best WarpBest(Best v) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    v = Better(v, {__shfl_xor_sync(0xffffffffu, v.value, step), __shfl_xor_sync(0xffffffffu, v.index, step)});
  }
  return v;
}

// The best of values[0, n) over a warp.
__device__ __forceinline__ Best BestOf(const float* values, int n, int lane) {
  Best best{kOut, n};
  for (int i = lane; i < n; i += 32) best = Better(best, {values[i], i});
  return WarpBest(best);
}

// Floats as integers of the same order, above 0; -infinity is the least of them.
__device__ __forceinline__ uint32_t Ordered(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One warp a token; lane l has kPerLane experts, from l * kPerLane on.
template <int kPerLane>
__global__ void __launch_bounds__(32) Route(const RouteParams p) {
  __shared__ float selection[32 * kPerLane], group[32 * kPerLane];
  LetNextBegin();
  const int lane = threadIdx.x, n = p.experts, first = lane * kPerLane;
  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    bias[i] = p.bias != nullptr && first + i < n ? __uint_as_float(Constant4(p.bias + first + i)) : 0.0f;
  }
  AwaitEarlier();
  const int64_t t = blockIdx.x;
  if (p.position != nullptr && p.position[t] < 0) {
    for (int k = lane; k < p.top_k; k += 32) {
      p.ids[t * p.top_k + k] = -1;
      p.weights[t * p.top_k + k] = 0;
    }
    return;
  }
  const float* logits = p.logits + t * n;
  float score[kPerLane], chosen_by[kPerLane], top = kOut, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) score[i] = first + i < n ? logits[first + i] : kOut;
  if (!p.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, score[i]);
    top = WarpReduce(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < n) sum += expf(score[i] - top);
    }
    sum = WarpReduce(sum, [](float a, float b) { return a + b; });
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    score[i] = p.sigmoid ? 1.0f / (1.0f + expf(-score[i])) : expf(score[i] - top) / sum;
    const float by = score[i] + bias[i];
    chosen_by[i] = isnan(by) ? -3.402823466e38f : by;  // loses, but is in range
  }

  const int size = n / p.groups, lanes = size / kPerLane;  // of a group
  if (p.groups > 1 && n == 32 * kPerLane && size == lanes * kPerLane && (lanes & (lanes - 1)) == 0) {
    // A group is that of whole neighbouring lanes: it stays in registers.
    float best = kOut, second = kOut;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      second = fmaxf(second, fminf(best, chosen_by[i]));
      best = fmaxf(best, chosen_by[i]);
    }
    for (int step = 1; step < lanes; step <<= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const float other_second = __shfl_xor_sync(0xffffffffu, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(best, other));
      best = fmaxf(best, other);
    }
    const float mine = p.sigmoid && size > 1 ? best + second : best;
    const int g = lane / lanes;
    int before = 0;  // groups that come before this one
    for (int k = 0; k < p.groups; ++k) {
      const float other = __shfl_sync(0xffffffffu, mine, k * lanes);
      if (other > mine || (other == mine && k < g)) ++before;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (before >= p.top_groups) chosen_by[i] = kOut;
    }
  } else if (p.groups > 1) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) selection[first + i] = chosen_by[i];
    __syncwarp();
    for (int g = lane; g < p.groups; g += 32) {
      float best = kOut, second = kOut;
#pragma unroll 8
      for (int i = 0; i < size; ++i) {
        const float s = selection[g * size + i];
        second = fmaxf(second, fminf(best, s));
        best = fmaxf(best, s);
      }
      group[g] = p.sigmoid && size > 1 ? best + second : best;
    }
    __syncwarp();
    // The groups that are kept are marked with NaN, which no later comparison takes for the best.
    for (int k = 0; k < p.top_groups; ++k) {
      const Best best = BestOf(group, p.groups, lane);
      __syncwarp();
      if (lane == 0 && best.index < p.groups) group[best.index] = NAN;
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int g = (first + i) / size;
      if (g < p.groups && !isnan(group[g])) chosen_by[i] = kOut;
    }
  }

  // The best of this lane, again after one of its experts was taken.
  uint32_t best = 0;
  int at = 0;
  auto look = [&] {
    best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t key = first + i < n ? Ordered(chosen_by[i]) : 0;
      if (key > best) best = key, at = i;
    }
  };
  look();
  float total = 0, kept = 0;  // the last weight that this lane has taken
  auto put = [&](int k, float w) {
    if (p.normalize) w /= fmaxf(total, 6.103515625e-5f);
    p.weights[t * p.top_k + k] = w * p.scale;
  };
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t largest = __reduce_max_sync(0xffffffffu, best);
    const int owner = __ffs(__ballot_sync(0xffffffffu, best == largest)) - 1;  // the lowest id of equal ones
    float mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i == at) mine = score[i];
    }
    const int e = __shfl_sync(0xffffffffu, first + at, owner);
    const float s = __shfl_sync(0xffffffffu, mine, owner);
    total += s;
    if ((k & 31) == lane) {
      p.ids[t * p.top_k + k] = e;
      if (k + 32 < p.top_k) p.weights[t * p.top_k + k] = s;
      kept = s;
    }
    if (lane == owner) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i == at) chosen_by[i] = kOut;
      }
      look();
    }
  }
  // Of its own weights, the last from a register.
  for (int k = lane; k < p.top_k; k += 32) put(k, k + 32 < p.top_k ? p.weights[t * p.top_k + k] : kept);
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
  if (p.experts < 1 || p.experts > kMostExperts || p.top_k < 1 || p.top_k > p.experts || p.groups < 1 ||
      p.groups > p.experts) {
    return cudaErrorInvalidValue;
  }
  return LaunchEarly(p.experts <= 256 ? Route<8> : Route<kMostExperts / 32>, static_cast<unsigned>(p.n), 32,
                     0, stream, p);
}

cudaError_t LaunchArgmax(const ArgmaxParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  Argmax<<<static_cast<unsigned>(p.n), kArgmaxThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
