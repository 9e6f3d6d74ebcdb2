// Products with few columns and quantized weights: int8 tensor cores.
//
// A unit is 256 values of a row (Q8_0, Q5_0: 128), as sub-blocks of 32. One m16n8k32 product gives the exact
// integer sums of a sub-block, which are then scaled and added in float32.
//
// Which of the 32 values a lane holds does not matter as long as both operands agree on it. Lane (g, t) holds
// of its rows the values 8 t to 8 t + 7 of a sub-block; where bytes hold values 16 apart (Q4_0, Q5_0), 4 t
// to 4 t + 3 and those 16 further on.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/few_columns.cuh"
#include "services/attention_gpu/backend/cuda/int8_units.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

// Byte i of `word` as float32.
__device__ __forceinline__ float FloatOfByte(uint32_t word, int i) {
  return static_cast<float>(word >> (8 * i) & 255);
}

// (pair 0 + pair 1) + (pair 2 + pair 3), one after the other; in part[0] at the end.
__device__ __forceinline__ void AddPair(int pair, float v, float (&part)[2]) {
  if (pair == 0) {
    part[0] = v;
  } else if (pair == 1) {
    part[0] += v;
  } else if (pair == 2) {
    part[1] = v;
  } else {
    part[0] += part[1] + v;
  }
}

// 8 columns of a batch's activations, [blocks][8][32] integers and [blocks][8] scales, kBlocks sub-blocks at
// a time. What stands for columns that do not exist is anything: nobody reads their sums.
template <int kBlocks>
struct Int8Columns {
  static constexpr int kValues = kBlocks * 256, kBytes = kValues + kBlocks * 64;
  const int8_t* q;
  const float2* meta;
  const unsigned char* at = nullptr;
  int blocks, first = 0, columns, lane;

  __device__ __forceinline__ Int8Columns(const FewColumns& p, int64_t batch, int first_column,
                                         int lane_of_warp)
      : blocks(p.cols >> 5), columns(p.columns - first_column), lane(lane_of_warp) {
    const int64_t groups_before = batch * ((p.columns + 7) / 8) + first_column / 8;
    q = p.x.q + groups_before * blocks * 256;
    meta = p.x.q_meta + groups_before * blocks * 8;
  }
  __device__ __forceinline__ void Copy(int unit, unsigned char* to) const {
    const int begin = unit * kBlocks;
    const uint32_t shared = SharedAddress(to);
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i) {  // two lanes a column
      const int part = i * 32 + lane;
      if ((lane >> 1 & 7) < columns && begin + (part >> 4) < blocks) {
        CopyAsync16(shared + part * 16, q + begin * 256 + part * 16, true);
      }
    }
#pragma unroll
    for (int i = 0; i < (kBlocks + 7) / 8; ++i) {  // two columns a lane
      const int part = i * 32 + lane;
      if (part < kBlocks * 4 && (lane & 3) * 2 < columns && begin + (part >> 2) < blocks) {
        CopyAsync16(shared + kValues + part * 16, meta + begin * 8 + part * 2, true);
      }
    }
  }
  __device__ __forceinline__ void At(int unit, const unsigned char* from) {
    at = from, first = unit * kBlocks;
  }

  __device__ __forceinline__ float4 Meta(int block) const {
    return reinterpret_cast<const float4*>(at + kValues + (block - first) * 64)[lane & 3];
  }
  __device__ __forceinline__ uint2 Eights(int block) const {
    return *reinterpret_cast<const uint2*>(at + (block - first) * 256 + lane * 8);
  }
  __device__ __forceinline__ uint2 Fours(int block) const {
    const auto* p =
        reinterpret_cast<const uint32_t*>(at + (block - first) * 256 + (lane >> 2) * 32) + (lane & 3);
    return make_uint2(p[0], p[4]);
  }
};

// Q4_K, Q5_K: a block.
template <int kType>
struct UnitK {
  using Columns = Int8Columns<8>;
  using One = OneK<kType>;
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
      head[r] = Constant16(block);
      if (kType == kQ5_K) high[r] = Constant8(block + 16 + 8 * t);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) low[r][pair] = Constant8(block + kLow + 32 * pair + 8 * t);
    }
  }

  __device__ __forceinline__ void Add(int, int unit, int, const Columns& x, float (&sum)[4]) const {
    // Scales and minima of four sub-blocks in the bytes of a word.
    uint32_t scales[2][2], minima[2][2];
    float d[2], d_min[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[r][i] = ScalesOf(head[r], i), minima[r][i] = MinimaOf(head[r], i);
      d[r] = HalfBits(head[r].x & 0xffff), d_min[r] = HalfBits(head[r].x >> 16);
    }
    float part[4][2];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t a[2][4];  // of both sub-blocks
      float scale[2][2], min[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int s = 2 * pair + i;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint2 v = low[r][pair];
          a[i][r] = v.x >> (4 * i) & 0x0f0f0f0fu;
          a[i][2 + r] = v.y >> (4 * i) & 0x0f0f0f0fu;
          if (kType == kQ5_K) {
            a[i][r] |= (high[r].x >> s & 0x01010101u) << 4;
            a[i][2 + r] |= (high[r].y >> s & 0x01010101u) << 4;
          }
          scale[i][r] = FloatOfByte(scales[r][s >> 2], s & 3);
          min[i][r] = FloatOfByte(minima[r][s >> 2], s & 3);
        }
      }
      int c[2][4];
      float4 m[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 b = x.Eights(unit * 8 + 2 * pair + i);
        m[i] = x.Meta(unit * 8 + 2 * pair + i);
        MmaS8(c[i], a[i], b.x, b.y, kZeroBits);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = k >> 1;
        auto of = [&](int i) {
          return HalfPair{IntegerOf(c[i][k]), scale[i][r], min[i][r], k & 1 ? m[i].z : m[i].x,
                          k & 1 ? m[i].w : m[i].y};
        };
        AddPair(pair, PairSum(d[r], d_min[r], of(0), of(1)), part[k]);
        if (pair == 3) sum[k] += part[k][0];
      }
    }
  }
};

