// Absorbed MLA attention over the paged latent cache, for one stretch of positions a block.
//
// A block handles 64 heads of one token row (32 where the model has no more) and goes through the positions
// 32 at a time; a tile of cache rows is in shared memory once and serves as keys and as values. Four warps
// form a group for 32 heads. Scores: each warp takes all heads of the group and a quarter of the width, and
// keeps its part of the query in registers; the four parts are exchanged through shared memory, so that each
// warp has the scores of 8 heads, and with them their softmax. Values: each warp takes all heads of the group
// and a quarter of the latent.
//
// The two groups take turns, an interval between two barriers each: while one multiplies keys, the other has
// its softmax and its values. So the tensor cores have work throughout, and a tile is in use for three
// intervals.
//
// An int8 cache is read as bytes, which are made float16 on the way into the tensor cores; a token's scale is
// applied to its scores and its weights.
#include <algorithm>
#include <type_traits>

#include "services/attention_gpu/backend/cuda/attention_stretch.cuh"
#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/int8_form.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/warpgroup_attention.h"

namespace tandem::attention::cuda {
namespace {

constexpr int kTile = kAttentionTile;
constexpr int kWarps = 4;                // of a group
constexpr int kHeads = 32;               // of a group
constexpr int kSlotValues = 64;          // float4: 8 heads, 32 positions, from one warp to another
constexpr int kSlots = 3 * kWarps;       // of a group
constexpr int kSmallShared = 99 * 1024;  // what every GPU from compute capability 8.6 on gives a block

// Weights times an int8 cache's scale, as float16: brought away from its smallest numbers.
constexpr float kWeightUnit = 32.0f;

template <int kLoraOf, int kRopeOf, CacheType kCacheOf>
struct Shape {
  static constexpr int kLora = kLoraOf, kRope = kRopeOf, kWidth = kLora + kRope;
  static constexpr bool kInt8 = kCacheOf == kCacheInt8;
  static constexpr int kRowBytes = static_cast<int>(CacheRowBytes(kCacheOf, kLora, kRope));
  // An odd multiple of 16: the rows of a matrix load meet different banks.
  static constexpr int kPitch = kRowBytes / 16 % 2 == 1 ? kRowBytes : kRowBytes + 16;
  static constexpr int kTileBytes = kTile * kPitch;
  static constexpr int kSteps = kWidth / 16, kLatentSteps = kLora / 16;
  static constexpr int kQuarter = (kSteps + kWarps - 1) / kWarps;  // steps a warp takes of the scores
  static constexpr int kValueTiles = kLora / kWarps / 8;           // of 8 values, a warp
  static_assert(kRowBytes % 16 == 0 && kWidth % 16 == 0 && kLora % 128 == 0);

  __host__ __device__ static constexpr int ExchangeBytes(int groups) {
    return groups * kSlots * kSlotValues * 16;
  }
  static constexpr int Bytes(int groups, int buffers) {
    return buffers * kTileBytes + ExchangeBytes(groups) + 2 * groups * kHeads * 4;
  }
};

// Two of the four bytes of `word`, which are integers + 128, as float16.
template <int kFirst, int kSecond>
__device__ __forceinline__ uint32_t HalfOfBytes(uint32_t word) {
  // As the low bits of the float16 1024, a byte adds its value.
  const uint32_t bits = __byte_perm(word, 0x64646464u, 0x4040 | kSecond << 8 | kFirst);
  const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1152
  const __half2 v = __hsub2(*reinterpret_cast<const __half2*>(&bits), offset);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <bool kHalf>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    MmaF16(c, a, b0, b1);
  } else {
    MmaBf16(c, a, b0, b1);
  }
}

__device__ __forceinline__ void GroupBarrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kWarps * 32) : "memory");
}

