// A block has 128 rows of one head in shared memory and goes through the positions 64 at a time. Each of its
// four warps has 32 rows: their scores, softmax and sums stay in its registers, and a matrix of keys or
// values that it loads from shared memory meets two tiles of rows. The values of a tile are on their way
// while its keys are multiplied, the keys of the next while the values are. 95 KB of shared memory for R1's
// shape: one block where a processor has 100 KB, two where it has 200.
#include "services/attention_gpu/backend/cuda/prefill_attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/reduce.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kPrefillTile, kRows = kPrefillRows;
constexpr int kLatentWarps = 8;  // of a block, a position each
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSmallest = 1e-30f;  // what is below counts as zero

__device__ __forceinline__ float Exp2(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

__device__ __forceinline__ uint32_t PackHalf(float a, float b) {
  const __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The power of two above `largest`; 1 where that is nothing or not finite.
__device__ __forceinline__ float PowerAbove(float largest) {
  int exponent = 0;
  if (largest > kSmallest && largest < INFINITY) frexpf(largest, &exponent);
  return ldexpf(1.0f, exponent);
}

__device__ __forceinline__ const uint8_t* EntryOf(const SequenceCache& c, int64_t position) {
  const int64_t page = c.pages[*c.first_page + position / c.page_tokens];
  return static_cast<const uint8_t*>(c.cache) +
         (page * c.page_tokens + position % c.page_tokens) * CacheRowBytes(c.type, c.lora, c.rope);
}

// Values i to i + 7 of an entry: the latent, then the rotated key.
__device__ __forceinline__ void ReadEight(const SequenceCache& c, const uint8_t* entry, int i,
                                          float (&v)[8]) {
  if (c.type == kCacheInt8 && i < c.lora) {
    const float scale = *reinterpret_cast<const float*>(entry + c.lora + 2 * c.rope);
    const uint2 bytes = *reinterpret_cast<const uint2*>(entry + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      v[k] = static_cast<float>(static_cast<int>(ByteOf(k < 4 ? bytes.x : bytes.y, k & 3)) - 128) * scale;
    }
    return;
  }
  const uint4 pairs =
      *reinterpret_cast<const uint4*>(entry + (c.type == kCacheInt8 ? 2 * i - c.lora : 2 * i));
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (c.type == kCacheInt8) {
      v[2 * k] = HalfBits(words[k] & 0xffff);
      v[2 * k + 1] = HalfBits(words[k] >> 16);
    } else {
      v[2 * k] = __uint_as_float(words[k] << 16);
      v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
  }
}

// A warp a position.
__global__ void __launch_bounds__(kLatentWarps * 32)
    LatentUnit(const SequenceCache c, int64_t positions, float* unit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kLatentWarps + warp;
  float largest = 0;
  if (t < positions) {
    const uint8_t* entry = EntryOf(c, t);
    for (int i = lane * 8; i < c.lora + c.rope; i += 256) {
      float v[8];
      ReadEight(c, entry, i, v);
#pragma unroll
      for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(v[k]) < INFINITY ? fabsf(v[k]) : 0.0f);
    }
  }
  largest = BlockReduce<kLatentWarps * 32>(largest, [](float a, float b) { return fmaxf(a, b); });
  // Positive numbers have the order of their bits.
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(unit), __float_as_uint(PowerAbove(largest)));
}

__global__ void __launch_bounds__(kLatentWarps * 32)
    GatherLatents(const SequenceCache c, int64_t first, int64_t count, const float* unit, uint16_t* latents,
                  uint16_t* rotated) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kLatentWarps + warp;
  if (t >= count) return;
  const uint8_t* entry = EntryOf(c, first + t);
  const float inverse = 1.0f / *unit;  // a power of two
  for (int i = lane * 8; i < c.lora + c.rope; i += 256) {
    float v[8];
    ReadEight(c, entry, i, v);
    uint32_t out[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = PackHalf(v[2 * k] * inverse, v[2 * k + 1] * inverse);
    *reinterpret_cast<uint4*>(i < c.lora ? latents + t * c.lora + i : rotated + t * c.rope + i - c.lora) =
        make_uint4(out[0], out[1], out[2], out[3]);
  }
}

