// Absorbed MLA attention over the paged latent cache, for one stretch of positions a block.
//
// A block of 8 warps handles kHeads heads of one token row and goes through the positions 32 at a time; the
// tile of keys is in shared memory once and serves as keys and as values. Scores: each warp takes 16 heads
// and a quarter of the width (its part of the query stays in registers), the four parts are added through
// shared memory. Values: each warp takes all heads and an eighth of the latent. The next tile is copied
// meanwhile.
#include <cuda_bf16.h>

#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 32;  // of a block
constexpr int kTile = kAttentionTile;
constexpr int kScorePitch = 40;   // floats: pairs of a warp's rows meet different banks
constexpr int kWeightPitch = 40;  // bfloat16: 80 bytes, as above for matrix loads

template <int kLora, int kRope>
struct Shape {
  static constexpr int kWidth = kLora + kRope;
  static constexpr int kPitch = kWidth + 8;  // 16 bytes more than a multiple of 32: no bank conflicts
  static constexpr int kSteps = kWidth / 16;
  static constexpr int kQuarter = (kSteps + 3) / 4;  // steps a warp takes of the scores
  static constexpr int kValueTiles = kLora / 64;     // of 8 values, a warp
  static constexpr int kKeyBytes = 2 * kTile * kPitch * 2;
  static constexpr int kScoreBytes = 4 * kHeads * kScorePitch * 4;
  static constexpr int kWeightBytes = kHeads * kWeightPitch * 2;
  static constexpr int kBytes = kKeyBytes + kScoreBytes + kWeightBytes + 2 * kHeads * 4;
  static_assert(kWidth % 16 == 0 && kLora % 128 == 0 && kBytes <= 99 * 1024);
};

struct Stretch {
  int begin, end;
};
// Part `split` of [0, tokens) cut into `splits`; may be empty.
__device__ __forceinline__ Stretch StretchOf(int tokens, int splits, int split) {
  const int length = ((tokens + splits - 1) / splits + kTile - 1) / kTile * kTile;
  const int begin = min(split * length, tokens);
  return {begin, min(begin + length, tokens)};
}