template <class S, int kGroups, int kBuffers>
__global__ void __launch_bounds__(kGroups* kWarps * 32, 1) Attend(const AttentionParams p) {
  constexpr int kThreads = kGroups * kWarps * 32;
  constexpr bool kHalf = S::kInt8;
  constexpr int kExchangeBytes = S::ExchangeBytes(kGroups);
  extern __shared__ __align__(16) unsigned char shared[];

  LetNextBegin();
  const int64_t t = blockIdx.y;
  const int splits = p.splits[t], split = blockIdx.z;
  const Stretch stretch = StretchOf(p, t, split);
  const int tiles = (stretch.end - stretch.begin + kTile - 1) / kTile;
  if (tiles == 0) {
    AwaitEarlier();
    return;
  }
  // Cache rows on their way to the L2 cache: only that is allowed before what writes them has ended.
  const int32_t* pages = p.rows.pages + p.rows.first_page[t];
  if (threadIdx.x < min(tiles, kBuffers)) {
    const int first = stretch.begin + threadIdx.x * kTile;
    const int64_t at = static_cast<int64_t>(pages[first / p.rows.page_tokens]) * p.rows.page_tokens +
                       first % p.rows.page_tokens;
    PrefetchToL2(static_cast<const unsigned char*>(p.cache) + at * S::kRowBytes, kTile * S::kRowBytes);
  }
  AwaitEarlier();

  const int thread = threadIdx.x, lane = thread & 31, quarter = thread >> 5 & 3, group = thread >> 7;
  const int first_head = (static_cast<int>(blockIdx.x) * kGroups + group) * kHeads;
  float4* const exchange =
      reinterpret_cast<float4*>(shared + kBuffers * S::kTileBytes) + group * kSlots * kSlotValues;
  float* const keep =
      reinterpret_cast<float*>(shared + kBuffers * S::kTileBytes + kExchangeBytes) + group * kHeads;
  float* const total = keep + kGroups * kHeads;
  // A warp's weights, [4][8 heads][8 positions], take the place of the scores that only it reads.
  unsigned char* const weights = reinterpret_cast<unsigned char*>(exchange);
  constexpr int kWarpWeights = 3 * kSlotValues * 16;

  auto page_of = [&](int tile) {
    return tile < tiles ? pages[(stretch.begin + tile * kTile) / p.rows.page_tokens] : 0;
  };
  auto copy_tile = [&](int tile, int page) {
    constexpr int kPerRow = kThreads / kTile, kParts = S::kRowBytes / 16;
    const int row = thread / kPerRow, first = stretch.begin + tile * kTile;
    const bool valid = first + row < stretch.end;
    const int64_t at = static_cast<int64_t>(page) * p.rows.page_tokens + first % p.rows.page_tokens + row;
    const unsigned char* from = static_cast<const unsigned char*>(p.cache) + (valid ? at * S::kRowBytes : 0);
    const uint32_t to = SharedAddress(shared + tile % kBuffers * S::kTileBytes + row * S::kPitch);
#pragma unroll
    for (int i = 0; i < (kParts + kPerRow - 1) / kPerRow; ++i) {
      const int part = thread % kPerRow + i * kPerRow;
      if (kParts % kPerRow == 0 || part < kParts) CopyAsync16(to + part * 16, from + part * 16, valid);
    }
  };
#pragma unroll
  for (int i = 0; i < kBuffers - 1; ++i) {
    if (i < tiles) copy_tile(i, page_of(i));
    CommitCopies();
  }
  int next_page = page_of(kBuffers - 1);

  // The query's part of this warp, as matrix fragments.
  uint32_t query[2][S::kQuarter][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int s = 0; s < S::kQuarter; ++s) {
      const int step = quarter * S::kQuarter + s;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first_head + m * 16 + (lane >> 2) + (i & 1) * 8;
        // Of bytes, a lane has four that follow one another.
        const int at = step * 16 + (S::kInt8 && step < S::kLatentSteps ? (lane & 3) * 4 + (i >> 1) * 2
                                                                       : (lane & 3) * 2 + (i >> 1) * 8);
        query[m][s][i] =
            head < p.heads && step < S::kSteps
                ? *reinterpret_cast<const uint32_t*>(p.query + (t * p.heads + head) * S::kWidth + at)
                : 0;
      }
    }
  }

  float out[2][S::kValueTiles][4] = {};
  // Of head quarter * 8 + lane / 4: scores of the positions 8 n + 2 (lane % 4) and the next, the score that
  // weights are relative to, and this lane's part of the sum of weights.
  float score[8], reference = -INFINITY, sum = 0;

  auto multiply_keys = [&](int tile) {
    const uint32_t key = SharedAddress(shared + tile % kBuffers * S::kTileBytes);
    float part[2][4][4] = {};
    // Two-byte values: positions 8 n + (lane % 8) and 8 values of them for each matrix of a load.
    auto wide = [&](int s, int step, int at) {
      const uint32_t from =
          key + ((lane & 7) + (lane >> 4) * 8) * S::kPitch + (lane >> 3 & 1) * 16 + at + step * 32;
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        LoadMatrix4(b, from + n * 8 * S::kPitch);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Mma<kHalf>(part[m][n], query[m][s], b[0], b[1]);
          Mma<kHalf>(part[m][n + 1], query[m][s], b[2], b[3]);
        }
      }
    };
    if constexpr (S::kInt8) {
      const uint32_t from = key + lane * S::kPitch;
#pragma unroll
      for (int s = 0; s < S::kQuarter; ++s) {
        const int step = quarter * S::kQuarter + s;
        if (step >= S::kLatentSteps) break;
        uint32_t b[4];
        LoadMatrix4(b, from + step * 16);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t b0 = HalfOfBytes<0, 1>(b[n]), b1 = HalfOfBytes<2, 3>(b[n]);
          Mma<true>(part[0][n], query[0][s], b0, b1);
          Mma<true>(part[1][n], query[1][s], b0, b1);
        }
      }
      const unsigned char* scales = shared + tile % kBuffers * S::kTileBytes + S::kLora + 2 * S::kRope;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = n * 8 + (lane & 3) * 2;
        const float a = *reinterpret_cast<const float*>(scales + at * S::kPitch),
                    b = *reinterpret_cast<const float*>(scales + (at + 1) * S::kPitch);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          part[m][n][0] *= a, part[m][n][1] *= b;
          part[m][n][2] *= a, part[m][n][3] *= b;
        }
      }
