// Products with few columns and quantized weights: int8 tensor cores.
//
// A unit is 256 values of a row (Q8_0, Q5_0: 128), as sub-blocks of 32. One m16n8k32 product gives the exact
// integer sums of a sub-block, which are then scaled and added in float32.
//
// Which of the 32 values a lane holds does not matter as long as both operands agree on it. Lane (g, t) holds
// of its rows the values 8 t to 8 t + 7 of a sub-block; where bytes hold values 16 apart (Q4_0, Q5_0) or
// scales stand for 16 values (Q6_K), 4 t to 4 t + 3 and those 16 further on.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/few_columns.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

__device__ __forceinline__ uint2 Load8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ uint32_t Load4(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }

// Integer sums begin at the bits of 1.5 * 2^23 and stay below 2^22 in size: as bits of a float32, they are
// that number plus the sum, exactly.
constexpr int kZeroBits = 0x4b400000;
__device__ __forceinline__ float IntegerOf(int bits) { return __int_as_float(bits) - 12582912.0f; }

// Byte i of `word` as float32.
__device__ __forceinline__ float FloatOfByte(uint32_t word, int i) {
  return static_cast<float>(word >> (8 * i) & 255);
}

// The activations of a batch: for each group of 8 columns, [blocks][8][32] integers and [blocks][8] scales.
// Lanes whose columns do not exist get zeros.
template <int kTiles>
struct Int8Columns {
  const int8_t* q;
  const float2* meta;
  int64_t group;  // sub-blocks of 8 columns
  int first_column, columns, lane;

  __device__ __forceinline__ Int8Columns(const FewColumns& p, int64_t batch, int first, int lane_of_warp)
      : group(p.cols >> 5), first_column(first), columns(p.columns), lane(lane_of_warp) {
    const int64_t at = (batch * ((p.columns + 7) / 8) + first / 8) * group * 8;
    q = p.x.q + at * 32;
    meta = p.x.q_meta + at;
  }
  __device__ __forceinline__ bool HasValues(int tile) const {
    return first_column + tile * 8 + (lane >> 2) < columns;
  }
  // (scale, scale * sum) of columns 2 t and 2 t + 1.
  __device__ __forceinline__ float4 Meta(int tile, int block) const {
    if (first_column + tile * 8 + 2 * (lane & 3) >= columns) return make_float4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const float4*>(meta + (tile * group + block) * 8) + (lane & 3));
  }
  __device__ __forceinline__ uint2 Eights(int tile, int block) const {
    if (!HasValues(tile)) return make_uint2(0, 0);
    return Load8(q + (tile * group + block) * 256 + lane * 8);
  }
  __device__ __forceinline__ uint2 Fours(int tile, int block) const {
    if (!HasValues(tile)) return make_uint2(0, 0);
    const int8_t* p = q + (tile * group + block) * 256 + (lane >> 2) * 32 + (lane & 3) * 4;
    return make_uint2(Load4(p), Load4(p + 16));
  }
};

// Q4_K, Q5_K: a block.
template <int kType>
struct UnitK {
  template <int kTiles>
  using Columns = Int8Columns<kTiles>;
  static constexpr int kBytes = kType == kQ4_K ? 144 : 176;
  static constexpr int kLow = kType == kQ4_K ? 16 : 48;  // where the low bits begin
  uint4 head[2];
  uint2 high[2], low[2][4];