template <int kLora, int kRope>
__global__ void __launch_bounds__(kThreads, 1) Attend(const AttentionParams p) {
  using S = Shape<kLora, kRope>;
  extern __shared__ __align__(16) unsigned char shared[];
  uint16_t* const keys = reinterpret_cast<uint16_t*>(shared);             // [2][kTile][kPitch]
  float* const scores = reinterpret_cast<float*>(shared + S::kKeyBytes);  // [4][kHeads][kScorePitch]
  uint16_t* const weights = reinterpret_cast<uint16_t*>(shared + S::kKeyBytes + S::kScoreBytes);
  float* const keep = reinterpret_cast<float*>(shared + S::kKeyBytes + S::kScoreBytes + S::kWeightBytes);
  float* const total = keep + kHeads;

  const int64_t t = blockIdx.y;
  const int splits = p.splits[t], split = blockIdx.z;
  if (split >= splits) return;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first_head = blockIdx.x * kHeads;
  const Stretch stretch = StretchOf(p.rows.position[t] + 1, splits, split);
  const int tiles = (stretch.end - stretch.begin + kTile - 1) / kTile;
  const int32_t* pages = p.rows.pages + p.rows.first_page[t];

  auto page_of = [&](int tile) { return pages[(stretch.begin + tile * kTile) / p.rows.page_tokens]; };
  auto copy_keys = [&](int tile, int page) {
    const int first = stretch.begin + tile * kTile;
    const uint16_t* from =
        p.cache + (static_cast<int64_t>(page) * p.rows.page_tokens + first % p.rows.page_tokens) * S::kWidth;
    uint16_t* to = keys + (tile & 1) * kTile * S::kPitch;
    constexpr int kParts = S::kWidth / 8;
    for (int i = thread; i < kTile * kParts; i += kThreads) {
      const int row = i / kParts, part = i % kParts;
      const bool valid = first + row < stretch.end;
      CopyAsync16(SharedAddress(to + row * S::kPitch + part * 8),
                  from + (valid ? row * S::kWidth + part * 8 : 0), valid);
    }
    CommitCopies();
  };

  // The query's part of this warp, as matrix fragments.
  const int query_head = first_head + (warp & 1) * 16, quarter = warp >> 1;
  uint32_t query[S::kQuarter][4];
#pragma unroll
  for (int s = 0; s < S::kQuarter; ++s) {
    const int step = quarter * S::kQuarter + s;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = query_head + (lane >> 2) + (i & 1) * 8, at = step * 16 + (lane & 3) * 2 + (i >> 1) * 8;
      query[s][i] = head < p.heads && step < S::kSteps
                        ? *reinterpret_cast<const uint32_t*>(p.query + (t * p.heads + head) * S::kWidth + at)
                        : 0;
    }
  }

  float out[2][S::kValueTiles][4] = {};
  // Eight lanes share a head's softmax: head thread / 8, keys 4 (thread % 8) and the next three.
  float running_max = -INFINITY, running_sum = 0;
  const int soft_head = thread >> 3, soft_key = (thread & 7) * 4;

  int page = 0;
  if (tiles > 0) copy_keys(0, page_of(0));
  if (tiles > 1) page = page_of(1);
  for (int tile = 0; tile < tiles; ++tile) {
    WaitCopies<0>();
    __syncthreads();  // the tile is complete, and nobody reads the one before any more
    if (tile + 1 < tiles) copy_keys(tile + 1, page);
    if (tile + 2 < tiles) page = page_of(tile + 2);
    const uint16_t* key = keys + (tile & 1) * kTile * S::kPitch;

    float part[4][4] = {};
#pragma unroll
    for (int s = 0; s < S::kQuarter; ++s) {
      const int step = quarter * S::kQuarter + s;
      if (step < S::kSteps) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t b[4];
          LoadMatrix4(b, SharedAddress(key + (n * 16 + (lane & 7) + (lane >> 4) * 8) * S::kPitch + step * 16 +
                                       (lane >> 3 & 1) * 8));
          MmaBf16(part[2 * n], query[s], b[0], b[1]);
          MmaBf16(part[2 * n + 1], query[s], b[2], b[3]);
        }
      }
    }
    {
      float* to = scores + (quarter * kHeads + (warp & 1) * 16 + (lane >> 2)) * kScorePitch + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) = make_float2(part[n][0], part[n][1]);
        *reinterpret_cast<float2*>(to + 8 * kScorePitch + n * 8) = make_float2(part[n][2], part[n][3]);
      }
    }
    __syncthreads();

    {
      float s[4] = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float4 v =
            *reinterpret_cast<const float4*>(scores + (q * kHeads + soft_head) * kScorePitch + soft_key);
        s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
      }
      const int left = stretch.end - (stretch.begin + tile * kTile + soft_key);
      float largest = running_max;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= left) s[i] = -INFINITY;
        largest = fmaxf(largest, s[i]);
      }
#pragma unroll
      for (int step = 4; step > 0; step >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
      // A head whose scores are all -infinity or NaN keeps its weights NaN: broken input stays visible.
      float sum = 0;
      uint32_t packed[2];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const __nv_bfloat162 w = __floats2bfloat162_rn(__expf(s[i] - largest), __expf(s[i + 1] - largest));
        packed[i / 2] = *reinterpret_cast<const uint32_t*>(&w);
        sum += __low2float(w) + __high2float(w);
      }
#pragma unroll
      for (int step = 4; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float kept = __expf(running_max - largest);
      running_sum = running_sum * kept + sum;
      running_max = largest;
      *reinterpret_cast<uint2*>(weights + soft_head * kWeightPitch + soft_key) =
          make_uint2(packed[0], packed[1]);
      if ((thread & 7) == 0) keep[soft_head] = kept;
    }
    __syncthreads();

#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float k0 = keep[m * 16 + (lane >> 2)], k1 = keep[m * 16 + (lane >> 2) + 8];
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) {
        out[m][n][0] *= k0, out[m][n][1] *= k0;
        out[m][n][2] *= k1, out[m][n][3] *= k1;
      }
    }
#pragma unroll
    for (int k = 0; k < kTile; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        LoadMatrix4(a[m],
                    SharedAddress(weights + (m * 16 + (lane & 15)) * kWeightPitch + k + (lane >> 4) * 8));
      }