#pragma unroll
      for (int s = 0; s < S::kQuarter; ++s) {
        const int step = quarter * S::kQuarter + s;
        if (step >= S::kLatentSteps && step < S::kSteps) wide(s, step, -S::kLora);
      }
    } else {
#pragma unroll
      for (int s = 0; s < S::kQuarter; ++s) {
        const int step = quarter * S::kQuarter + s;
        if (S::kSteps % kWarps == 0 || step < S::kSteps) wide(s, step, 0);
      }
    }
#pragma unroll
    for (int q = 0; q < kWarps; ++q) {  // 8 heads for warp q
      const int m = q >> 1, h = q & 1;
      if (q == quarter) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          score[2 * n] = part[m][n][2 * h];
          score[2 * n + 1] = part[m][n][2 * h + 1];
        }
      } else {
        float4* to = exchange + (q * 3 + quarter - (quarter > q)) * kSlotValues + lane;
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          to[n / 2 * 32] = make_float4(part[m][n][2 * h], part[m][n][2 * h + 1], part[m][n + 1][2 * h],
                                       part[m][n + 1][2 * h + 1]);
        }
      }
    }
  };

  auto weigh = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float4* from = exchange + (quarter * 3 + i) * kSlotValues + lane;
      const float4 a = from[0], b = from[32];
      score[0] += a.x, score[1] += a.y, score[2] += a.z, score[3] += a.w;
      score[4] += b.x, score[5] += b.y, score[6] += b.z, score[7] += b.w;
    }
    const int left = stretch.end - (stretch.begin + tile * kTile);
    if (left < kTile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i / 2 * 8 + (lane & 3) * 2 + i % 2 >= left) score[i] = -INFINITY;
      }
    }
    float largest = score[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) largest = fmaxf(largest, score[i]);
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    float kept = 1;
    if (largest > reference + kSlack) {
      kept = Exp2((reference - largest) * kLog2E);
      reference = largest;
    }
    // A head whose scores are all -infinity or NaN gets NaN for weights: broken input stays visible.
    const float offset = -reference * kLog2E;
    float added = 0;
    uint32_t packed[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float a = Exp2(fmaf(score[2 * n], kLog2E, offset)), b = Exp2(fmaf(score[2 * n + 1], kLog2E, offset));
      if constexpr (S::kInt8) {
        added += a + b;
        const unsigned char* scales = shared + tile % kBuffers * S::kTileBytes + S::kLora + 2 * S::kRope +
                                      (n * 8 + (lane & 3) * 2) * S::kPitch;
        a *= *reinterpret_cast<const float*>(scales) * kWeightUnit;
        b *= *reinterpret_cast<const float*>(scales + S::kPitch) * kWeightUnit;
        packed[n] = Pack<true>(a, b);
      } else {
        packed[n] = Pack<false>(a, b);
        added += SumOfBf16(packed[n]);
      }
    }
    sum = fmaf(sum, kept, added);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      *reinterpret_cast<uint32_t*>(weights + quarter * kWarpWeights + n * 128 + lane * 4) = packed[n];
    }
    if ((lane & 3) == 0) keep[quarter * 8 + (lane >> 2)] = kept;
  };

  auto multiply_values = [&](int tile) {
    float k[4];
    bool change = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k[i] = keep[i * 8 + (lane >> 2)];
      change |= k[i] != 1.0f;
    }
    if (__any_sync(0xffffffffu, change)) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) {
          out[m][n][0] *= k[2 * m], out[m][n][1] *= k[2 * m];
          out[m][n][2] *= k[2 * m + 1], out[m][n][3] *= k[2 * m + 1];
        }
      }
    }
    const uint32_t a_from =
        SharedAddress(weights) + (lane >> 3 & 1) * kWarpWeights + (lane >> 4) * 128 + (lane & 7) * 16;
    const uint32_t b_from = SharedAddress(shared + tile % kBuffers * S::kTileBytes) +
                            (lane & 15) * S::kPitch + (lane >> 4) * 16 +
                            quarter * S::kValueTiles * (S::kInt8 ? 8 : 16);
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      uint32_t a[2][4];
      LoadMatrix4(a[0], a_from + step * 256);
      LoadMatrix4(a[1], a_from + step * 256 + 2 * kWarpWeights);
      if constexpr (S::kInt8) {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; n += 4) {
          // 32 latents; tile n has those of even number of the first 16, n + 1 the odd ones.
          uint32_t b[4];
          LoadMatrix4Transposed(b, b_from + step * 16 * S::kPitch + n * 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t v0 = b[i & 2], v1 = b[(i & 2) + 1];
            const uint32_t b0 = i & 1 ? HalfOfBytes<1, 3>(v0) : HalfOfBytes<0, 2>(v0);
            const uint32_t b1 = i & 1 ? HalfOfBytes<1, 3>(v1) : HalfOfBytes<0, 2>(v1);
            Mma<true>(out[0][n + i], a[0], b0, b1);
            Mma<true>(out[1][n + i], a[1], b0, b1);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; n += 2) {
          uint32_t b[4];
          LoadMatrix4Transposed(b, b_from + step * 16 * S::kPitch + n * 16);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            Mma<false>(out[m][n], a[m], b[0], b[1]);
            Mma<false>(out[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  };

  // Group g multiplies the keys of tile i in interval 2 i + g, and has its softmax and values in the next.
  const int intervals = 2 * tiles + kGroups - 1;
  for (int interval = 0; interval < intervals; ++interval) {
    if ((interval & 1) == 0) WaitCopies<kBuffers - 2>();
    __syncthreads();
    if (interval & 1) {  // the tile before this one's is not read any more
      const int tile = interval / 2 + kBuffers - 1;
      if (tile < tiles) copy_tile(tile, next_page);
      CommitCopies();
      next_page = page_of(tile + 1);
    }
    const int mine = interval - group;
    if (mine < 0 || mine >= 2 * tiles) continue;
    if ((mine & 1) == 0) {
      multiply_keys(mine >> 1);
    } else {
      weigh(mine >> 1);
      GroupBarrier(group);
      multiply_values(mine >> 1);
    }
  }

  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const int64_t part_index = splits > 1 ? p.first_partial[t] + split : 0;
  if ((lane & 3) == 0) {
    const int row = quarter * 8 + (lane >> 2);
    total[row] = sum;
    if (splits > 1 && first_head + row < p.heads) {
      p.partial_state[part_index * p.heads + first_head + row] = make_float2(reference, sum);
    }
  }
  __syncthreads();
  float* const to = splits > 1 ? p.partial + part_index * p.heads * S::kLora : p.out + t * p.heads * S::kLora;
  constexpr float kUnit = S::kInt8 ? 1.0f / kWeightUnit : 1.0f;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + (lane >> 2);
      if (first_head + row >= p.heads) continue;
      const float scale = splits > 1 ? kUnit : kUnit / total[row];
      float* y = to + static_cast<int64_t>(first_head + row) * S::kLora + quarter * S::kValueTiles * 8;
      if constexpr (S::kInt8) {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; n += 2) {
          *reinterpret_cast<float4*>(y + n * 8 + (lane & 3) * 4) =
              make_float4(out[m][n][h * 2] * scale, out[m][n + 1][h * 2] * scale,
                          out[m][n][h * 2 + 1] * scale, out[m][n + 1][h * 2 + 1] * scale);
        }
      } else {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) {
          *reinterpret_cast<float2*>(y + n * 8 + (lane & 3) * 2) =
              make_float2(out[m][n][h * 2] * scale, out[m][n][h * 2 + 1] * scale);
        }
      }
    }
  }
}