struct HalfRow {
  __device__ __forceinline__ void Put(int i, float a, float b) {
    values[i] = __float2half_rn(a), values[i + 1] = __float2half_rn(b);
  }
  __half values[32];
};

// A block has 32 rows of a head's matrix and 32 of their values: (rows / 32, values / 32, heads).
__global__ void __launch_bounds__(32) TransposeKeys(const DeviceMatrix w, int64_t first_head, __half* out) {
  __shared__ __half tile[32][34];
  const int lane = threadIdx.x, chunk = blockIdx.y;
  const int64_t head = blockIdx.z, row = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const uint8_t* from = w.data + ((first_head + head) * w.rows + row) * w.row_bytes;
  HalfRow values;
  if (w.type == kF32) {
    const float* f = reinterpret_cast<const float*>(from) + chunk * 32;
#pragma unroll
    for (int i = 0; i < 32; i += 2) values.Put(i, f[i], f[i + 1]);
  } else {
    Raw raw;
    LoadRaw(w.type, from, static_cast<int>(w.cols), chunk, raw);
    DecodeRaw(w.type, raw, chunk, values);
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) tile[i][lane] = values.values[i];
  __syncwarp();
  __half* to = out + (head * w.cols + chunk * 32) * w.rows + static_cast<int64_t>(blockIdx.x) * 32 + lane;
#pragma unroll
  for (int i = 0; i < 32; ++i) to[i * w.rows] = tile[i][lane];
}

// A warp a query of a head.
__global__ void __launch_bounds__(kThreads) PrefillQuery(const PrefillQueryParams p) {
  constexpr int kPairs = 4;  // of a lane
  const int lane = threadIdx.x & 31, width = p.nope + p.rope_dim;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (i >= p.n * p.heads) return;
  const float2* angles = reinterpret_cast<const float2*>(p.rope) + i / p.heads * (p.rope_dim / 2);
  const float* q = p.q + i * width;
  float2 v[kPairs];
  float largest = 0;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int at = 2 * lane + 64 * k;
    if (at >= width) break;
    v[k] = *reinterpret_cast<const float2*>(q + at);
    if (at >= p.nope) {
      const float2 cs = angles[(at - p.nope) / 2];
      v[k] = make_float2(v[k].x * cs.x - v[k].y * cs.y, v[k].x * cs.y + v[k].y * cs.x);
    }
    largest = fmaxf(largest, fmaxf(fabsf(v[k].x), fabsf(v[k].y)));
  }
  const float unit = PowerAbove(WarpReduce(largest, [](float a, float b) { return fmaxf(a, b); }));
  const float inverse = 1.0f / unit;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int at = 2 * lane + 64 * k;
    if (at >= width) break;
    *reinterpret_cast<uint32_t*>(p.out + i * width + at) = PackHalf(v[k].x * inverse, v[k].y * inverse);
  }
  if (lane == 0) p.out_scale[i] = unit * p.scale * kLog2E;
}