#pragma unroll
      for (int n = 0; n < S::kValueTiles; n += 2) {
        uint32_t b[4];
        LoadMatrix4Transposed(b, SharedAddress(key + (k + (lane & 15)) * S::kPitch +
                                               (warp * S::kValueTiles + n + (lane >> 4)) * 8));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          MmaBf16(out[m][n], a[m], b[0], b[1]);
          MmaBf16(out[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  if ((thread & 7) == 0) total[soft_head] = running_sum;
  const int64_t part_index = splits > 1 ? p.first_partial[t] + split : 0;
  if (splits > 1 && (thread & 7) == 0 && first_head + soft_head < p.heads) {
    p.partial_state[part_index * p.heads + first_head + soft_head] = make_float2(running_max, running_sum);
  }
  __syncthreads();
  float* const to = splits > 1 ? p.partial + part_index * p.heads * kLora : p.out + t * p.heads * kLora;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + (lane >> 2);
      if (first_head + row >= p.heads) continue;
      const float scale = splits > 1 ? 1.0f : 1.0f / total[row];
      float* y =
          to + static_cast<int64_t>(first_head + row) * kLora + warp * S::kValueTiles * 8 + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) {
        *reinterpret_cast<float2*>(y + n * 8) =
            make_float2(out[m][n][half * 2] * scale, out[m][n][half * 2 + 1] * scale);
      }
    }
  }
}

constexpr int kCombineThreads = 128;

// One head of one row: its parts, weighted by exp(their largest score - the largest of all), in order.
__global__ void __launch_bounds__(kCombineThreads) Combine(const AttentionParams p) {
  const int64_t t = blockIdx.y, head = blockIdx.x;
  const int splits = p.splits[t];
  if (splits <= 1) return;
  __shared__ float factor[kMaxSplits];
  const int64_t first = p.first_partial[t];
  if (threadIdx.x < 32) {
    float2 state = make_float2(-INFINITY, 0);
    if (static_cast<int>(threadIdx.x) < splits)
      state = p.partial_state[(first + threadIdx.x) * p.heads + head];
    // A part without positions has the sum 0; NaN must not hide behind that.
    const bool empty = state.y == 0;
    float largest = empty ? -INFINITY : state.x;
    for (int step = 16; step > 0; step >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    const float weight = empty ? 0.0f : expf(state.x - largest);
    float sum = weight * state.y;
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    factor[threadIdx.x] = empty ? 0.0f : weight / sum;
  }
  __syncthreads();
  for (int i = threadIdx.x * 4; i < p.lora; i += kCombineThreads * 4) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int s = 0; s < splits; ++s) {
      if (factor[s] == 0.0f) continue;
      const float4 v =
          *reinterpret_cast<const float4*>(p.partial + ((first + s) * p.heads + head) * p.lora + i);
      sum.x = fmaf(factor[s], v.x, sum.x), sum.y = fmaf(factor[s], v.y, sum.y);
      sum.z = fmaf(factor[s], v.z, sum.z), sum.w = fmaf(factor[s], v.w, sum.w);
    }
    *reinterpret_cast<float4*>(p.out + (t * p.heads + head) * p.lora + i) = sum;
  }
}

template <int kLora, int kRope>
cudaError_t Prepare() {
  return cudaFuncSetAttribute(Attend<kLora, kRope>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Shape<kLora, kRope>::kBytes);
}

template <int kLora, int kRope>
void Launch(const AttentionParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.heads + kHeads - 1) / kHeads), static_cast<unsigned>(p.n),
                  static_cast<unsigned>(p.most_splits));
  Attend<kLora, kRope><<<grid, kThreads, Shape<kLora, kRope>::kBytes, stream>>>(p);
}

}  // namespace

bool AttentionSupports(int32_t lora, int32_t rope) {
  return (lora == 512 && rope == 64) || (lora == 256 && rope == 32);
}

cudaError_t PrepareAttention() {
  const cudaError_t e = Prepare<512, 64>();
  return e != cudaSuccess ? e : Prepare<256, 32>();
}

cudaError_t LaunchAttention(const AttentionParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  if (!AttentionSupports(p.lora, p.rope) || p.rows.page_tokens % kTile != 0 || p.most_splits > kMaxSplits) {
    return cudaErrorInvalidValue;
  }
  if (p.lora == 512) {
    Launch<512, 64>(p, stream);
  } else {
    Launch<256, 32>(p, stream);
  }
  cudaError_t e = cudaGetLastError();
  if (e == cudaSuccess && p.most_splits > 1) {
    Combine<<<dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.n)), kCombineThreads, 0, stream>>>(
        p);
    e = cudaGetLastError();
  }
  return e;
}

}  // namespace tandem::attention::cuda