// Q6_K: a block. A scale stands for 16 values, those of lanes t < 2 or of the others: two products for each
// sub-block, with the activations of the one and of the other.
struct UnitQ6K {
  using Columns = Int8Columns<8>;
  using One = OneQ6K;
  uint2 low[2][4], high[2][2];  // [row][32 bytes]
  uint4 scales[2];
  uint32_t d[2];

  static TANDEM_HOST_DEVICE int Count(int cols) { return cols >> 8; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int cols, int unit, int lane) {
    const int blocks = cols >> 8, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) low[r][i] = Constant8(row[r] + unit * 128 + i * 32 + 8 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) high[r][i] = Constant8(row[r] + blocks * 128 + unit * 64 + i * 32 + 8 * t);
      scales[r] = Constant16(row[r] + blocks * 192 + unit * 16);
      d[r] = Constant2(row[r] + blocks * 208 + unit * 2);
    }
  }

  __device__ __forceinline__ void Add(int, int unit, int lane, const Columns& x, float (&sum)[4]) const {
    const bool first = (lane & 2) == 0;
    float part[4][2];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t a[2][4];  // of both sub-blocks
      int scale[2][2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int s = 2 * pair + k, half = s >> 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t word = WordOf(scales[r], scales[r], pair);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint2 bits = low[r][half * 2 + k], more = high[r][half];
            a[k][2 * i + r] = FourTimes(i == 0 ? bits.x : bits.y, s >> 1 & 1,
                                        (i == 0 ? more.x : more.y) << (6 - 2 * (s & 3)));
            scale[k][i][r] = static_cast<int8_t>(word >> (16 * k + 8 * i));
          }
        }
      }
      int weighted[2][4];
      float4 m[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint2 b = x.Eights(unit * 8 + 2 * pair + k);
        m[k] = x.Meta(unit * 8 + 2 * pair + k);
        int c[2][4];
        MmaS8(c[0], a[k], first ? b.x : 0, first ? b.y : 0, 0);
        MmaS8(c[1], a[k], first ? 0 : b.x, first ? 0 : b.y, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weighted[k][i] = Weighted6(c[0][i], scale[k][0][i >> 1], c[1][i], scale[k][1][i >> 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        AddPair(pair,
                PairSum6(weighted[0][i], weighted[1][i], i & 1 ? m[0].z : m[0].x, i & 1 ? m[1].z : m[1].x),
                part[i]);
        if (pair == 3) sum[i] = fmaf(HalfBits(d[i >> 1]), part[i][0], sum[i]);
      }
    }
  }
};

// Q8_0, Q4_0, Q5_0: kBlocks blocks of 32 values, fewer at the end of a row.
template <int kType>
struct Unit32 {
  static constexpr int kBlocks = kType == kQ4_0 ? 8 : 4;
  using Columns = Int8Columns<kBlocks>;
  using One = void;
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
          const uint2 w = Constant8(row[r] + block * 32 + 8 * t);
          v[r][i][0] = w.x, v[r][i][1] = w.y;
        } else {
          v[r][i][0] = Constant4(row[r] + block * 16 + 4 * t);
        }
      }
      if ((blocks & (kBlocks - 1)) == 0) {  // the usual case: all are there, and their fields aligned
#pragma unroll
        for (int i = 0; i < kBlocks / 2; i += 2) {
          const uint2 d = Constant8(row[r] + scale_plane + unit * kBlocks * 2 + i * 4);
          scales[r][i] = d.x, scales[r][i + 1] = d.y;
        }
        if constexpr (kType == kQ5_0) {
          const uint4 h = Constant16(row[r] + blocks * 16 + unit * 16);
          high[r][0] = h.x, high[r][1] = h.y, high[r][2] = h.z, high[r][3] = h.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const int block = min(unit * kBlocks + i, blocks - 1);
          const uint32_t d = Constant2(row[r] + scale_plane + block * 2);
          scales[r][i >> 1] = i & 1 ? scales[r][i >> 1] | d << 16 : d;
          if (kType == kQ5_0) high[r][i] = Constant4(row[r] + blocks * 16 + block * 4);
        }
      }
    }
  }

  __device__ __forceinline__ void Add(int cols, int unit, int lane, const Columns& x, float (&sum)[4]) const {
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
      const uint2 b = kType == kQ8_0 ? x.Eights(block) : x.Fours(block);
      const float4 m = x.Meta(block);
      int c[4];
      MmaS8(c, a, b.x, b.y, kZeroBits);
      constexpr float kOffset = kType == kQ4_0 ? 8.0f : kType == kQ5_0 ? 16.0f : 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float scale = k & 1 ? m.z : m.x, added = k & 1 ? m.w : m.y;
        const float value =
            kType == kQ8_0 ? scale * IntegerOf(c[k]) : fmaf(scale, IntegerOf(c[k]), -kOffset * added);
        if (valid) sum[k] = fmaf(d[k >> 1], value, sum[k]);
      }
    }
  }
};

}  // namespace

int Int8UnitsOf(int32_t type, int cols) {
  switch (type) {
    case kQ4_0:
      return Unit32<kQ4_0>::Count(cols);
    case kQ5_0:
    case kQ8_0:
      return Unit32<kQ8_0>::Count(cols);
    default:
      return UnitQ6K::Count(cols);
  }
}

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