template <int kNopeOf, int kRopeOf, int kVOf>
struct Shape {
  static constexpr int kNope = kNopeOf, kRope = kRopeOf, kV = kVOf, kWidth = kNope + kRope;
  static constexpr int kRowValues = kNope + kV;  // of a position in `expanded`
  // Odd multiples of 16 bytes: the rows of a matrix load meet different banks.
  static constexpr int kKeyPitch = 2 * kWidth + 16, kValuePitch = 2 * kV + 16;
  static constexpr int kKeyAt = kRows * kKeyPitch;
  static constexpr int kValueAt = kKeyAt + kTile * kKeyPitch;
  static constexpr int kBytes = kValueAt + kTile * kValuePitch;
  static constexpr int kValueTiles = kV / 8;
  static_assert(kNope % 32 == 0 && kRope % 32 == 0 && kV % 32 == 0 && kBytes <= 99 * 1024);
  static_assert(kKeyPitch / 16 % 2 == 1 && kValuePitch / 16 % 2 == 1);
};

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    PrefillAttend(const __grid_constant__ PrefillAttentionParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int64_t head = blockIdx.x;
  // The last rows see the most: they begin first.
  const int first_row = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kRows;
  const int rows = static_cast<int>(p.n), last_row = rows - 1;
  // Positions relative to p.first; a row sees those up to its own.
  const int position = static_cast<int>(p.first_position - p.first), count = static_cast<int>(p.count);
  const int seen = min(count, position + min(first_row + kRows - 1, last_row) + 1);
  const int tiles = seen > 0 ? (seen + kTile - 1) / kTile : 0;
  if (tiles == 0 && !p.ends) return;  // the carried sums stay as they are
  const uint32_t at = SharedAddress(shared);

  // Four threads a row, sixteen bytes a copy; what is not there is zero.
  const int copy_row = thread >> 2, copy_part = thread & 3;
  constexpr int kCopyRows = kThreads / 4;
  auto copy_query = [&] {
#pragma unroll
    for (int pass = 0; pass < kRows / kCopyRows; ++pass) {
      const int row = copy_row + pass * kCopyRows;
      const bool valid = first_row + row < rows;
      const uint16_t* from =
          p.query + (int64_t{min(first_row + row, last_row)} * p.heads + head) * S::kWidth + copy_part * 8;
      const uint32_t to = at + row * S::kKeyPitch + copy_part * 16;
#pragma unroll
      for (int i = 0; i < S::kWidth / 32; ++i) CopyAsync16(to + i * 64, from + i * 32, valid);
    }
  };
  auto copy_keys = [&](int tile) {
    const int begin = tile * kTile;
#pragma unroll
    for (int pass = 0; pass < kTile / kCopyRows; ++pass) {
      const int row = copy_row + pass * kCopyRows;
      const bool valid = begin + row < count;
      const int64_t t = valid ? begin + row : 0;
      const uint16_t* key = p.expanded + (t * p.heads + head) * S::kRowValues + copy_part * 8;
      const uint16_t* rotated = p.rotated + t * S::kRope + copy_part * 8;
      const uint32_t to = at + S::kKeyAt + row * S::kKeyPitch + copy_part * 16;
#pragma unroll
      for (int i = 0; i < S::kNope / 32; ++i) CopyAsync16(to + i * 64, key + i * 32, valid);
#pragma unroll
      for (int i = 0; i < S::kRope / 32; ++i) {
        CopyAsync16(to + 2 * S::kNope + i * 64, rotated + i * 32, valid);
      }
    }
    CommitCopies();
  };
  auto copy_values = [&](int tile) {
    const int begin = tile * kTile;
#pragma unroll
    for (int pass = 0; pass < kTile / kCopyRows; ++pass) {
      const int row = copy_row + pass * kCopyRows;
      const bool valid = begin + row < count;
      const int64_t t = valid ? begin + row : 0;
      const uint16_t* value = p.expanded + (t * p.heads + head) * S::kRowValues + S::kNope + copy_part * 8;
      const uint32_t to = at + S::kValueAt + row * S::kValuePitch + copy_part * 16;
#pragma unroll
      for (int i = 0; i < S::kV / 32; ++i) CopyAsync16(to + i * 64, value + i * 32, valid);
    }
    CommitCopies();
  };
  if (tiles > 0) {
    copy_query();
    copy_keys(0);
  }

  // Row 16 m + 8 h + lane / 4 of the warp's 32: score and largest one so far, sum of weights, and what makes
  // a product with a key an exponent. Rows behind the last see what it sees; nothing is stored for them.
  const int warp_row = first_row + warp * 32;
  const float unit = *p.unit;
  int own[2][2];
  float factor[2][2], largest[2][2], sum[2][2];
  float out[2][S::kValueTiles][4] = {};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(warp_row + m * 16 + h * 8 + (lane >> 2), last_row);
      own[m][h] = position + row;
      factor[m][h] = __ldg(p.query_scale + int64_t{row} * p.heads + head) * unit;
      largest[m][h] = -INFINITY;
      sum[m][h] = 0;
      if (!p.begins) {
        const float2 state = p.carry_state[int64_t{row} * p.heads + head];
        largest[m][h] = state.x;
        sum[m][h] = (lane & 3) == 0 ? state.y : 0.0f;  // the lanes' parts are added at the end
        const float* from = p.carry + (int64_t{row} * p.heads + head) * S::kV + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) {
          const float2 v = *reinterpret_cast<const float2*>(from + n * 8);
          out[m][n][2 * h] = v.x, out[m][n][2 * h + 1] = v.y;
        }
      }
    }
  }
  const int warp_first = position + min(warp_row, last_row),
            warp_last = position + min(warp_row + 31, last_row);

  const uint32_t query_from = at + (warp * 32 + (lane & 15)) * S::kKeyPitch + (lane >> 4) * 16;
  const uint32_t key_from =
      at + S::kKeyAt + ((lane & 7) + (lane >> 4) * 8) * S::kKeyPitch + (lane >> 3 & 1) * 16;
  const uint32_t value_from = at + S::kValueAt + (lane & 15) * S::kValuePitch + (lane >> 4) * 16;

  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = tile * kTile;
    const bool mine = begin <= warp_last;  // or no row of this warp sees any of it
    WaitCopies<0>();
    __syncthreads();  // the keys are there, and nobody reads the values before any more
    copy_values(tile);
    float score[2][kTile / 8][4] = {};
    if (mine) {
      // A load is under way while the one before is multiplied.
      constexpr int kSteps = S::kWidth / 16, kPairs = kTile / 16;
      uint32_t a[2][2][4], b[2][4];
      auto load_query = [&](int step) {
        LoadMatrix4(a[step & 1][0], query_from + step * 32);
        LoadMatrix4(a[step & 1][1], query_from + 16 * S::kKeyPitch + step * 32);
      };
      auto load_keys = [&](int i) {
        LoadMatrix4(b[i & 1], key_from + i % kPairs * 16 * S::kKeyPitch + i / kPairs * 32);
      };
      load_query(0);
      load_keys(0);
#pragma unroll
      for (int i = 0; i < kSteps * kPairs; ++i) {
        const int step = i / kPairs, n = i % kPairs * 2;
        if (i + 1 < kSteps * kPairs) load_keys(i + 1);
        if (n == 2 && step + 1 < kSteps) load_query(step + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          MmaF16(score[m][n], a[step & 1][m], b[i & 1][0], b[i & 1][1]);
          MmaF16(score[m][n + 1], a[step & 1][m], b[i & 1][2], b[i & 1][3]);
        }
      }
    }
    WaitCopies<0>();
    __syncthreads();  // the values are there, and nobody reads the keys any more
    if (tile + 1 < tiles) copy_keys(tile + 1);
    if (!mine) continue;

    const bool border = begin + kTile - 1 > warp_first || begin + kTile > count;
    if (border) {
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = begin + n * 8 + (lane & 3) * 2 + (i & 1);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            if (t > own[m][i >> 1] || t >= count) score[m][n][i] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float kept[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = largest[m][h];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
          top = fmaxf(top, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        kept[h] = Exp2((largest[m][h] - top) * factor[m][h]);
        largest[m][h] = top;
        const float offset = -top * factor[m][h];
        float added = 0;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            score[m][n][i] = Exp2(fmaf(score[m][n][i], factor[m][h], offset));
            added += score[m][n][i];
          }
        }
        sum[m][h] = fmaf(sum[m][h], kept[h], added);
      }
      if (__any_sync(0xffffffffu, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][n][i] *= kept[i >> 1];
        }
      }
    }
    uint32_t b[2][4];
    constexpr int kPairs = S::kValueTiles / 2;
    auto load_values = [&](int i) {
      LoadMatrix4Transposed(b[i & 1], value_from + i / kPairs * 16 * S::kValuePitch + i % kPairs * 32);
    };
    load_values(0);
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * step + i;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          a[m][2 * i] = PackHalf(score[m][n][0], score[m][n][1]);
          a[m][2 * i + 1] = PackHalf(score[m][n][2], score[m][n][3]);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kValueTiles; n += 2) {
        const int i = step * kPairs + n / 2;
        if (i + 1 < kTile / 16 * kPairs) load_values(i + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          MmaF16(out[m][n], a[m], b[i & 1][0], b[i & 1][1]);
          MmaF16(out[m][n + 1], a[m], b[i & 1][2], b[i & 1][3]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[m][h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int64_t row = warp_row + m * 16 + h * 8 + (lane >> 2);
      if (row >= rows) continue;
      if (!p.ends) {
        if ((lane & 3) == 0) p.carry_state[row * p.heads + head] = make_float2(largest[m][h], total);
        float* to = p.carry + (row * p.heads + head) * S::kV + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) {
          *reinterpret_cast<float2*>(to + n * 8) = make_float2(out[m][n][2 * h], out[m][n][2 * h + 1]);
        }
        continue;
      }
      const float inverse = 1.0f / total;
      uint16_t* to = p.out + row * p.out_row + head * S::kV + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) {
        *reinterpret_cast<uint32_t*>(to + n * 8) =
            PackHalf(out[m][n][2 * h] * inverse, out[m][n][2 * h + 1] * inverse);
      }
      if (p.out_scale != nullptr && head == 0 && (lane & 3) == 0) p.out_scale[row] = unit;
    }
  }
}

