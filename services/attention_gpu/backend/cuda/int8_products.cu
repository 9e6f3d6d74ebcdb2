// Products with few columns and quantized weights: int8 tensor cores, up to 16 columns a pass over the
// weights.
//
// A warp computes 16 weight rows times kTiles * 8 columns. It goes through the rows in units of 256 values
// (types with blocks of 32: 128): it loads the unit of all 16 rows, 8 bytes a lane at a time, and multiplies
// the sub-blocks, 32 values each, with the int8 activations: one m16n8k32 product gives the exact integer
// sums, which are then scaled and added in float32. Rows with many units are shared by several warps of a
// block, whose sums are added in order through shared memory. Which warp takes what depends on the weight's
// shape alone.
//
// Which of the 32 values a lane holds does not matter as long as both operands agree on it. Lane (g, t) =
// (lane / 4, lane % 4) holds of rows g and g + 8 the values 8 t to 8 t + 7 of a sub-block; for Q4_0 and Q5_0,
// whose bytes hold values 16 apart, 4 t to 4 t + 3 and those 16 further on.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

// Of a block; the larger one where rows are few and long.
constexpr int kWarps = 8, kMostWarps = 16;
constexpr int kRowTile = 16;

__device__ __forceinline__ uint2 Load8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ uint32_t Load4(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }

TANDEM_HOST_DEVICE constexpr bool WordOrder(int type) { return type == kQ4_0 || type == kQ5_0; }
TANDEM_HOST_DEVICE constexpr bool IsK(int type) { return type == kQ4_K || type == kQ5_K || type == kQ6_K; }

// The activations of a batch: for each group of 8 columns, [blocks][8][32] integers and [blocks][8] scales.
template <int kTiles>
struct Columns {
  const int8_t* q;
  const float2* meta;
  int blocks;
  int lane;

  // The columns of the padding are read too: what is there reaches no other column.
  __device__ __forceinline__ void Load(int tile, int block, bool word_order, uint32_t (&b)[2],
                                       float4& m) const {
    const int64_t at = (static_cast<int64_t>(tile) * blocks + block) * 8;
    if (word_order) {
      const int8_t* p = q + (at + (lane >> 2)) * 32 + (lane & 3) * 4;
      b[0] = Load4(p);
      b[1] = Load4(p + 16);
    } else {
      const uint2 v = Load8(q + at * 32 + lane * 8);
      b[0] = v.x;
      b[1] = v.y;
    }
    m = __ldg(reinterpret_cast<const float4*>(meta + at) + (lane & 3));
  }
};

// sum += the product of one sub-block of both rows. f: the rows' scales, m: minus their minima.
template <int kTiles, bool kWords, bool kMin>
__device__ __forceinline__ void AddBlock(const Columns<kTiles>& x, int block, const uint32_t (&a)[4],
                                         float f0, float f1, float m0, float m1, float (&sum)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t b[2];
    float4 d;
    x.Load(tile, block, kWords, b, d);
    // The sums begin at the bits of 1.5 * 2^23 and stay below 2^22 in size: as bits, they are that number
    // plus the sum, exactly.
    int c[4];
    MmaS8(c, a, b[0], b[1], 0x4b400000);
    float* s = sum[tile];
    s[0] = fmaf(f0 * d.x, __int_as_float(c[0]) - 12582912.0f, s[0]);
    s[1] = fmaf(f0 * d.z, __int_as_float(c[1]) - 12582912.0f, s[1]);
    s[2] = fmaf(f1 * d.x, __int_as_float(c[2]) - 12582912.0f, s[2]);
    s[3] = fmaf(f1 * d.z, __int_as_float(c[3]) - 12582912.0f, s[3]);
    if (kMin) {
      s[0] = fmaf(-m0, d.y, s[0]), s[1] = fmaf(-m0, d.w, s[1]);
      s[2] = fmaf(-m1, d.y, s[2]), s[3] = fmaf(-m1, d.w, s[3]);
    }
  }
}

// What a unit of a row pair needs from memory, and the products with it. Lane t of four.
template <int kType>
struct Unit {  // Q4_K, Q5_K: a block of 256 values
  static constexpr int kBytes = kType == kQ4_K ? 144 : 176;
  static constexpr int kLow = kType == kQ4_K ? 16 : 48;  // where the low bits begin
  uint4 head[2];
  uint2 high[2], low[2][4];

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int, int unit, int t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* block = row[r] + unit * kBytes;
      head[r] = Load16(block);
      high[r] = kType == kQ5_K ? Load8(block + 16 + 8 * t) : make_uint2(0, 0);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) low[r][pair] = Load8(block + kLow + 32 * pair + 8 * t);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int, int unit, int, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      uint32_t a[4];
      float f[2], m[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint2 v = low[r][s >> 1];
        a[r] = v.x >> (4 * (s & 1)) & 0x0f0f0f0fu;
        a[2 + r] = v.y >> (4 * (s & 1)) & 0x0f0f0f0fu;
        if (kType == kQ5_K) {
          a[r] |= (high[r].x >> s & 0x01010101u) << 4;
          a[2 + r] |= (high[r].y >> s & 0x01010101u) << 4;
        }
        ScaleMinOf(head[r], s, &f[r], &m[r]);
      }
      AddBlock<kTiles, false, true>(x, unit * 8 + s, a, f[0], f[1], m[0], m[1], sum);
    }
  }
};