  static TANDEM_HOST_DEVICE int Count(int cols) { return cols >> 8; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int, int unit, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* block = row[r] + unit * kBytes;
      head[r] = Load16(block);
      if (kType == kQ5_K) high[r] = Load8(block + 16 + 8 * t);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) low[r][pair] = Load8(block + kLow + 32 * pair + 8 * t);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int, int unit, int, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
    // Scales and minima of four sub-blocks in the bytes of a word.
    uint32_t scales[2][2], minima[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4& h = head[r];
      scales[r][0] = h.y & 0x3f3f3f3fu;
      scales[r][1] = (h.w & 0x0f0f0f0fu) | (h.y >> 2 & 0x30303030u);
      minima[r][0] = h.z & 0x3f3f3f3fu;
      minima[r][1] = (h.w >> 4 & 0x0f0f0f0fu) | (h.z >> 2 & 0x30303030u);
    }
    float part[kTiles][4] = {}, least[kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      uint32_t a[4];
      float scale[2], min[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint2 v = low[r][s >> 1];
        a[r] = v.x >> (4 * (s & 1)) & 0x0f0f0f0fu;
        a[2 + r] = v.y >> (4 * (s & 1)) & 0x0f0f0f0fu;
        if (kType == kQ5_K) {
          a[r] |= (high[r].x >> s & 0x01010101u) << 4;
          a[2 + r] |= (high[r].y >> s & 0x01010101u) << 4;
        }
        scale[r] = FloatOfByte(scales[r][s >> 2], s & 3);
        min[r] = FloatOfByte(minima[r][s >> 2], s & 3);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint2 b = x.Eights(tile, unit * 8 + s);
        const float4 d = x.Meta(tile, unit * 8 + s);
        int c[4];
        MmaS8(c, a, b.x, b.y, kZeroBits);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // integer times scale is below 2^24: exact
          part[tile][i] = fmaf(i & 1 ? d.z : d.x, IntegerOf(c[i]) * scale[i >> 1], part[tile][i]);
          least[tile][i] = fmaf(i & 1 ? d.w : d.y, min[i >> 1], least[tile][i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float d = HalfBits(head[r].x & 0xffff), d_min = HalfBits(head[r].x >> 16);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          sum[tile][i] = fmaf(d, part[tile][i], sum[tile][i]);
          sum[tile][i] = fmaf(-d_min, least[tile][i], sum[tile][i]);
        }
      }
    }
  }
};

// Q6_K: a block; m16n8k16 products, as a scale stands for 16 values.
struct UnitQ6K {
  template <int kTiles>
  using Columns = Int8Columns<kTiles>;
  uint32_t low[2][4][2], high[2][2][2];  // [row][32 bytes][their first or second half]
  uint4 scales[2];
  uint32_t d[2];