constexpr int kCombineGroups = 4, kCombineThreads = 128;

// One head of one row: its parts, weighted by exp(their reference - the largest of all). Group g adds parts
// g, g + 4, ..., then the groups' sums are added.
__global__ void __launch_bounds__(kCombineGroups* kCombineThreads) Combine(const AttentionParams p) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t t = blockIdx.y, head = blockIdx.x;
  const int position = p.rows.position[t], splits = p.splits[t];
  if (position < 0) return;
  const int group = threadIdx.x / kCombineThreads, i = threadIdx.x % kCombineThreads;
  auto form = [&](const float4& v) {
    QuantizeFour(v, (p.form_first + t) * p.heads + head, i,
                 {p.q, p.q_meta, p.form_rows * p.heads, p.lora, p.heads});
  };
  if (splits <= 1) {
    if (p.q != nullptr && group == 0 && i * 4 < p.lora) {
      form(reinterpret_cast<const float4*>(p.out + (t * p.heads + head) * p.lora)[i]);
    }
    return;
  }
  __shared__ float factor[kMaxSplits];
  __shared__ float4 sums[kCombineGroups][kCombineThreads];
  const int length = StretchLength(position + 1, splits);
  const int parts = (position + length) / length;  // those behind are empty, and nobody wrote them
  const int64_t first = p.first_partial[t];
  if (threadIdx.x < 32) {
    float2 state[kMaxSplits / 32];
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int part = threadIdx.x + 32 * i;
      state[i] = make_float2(-INFINITY, 0);
      if (part < parts) state[i] = p.partial_state[(first + part) * p.heads + head];
      largest = fmaxf(largest, state[i].x);
    }
    for (int step = 16; step > 0; step >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    float weight[kMaxSplits / 32], sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const bool empty = static_cast<int>(threadIdx.x) + 32 * i >= parts;
      weight[i] = empty ? 0.0f : expf(state[i].x - largest);
      sum += weight[i] * state[i].y;
    }
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) factor[threadIdx.x + 32 * i] = weight[i] / sum;
  }
  __syncthreads();
  float4 sum = make_float4(0, 0, 0, 0);
  if (i * 4 < p.lora) {
    const float4* from = reinterpret_cast<const float4*>(p.partial + (first * p.heads + head) * p.lora) + i;
    const int64_t apart = static_cast<int64_t>(p.heads) * p.lora / 4;
#pragma unroll 4
    for (int s = group; s < parts; s += kCombineGroups) {
      const float4 v = from[s * apart];
      const float f = factor[s];
      sum.x = fmaf(f, v.x, sum.x), sum.y = fmaf(f, v.y, sum.y);
      sum.z = fmaf(f, v.z, sum.z), sum.w = fmaf(f, v.w, sum.w);
    }
  }
  sums[group][i] = sum;
  __syncthreads();
  if (group != 0 || i * 4 >= p.lora) return;