// A block of 256 values. Its scales stand for 16 values: the product is made in two parts, with the lanes of
// the other 16 values set to zero.
template <>
struct Unit<kQ6_K> {
  uint2 low[2][4], high[2][2];
  uint4 scales[2];
  float d[2];

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int blocks32, int unit, int t) {
    const int blocks = blocks32 >> 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) low[r][i] = Load8(row[r] + unit * 128 + i * 32 + 8 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) high[r][i] = Load8(row[r] + blocks * 128 + unit * 64 + i * 32 + 8 * t);
      scales[r] = Load16(row[r] + blocks * 192 + unit * 16);
      d[r] = HalfAt(row[r] + blocks * 208 + unit * 2);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int, int unit, int t, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int half = s >> 2, quarter = s & 3, shift = 4 * (quarter >> 1);
      uint32_t a[2][4];
      int scale[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint2 l = low[r][half * 2 + (quarter & 1)], h = high[r][half];
        const uint32_t v0 = Minus32((l.x >> shift & 0x0f0f0f0fu) | (h.x >> (2 * quarter) & 0x03030303u) << 4);
        const uint32_t v1 = Minus32((l.y >> shift & 0x0f0f0f0fu) | (h.y >> (2 * quarter) & 0x03030303u) << 4);
        a[0][r] = t < 2 ? v0 : 0;
        a[0][2 + r] = t < 2 ? v1 : 0;
        a[1][r] = t < 2 ? 0 : v0;
        a[1][2 + r] = t < 2 ? 0 : v1;
        const uint32_t word = WordOf(scales[r], scales[r], s >> 1);
        scale[r][0] = static_cast<int8_t>(word >> (16 * (s & 1)));
        scale[r][1] = static_cast<int8_t>(word >> (16 * (s & 1) + 8));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[2];
        float4 m;
        x.Load(tile, unit * 8 + s, false, b, m);
        int c0[4], c1[4];
        MmaS8(c0, a[0], b[0], b[1], 0);
        MmaS8(c1, a[1], b[0], b[1], 0);
        float* out = sum[tile];
        out[0] = fmaf(d[0] * m.x, static_cast<float>(scale[0][0] * c0[0] + scale[0][1] * c1[0]), out[0]);
        out[1] = fmaf(d[0] * m.z, static_cast<float>(scale[0][0] * c0[1] + scale[0][1] * c1[1]), out[1]);
        out[2] = fmaf(d[1] * m.x, static_cast<float>(scale[1][0] * c0[2] + scale[1][1] * c1[2]), out[2]);
        out[3] = fmaf(d[1] * m.z, static_cast<float>(scale[1][0] * c0[3] + scale[1][1] * c1[3]), out[3]);
      }
    }
  }
};

// Q8_0, Q4_0, Q5_0: four blocks of 32 values, fewer at the end of a row.
template <int kType>
struct UnitOf32 {
  uint2 v[2][4];          // Q8_0: 8 values; the others: in x the low bits of 8 values
  uint32_t high[2][4];    // Q5_0: the high bits of a block
  uint32_t scales[2][4];  // float16

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int blocks, int unit, int t) {
    const int scale_plane = blocks * (kType == kQ8_0 ? 32 : kType == kQ5_0 ? 20 : 16);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = min(unit * 4 + i, blocks - 1);
        if (kType == kQ8_0) {
          v[r][i] = Load8(row[r] + block * 32 + 8 * t);
        } else {
          v[r][i].x = Load4(row[r] + block * 16 + 4 * t);
        }
      }
      if ((blocks & 3) == 0) {  // the usual case: all four blocks are there, and their fields aligned
        const uint2 d = Load8(row[r] + scale_plane + unit * 8);
        scales[r][0] = d.x & 0xffff, scales[r][1] = d.x >> 16, scales[r][2] = d.y & 0xffff,
        scales[r][3] = d.y >> 16;
        if (kType == kQ5_0) {
          const uint4 h = Load16(row[r] + blocks * 16 + unit * 16);
          high[r][0] = h.x, high[r][1] = h.y, high[r][2] = h.z, high[r][3] = h.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int block = min(unit * 4 + i, blocks - 1);
          scales[r][i] = __ldg(reinterpret_cast<const unsigned short*>(row[r] + scale_plane) + block);
          if (kType == kQ5_0) high[r][i] = Load4(row[r] + blocks * 16 + block * 4);
        }
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int blocks, int unit, int t, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (unit * 4 + i >= blocks) break;
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (kType == kQ8_0) {
          a[r] = v[r][i].x;
          a[2 + r] = v[r][i].y;
        } else {
          a[r] = v[r][i].x & 0x0f0f0f0fu;
          a[2 + r] = v[r][i].x >> 4 & 0x0f0f0f0fu;
          if (kType == kQ5_0) {
            a[r] |= SpreadBits(high[r][i] >> (4 * t)) << 4;
            a[2 + r] |= SpreadBits(high[r][i] >> (16 + 4 * t)) << 4;
          }
        }
      }
      constexpr float kOffset = kType == kQ4_0 ? 8.0f : 16.0f;
      const float d0 = HalfBits(scales[0][i]), d1 = HalfBits(scales[1][i]);
      AddBlock<kTiles, WordOrder(kType), kType != kQ8_0>(x, unit * 4 + i, a, d0, d1, kOffset * d0,
                                                         kOffset * d1, sum);
    }
  }
};
template <>
struct Unit<kQ8_0> : UnitOf32<kQ8_0> {};
template <>
struct Unit<kQ4_0> : UnitOf32<kQ4_0> {};
template <>
struct Unit<kQ5_0> : UnitOf32<kQ5_0> {};