  static TANDEM_HOST_DEVICE int Count(int cols) { return cols >> 8; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int cols, int unit, int lane) {
    const int blocks = cols >> 8, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) low[r][i >> 1][i & 1] = Load4(row[r] + unit * 128 + i * 16 + 4 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        high[r][i >> 1][i & 1] = Load4(row[r] + blocks * 128 + unit * 64 + i * 16 + 4 * t);
      scales[r] = Load16(row[r] + blocks * 192 + unit * 16);
      d[r] = __ldg(reinterpret_cast<const unsigned short*>(row[r] + blocks * 208) + unit);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int, int unit, int, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
    float part[kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int half = s >> 2, quarter = s & 3, shift = 4 * (quarter >> 1);
      uint32_t a[2][2];  // [16 values][row]
      int scale[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t word = WordOf(scales[r], scales[r], s >> 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i][r] = Minus32((low[r][half * 2 + (quarter & 1)][i] >> shift & 0x0f0f0f0fu) |
                            (high[r][half][i] >> (2 * quarter) & 0x03030303u) << 4);
          scale[r][i] = static_cast<int8_t>(word >> (16 * (s & 1) + 8 * i));
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint2 b = x.Fours(tile, unit * 8 + s);
        const float4 m = x.Meta(tile, unit * 8 + s);
        int c[2][4];
        MmaS8(c[0], a[0], b.x, 0);
        MmaS8(c[1], a[1], b.y, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int weighted = scale[i >> 1][0] * c[0][i] + scale[i >> 1][1] * c[1][i];  // below 2^24
          part[tile][i] = fmaf(i & 1 ? m.z : m.x, static_cast<float>(weighted), part[tile][i]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[tile][i] = fmaf(HalfBits(d[i >> 1]), part[tile][i], sum[tile][i]);
      }
    }
  }
};

// Q8_0, Q4_0, Q5_0: kBlocks blocks of 32 values, fewer at the end of a row.
template <int kType>
struct Unit32 {
  template <int kTiles>
  using Columns = Int8Columns<kTiles>;
  static constexpr int kBlocks = kType == kQ4_0 ? 8 : 4;
  static constexpr int kWords = kType == kQ8_0 ? 2 : 1;
  uint32_t v[2][kBlocks][kWords];
  uint32_t high[2][kBlocks];        // Q5_0: the high bits of a block
  uint32_t scales[2][kBlocks / 2];  // float16, two in a word

  static TANDEM_HOST_DEVICE int Count(int cols) { return ((cols >> 5) + kBlocks - 1) / kBlocks; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int cols, int unit, int lane) {
    const int blocks = cols >> 5, t = lane & 3;
    const int scale_plane = blocks * (kType == kQ8_0 ? 32 : kType == kQ5_0 ? 20 : 16);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int block = min(unit * kBlocks + i, blocks - 1);
        if constexpr (kType == kQ8_0) {
          const uint2 w = Load8(row[r] + block * 32 + 8 * t);
          v[r][i][0] = w.x, v[r][i][1] = w.y;
        } else {
          v[r][i][0] = Load4(row[r] + block * 16 + 4 * t);
        }
      }
      if ((blocks & (kBlocks - 1)) == 0) {  // the usual case: all are there, and their fields aligned
#pragma unroll
        for (int i = 0; i < kBlocks / 2; i += 2) {
          const uint2 d = Load8(row[r] + scale_plane + unit * kBlocks * 2 + i * 4);
          scales[r][i] = d.x, scales[r][i + 1] = d.y;
        }
        if constexpr (kType == kQ5_0) {
          const uint4 h = Load16(row[r] + blocks * 16 + unit * 16);
          high[r][0] = h.x, high[r][1] = h.y, high[r][2] = h.z, high[r][3] = h.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const int block = min(unit * kBlocks + i, blocks - 1);
          const uint32_t d = __ldg(reinterpret_cast<const unsigned short*>(row[r] + scale_plane) + block);
          scales[r][i >> 1] = i & 1 ? scales[r][i >> 1] | d << 16 : d;
          if (kType == kQ5_0) high[r][i] = Load4(row[r] + blocks * 16 + block * 4);
        }
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Add(int cols, int unit, int lane, const Columns<kTiles>& x,
                                      float (&sum)[kTiles][4]) const {
    const int t = lane & 3;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      // Behind the last block: that one again, and nothing is added.
      const bool valid = unit * kBlocks + i < cols >> 5;
      const int block = valid ? unit * kBlocks + i : (cols >> 5) - 1;
      uint32_t a[4];
      float d[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kType == kQ8_0) {
          a[r] = v[r][i][0];
          a[2 + r] = v[r][i][1];
        } else {
          a[r] = v[r][i][0] & 0x0f0f0f0fu;
          a[2 + r] = v[r][i][0] >> 4 & 0x0f0f0f0fu;
          if constexpr (kType == kQ5_0) {
            a[r] |= SpreadBits(high[r][i] >> (4 * t)) << 4;
            a[2 + r] |= SpreadBits(high[r][i] >> (16 + 4 * t)) << 4;
          }
        }
        d[r] = HalfBits(scales[r][i >> 1] >> (16 * (i & 1)) & 0xffff);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint2 b = kType == kQ8_0 ? x.Eights(tile, block) : x.Fours(tile, block);
        const float4 m = x.Meta(tile, block);
        int c[4];
        MmaS8(c, a, b.x, b.y, kZeroBits);
        constexpr float kOffset = kType == kQ4_0 ? 8.0f : kType == kQ5_0 ? 16.0f : 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float scale = k & 1 ? m.z : m.x, added = k & 1 ? m.w : m.y;
          const float value =
              kType == kQ8_0 ? scale * IntegerOf(c[k]) : fmaf(scale, IntegerOf(c[k]), -kOffset * added);
          if (valid) sum[tile][k] = fmaf(d[k >> 1], value, sum[tile][k]);
        }
      }
    }
  }
};

}  // namespace

cudaError_t LaunchInt8Products(const ProductParams* p, int count, cudaStream_t stream) {
  switch (p->w.type) {
    case kQ4_0:
      return LaunchFewColumns<Unit32<kQ4_0>>(p, count, stream);
    case kQ5_0:
      return LaunchFewColumns<Unit32<kQ5_0>>(p, count, stream);
    case kQ8_0:
      return LaunchFewColumns<Unit32<kQ8_0>>(p, count, stream);
    case kQ4_K:
      return LaunchFewColumns<UnitK<kQ4_K>>(p, count, stream);
    case kQ5_K:
      return LaunchFewColumns<UnitK<kQ5_K>>(p, count, stream);
    case kQ6_K:
      return LaunchFewColumns<UnitQ6K>(p, count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace tandem::attention::cuda