using Large = Shape<128, 64, 128>;
using Small = Shape<32, 32, 32>;

template <class S>
bool Is(int64_t nope, int64_t rope, int64_t v) {
  return nope == S::kNope && rope == S::kRope && v == S::kV;
}

template <class S>
cudaError_t Prepare() {
  return cudaFuncSetAttribute(PrefillAttend<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
}

unsigned Blocks(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

template <class S>
cudaError_t Launch(const PrefillAttentionParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.heads), Blocks(p.n, kRows));
  PrefillAttend<S><<<grid, kThreads, S::kBytes, stream>>>(p);
  return cudaGetLastError();
}

bool Readable(const SequenceCache& c) { return c.lora % 16 == 0 && c.rope % 8 == 0 && c.page_tokens > 0; }

}  // namespace

cudaError_t LaunchLatentUnit(const SequenceCache& c, int64_t positions, float* unit, cudaStream_t stream) {
  if (!Readable(c) || positions <= 0) return cudaErrorInvalidValue;
  const cudaError_t e = cudaMemsetAsync(unit, 0, sizeof(float), stream);
  if (e != cudaSuccess) return e;
  LatentUnit<<<Blocks(positions, kLatentWarps), kLatentWarps * 32, 0, stream>>>(c, positions, unit);
  return cudaGetLastError();
}