#pragma unroll
  for (int g = 1; g < kCombineGroups; ++g) {
    const float4 v = sums[g][i];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  if (p.q != nullptr) {
    form(sum);
  } else {
    reinterpret_cast<float4*>(p.out + (t * p.heads + head) * p.lora)[i] = sum;
  }
}

// Calls f(shape, groups, buffers) with the kernel's constants as types. `shared`: what a block may have.
template <typename Function>
cudaError_t ForShape(int32_t heads, int32_t lora, CacheType type, int shared, const Function& f) {
  auto groups = [&](auto shape) {
    using S = decltype(shape);
    auto buffers = [&](auto g) {
      // Three tiles where they fit: a copy has two intervals more.
      constexpr int kThree = S::Bytes(decltype(g)::value, 3);
      if constexpr (kThree > kSmallShared) {
        if (kThree > shared) return f(shape, g, std::integral_constant<int, 2>());
      }
      return f(shape, g, std::integral_constant<int, 3>());
    };
    if (heads > kHeads) return buffers(std::integral_constant<int, 2>());
    return buffers(std::integral_constant<int, 1>());
  };
  if (lora == 512) {
    if (type == kCacheInt8) return groups(Shape<512, 64, kCacheInt8>());
    return groups(Shape<512, 64, kCacheBf16>());
  }
  if (type == kCacheInt8) return groups(Shape<256, 32, kCacheInt8>());
  return groups(Shape<256, 32, kCacheBf16>());
}