// `shares` warps go through a row together: a power of two, at most the warps of the block.
template <int kType, int kTiles, int kMost>
__global__ void __launch_bounds__(kMost * 32, kMost == kWarps ? 3 : 1)
    Int8Product(const ProductParams p, int shares, int first_column) {
  __shared__ float parts[kMost][kTiles][4][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, share = warp % shares;
  const int64_t batch = blockIdx.y;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32 / shares) + warp / shares) * kRowTile;
  const int64_t rows[2] = {first + (lane >> 2), first + (lane >> 2) + 8};
  const uint8_t* row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row[r] = p.w.data + (batch * p.w.rows + min(rows[r], p.w.rows - 1)) * p.w.row_bytes;
  }
  const int cols = static_cast<int>(p.w.cols), blocks = cols >> 5;
  Columns<kTiles> x;
  const int64_t at = (batch * ((p.columns + 7) / 8) + first_column / 8) * blocks * 8;
  x.q = p.x.q + at * 32;
  x.meta = p.x.q_meta + at;
  x.blocks = blocks;
  x.lane = lane;

  float sum[kTiles][4] = {};
  const int units = IsK(kType) ? cols >> 8 : (blocks + 3) / 4;
  for (int unit = share; unit < units; unit += shares) {
    Unit<kType> weights;
    weights.Load(row, blocks, unit, lane & 3);
    weights.Add(blocks, unit, lane & 3, x, sum);
  }
  if (shares > 1) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][tile][i][lane] = sum[tile][i];
    }
    __syncthreads();
    if (share != 0) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int s = 1; s < shares; ++s) sum[tile][i] += parts[warp + s][tile][i][lane];
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + tile * 8 + 2 * (lane & 3) + (i & 1);
      const int64_t r = rows[i >> 1];
      if (column >= p.columns || r >= p.w.rows) continue;
      float* y = p.y + batch * p.y_batch + column * p.y_column + r;
      *y = p.accumulate ? *y + sum[tile][i] : sum[tile][i];
    }
  }
}

template <int kType>
cudaError_t Launch(const ProductParams& p, cudaStream_t stream) {
  const int64_t units = IsK(kType) ? p.w.cols / 256 : (p.w.cols / 32 + 3) / 4;
  const int64_t tiles = (p.w.rows + kRowTile - 1) / kRowTile;
  // Two units a warp at least. Few rows are shared by more warps, or most of the device would idle.
  int shares = 1;
  while (shares < kWarps && units >= shares * 4) shares *= 2;
  if (shares == kWarps && tiles <= 192 && units >= 24) shares = kMostWarps;
  const int warps = shares > kWarps ? shares : kWarps;
  const int64_t per_block = warps / shares;
  const dim3 grid(static_cast<unsigned>((tiles + per_block - 1) / per_block),
                  static_cast<unsigned>(p.batches));
  for (int first = 0; first < p.columns; first += 16) {
    const bool one = p.columns - first <= 8;
    const auto kernel = warps > kWarps
                            ? (one ? Int8Product<kType, 1, kMostWarps> : Int8Product<kType, 2, kMostWarps>)
                            : (one ? Int8Product<kType, 1, kWarps> : Int8Product<kType, 2, kWarps>);
    kernel<<<grid, warps * 32, 0, stream>>>(p, shares, first);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchInt8Product(const ProductParams& p, cudaStream_t stream) {
  switch (p.w.type) {
    case kQ4_0:
      return Launch<kQ4_0>(p, stream);
    case kQ5_0:
      return Launch<kQ5_0>(p, stream);
    case kQ8_0:
      return Launch<kQ8_0>(p, stream);
    case kQ4_K:
      return Launch<kQ4_K>(p, stream);
    case kQ5_K:
      return Launch<kQ5_K>(p, stream);
    case kQ6_K:
      return Launch<kQ6_K>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace tandem::attention::cuda