cudaError_t LaunchGatherLatents(const SequenceCache& c, int64_t first, int64_t count, const float* unit,
                                uint16_t* latents, uint16_t* rotated, cudaStream_t stream) {
  if (!Readable(c)) return cudaErrorInvalidValue;
  if (count <= 0) return cudaSuccess;
  GatherLatents<<<Blocks(count, kLatentWarps), kLatentWarps * 32, 0, stream>>>(c, first, count, unit, latents,
                                                                               rotated);
  return cudaGetLastError();
}

cudaError_t LaunchTransposeKeys(const DeviceMatrix& w, int64_t first_head, int64_t heads, uint16_t* out,
                                cudaStream_t stream) {
  if (ShapeOf(w.type).bytes == 0 || w.cols % 32 != 0 || w.rows % 32 != 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(w.rows / 32), static_cast<unsigned>(w.cols / 32),
                  static_cast<unsigned>(heads));
  TransposeKeys<<<grid, 32, 0, stream>>>(w, first_head, reinterpret_cast<__half*>(out));
  return cudaGetLastError();
}

cudaError_t LaunchPrefillQuery(const PrefillQueryParams& p, cudaStream_t stream) {
  if ((p.nope | p.rope_dim) % 2 != 0 || p.nope + p.rope_dim > 256) return cudaErrorInvalidValue;
  if (p.n <= 0 || p.heads <= 0) return cudaSuccess;
  PrefillQuery<<<Blocks(p.n * p.heads, kWarps), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

bool PrefillAttentionSupports(int64_t nope, int64_t rope, int64_t v) {
  return Is<Large>(nope, rope, v) || Is<Small>(nope, rope, v);
}

cudaError_t PreparePrefillAttention() {
  const cudaError_t e = Prepare<Large>();
  return e != cudaSuccess ? e : Prepare<Small>();
}

cudaError_t LaunchPrefillAttention(const PrefillAttentionParams& p, cudaStream_t stream) {
  if (!PrefillAttentionSupports(p.nope, p.rope, p.v) || p.count <= 0 || (p.begins && p.first != 0) ||
      p.first + p.count > INT32_MAX || p.n > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  if (p.n <= 0 || p.heads <= 0) return cudaSuccess;
  return Is<Large>(p.nope, p.rope, p.v) ? Launch<Large>(p, stream) : Launch<Small>(p, stream);
}

}  // namespace tandem::attention::cuda