cudaError_t SharedOfBlock(int* bytes) {
  int device = 0;
  const cudaError_t e = cudaGetDevice(&device);
  return e != cudaSuccess ? e
                          : cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

cudaError_t LaunchByWarps(const AttentionParams& p, cudaStream_t stream) {
  int shared = 0;
  cudaError_t e = SharedOfBlock(&shared);
  if (e != cudaSuccess) return e;
  if (p.shared_bytes > 0) shared = std::min(shared, p.shared_bytes);
  return ForShape(p.heads, p.lora, p.type, shared, [&](auto shape, auto groups, auto buffers) {
    using S = decltype(shape);
    constexpr int kGroups = decltype(groups)::value, kBuffers = decltype(buffers)::value;
    constexpr int kBlockHeads = kGroups * kHeads;
    const dim3 grid(static_cast<unsigned>((p.heads + kBlockHeads - 1) / kBlockHeads),
                    static_cast<unsigned>(p.n), static_cast<unsigned>(p.most_splits));
    return LaunchEarly(Attend<S, kGroups, kBuffers>, grid, kGroups * kWarps * 32, S::Bytes(kGroups, kBuffers),
                       stream, p);
  });
}

}  // namespace

int SplitsOf(int64_t tokens) {
  const auto of = [&](int64_t length) { return (tokens + length - 1) / length; };
  // Of longer rows twice the length: what parts write and what combines them costs several rows more than 128
  // positions do, and one row little (docs/cuda.md).
  const int64_t n = std::max(std::min<int64_t>(of(kSplitTokens), 16), of(2 * kSplitTokens));
  return static_cast<int>(std::clamp<int64_t>(n, 1, kMaxSplits));
}

bool AttentionSupports(int32_t lora, int32_t rope) {
  return (lora == 512 && rope == 64) || (lora == 256 && rope == 32);
}

cudaError_t PrepareAttention() {
  int most = 0;
  cudaError_t e = SharedOfBlock(&most);
  for (int32_t lora : {512, 256}) {
    for (CacheType type : {kCacheBf16, kCacheInt8}) {
      for (int32_t heads : {kHeads, 2 * kHeads}) {
        for (int shared : {most, kSmallShared}) {
          if (e != cudaSuccess) return e;
          e = ForShape(heads, lora, type, shared, [](auto shape, auto groups, auto buffers) {
            using S = decltype(shape);
            constexpr int kGroups = decltype(groups)::value, kBuffers = decltype(buffers)::value;
            return cudaFuncSetAttribute(Attend<S, kGroups, kBuffers>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        S::Bytes(kGroups, kBuffers));
          });
        }
      }
    }
  }
  return e != cudaSuccess ? e : PrepareWarpgroupAttention();
}

cudaError_t LaunchAttention(const AttentionParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  if (!AttentionSupports(p.lora, p.rope) || p.rows.page_tokens % kTile != 0 || p.most_splits > kMaxSplits) {
    return cudaErrorInvalidValue;
  }
  const bool by_warpgroups = p.shared_bytes == 0 && WarpgroupsAttend(p.type, p.heads, p.lora, p.rope);
  cudaError_t e = by_warpgroups ? LaunchWarpgroupAttention(p, stream) : LaunchByWarps(p, stream);
  if (e == cudaSuccess && (p.most_splits > 1 || p.q != nullptr)) {
    e = LaunchEarly(Combine, dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.n)),
                    kCombineGroups * kCombineThreads, 0, stream, p);
  }
  return e;
}

}  // namespace tandem::attention::cuda
