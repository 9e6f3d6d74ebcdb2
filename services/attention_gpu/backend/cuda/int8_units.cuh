// Units of 256 values of Q4_K, Q5_K and Q6_K rows: what one column and several have in common, and one
// column.
//
// The order of sums is the same for both. The exact integer sums of the eight sub-blocks of 32 become four
// sums of neighbours in float32, those are added as (0 + 1) + (2 + 3), and units one after the other. So a
// column has the same bits alone and in company.
//
// With one column of activations seven eighths of what a tensor core gives would be nothing. Instead product
// s of a unit meets a matrix whose column s has the activations of sub-block s and whose other columns are
// zeros; eight products into the same sums leave those of 16 rows and 8 sub-blocks. A lane then scales four
// sums instead of 32, and holds 8 activations a unit, so that they can be fetched ahead as the weights are.
#pragma once

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {

// Integer sums begin at the bits of 1.5 * 2^23 and stay below 2^22 in size: as bits of a float32, they are
// that number plus the sum, exactly.
constexpr int kZeroBits = 0x4b400000;
__device__ __forceinline__ float IntegerOf(int bits) { return __int_as_float(bits) - 12582912.0f; }

// Scales (or minima) of sub-blocks 0 to 3 (which = 0) or 4 to 7 in the bytes of a word, of a Q4_K or Q5_K
// block whose first 16 bytes are `h`.
__device__ __forceinline__ uint32_t ScalesOf(const uint4& h, int which) {
  return which == 0 ? h.y & 0x3f3f3f3fu : (h.w & 0x0f0f0f0fu) | (h.y >> 2 & 0x30303030u);
}
__device__ __forceinline__ uint32_t MinimaOf(const uint4& h, int which) {
  return which == 0 ? h.z & 0x3f3f3f3fu : (h.w >> 4 & 0x0f0f0f0fu) | (h.z >> 2 & 0x30303030u);
}

// What two neighbouring sub-blocks of Q4_K or Q5_K add: integer sums n, scales and minima of the weights;
// (scale, scale * sum) of the activations. An integer times a scale is below 2^24: exact.
struct HalfPair {
  float n, scale, min;
  float x_scale, x_sum;
};
__device__ __forceinline__ float PairSum(float d, float d_min, const HalfPair& a, const HalfPair& b) {
  const float part = fmaf(b.x_scale, b.n * b.scale, __fmul_rn(a.x_scale, a.n * a.scale));
  const float least = fmaf(b.x_sum, b.min, __fmul_rn(a.x_sum, a.min));
  return fmaf(d, part, __fmul_rn(-d_min, least));
}
// Of Q6_K, without d: `a` and `b` are the sub-blocks' integer sums with their scales.
__device__ __forceinline__ float PairSum6(int a, int b, float x_scale_a, float x_scale_b) {
  return fmaf(x_scale_b, static_cast<float>(b), __fmul_rn(x_scale_a, static_cast<float>(a)));
}

// Over the four lanes of a g: (0 + 1) + (2 + 3).
__device__ __forceinline__ float SumOfPairs(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Of Q6_K: bytes of (q - 32) * 4, of the lower or upper half of the bytes of `low` and the highest two bits
// of those of `high`.
__device__ __forceinline__ uint32_t FourTimes(uint32_t low, int upper, uint32_t high) {
  return ((upper == 0 ? low << 2 : low >> 2) & 0x3c3c3c3cu) ^ (high & 0xc0c0c0c0u) ^ 0x80808080u;
}
// Integer sums of such values with their scales, below 2^24; the products' own are four times that.
__device__ __forceinline__ int Weighted6(int c0, int scale0, int c1, int scale1) {
  return (c0 * scale0 + c1 * scale1) >> 2;
}

// A column of Q4_K or Q5_K. Of 64 bytes of low bits, which belong to sub-blocks 4 j to 4 j + 3, lane (g, t)
// has bytes 16 t to 16 t + 15: values 16 (t % 2) and the 15 behind it of sub-blocks 4 j + 2 (t / 2) (low
// halves of the bytes) and the next one (high halves). So in every product lanes of t < 2 stand for one
// sub-block and the others for another; that they meet their own activations is a matter of where these are
// not zero.
template <int kType>
struct OneK {
  static constexpr int kStages = kType == kQ4_K ? 3 : 2;  // as many as have room in registers
  static constexpr int kBytes = kType == kQ4_K ? 144 : 176;
  static constexpr int kLow = kType == kQ4_K ? 16 : 48;  // where the low bits begin
  uint4 head[2], low[2][2];
  uint4 high[2];   // Q5_K: of values 16 (t % 2) and those behind it; bit s is that of sub-block s
  uint4 x;         // the same values of sub-block g, zeros where this lane has no weights of it
  float2 meta[2];  // of sub-blocks 2 t and 2 t + 1

  static TANDEM_HOST_DEVICE int Count(int cols) { return cols >> 8; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int, int unit, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* block = row[r] + unit * kBytes;
      head[r] = Constant16(block);
      if (kType == kQ5_K) high[r] = Constant16(block + 16 + 16 * (t & 1));
#pragma unroll
      for (int j = 0; j < 2; ++j) low[r][j] = Constant16(block + kLow + 64 * j + 16 * t);
    }
  }
  __device__ __forceinline__ void LoadColumn(const int8_t* q, const float2* m, int unit, int lane) {
    const int g = lane >> 2, t = lane & 3;
    x = make_uint4(0, 0, 0, 0);
    if ((g >> 1 & 1) == t >> 1) {
      x = *reinterpret_cast<const uint4*>(q + (unit * 8 + g) * 256 + (t & 1) * 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) meta[i] = m[(unit * 8 + t * 2 + i) * 8];
  }

  __device__ __forceinline__ void Add(int lane, float (&sum)[2]) const {
    const int g = lane >> 2, t = lane & 3;
    int c[2][4] = {{kZeroBits, kZeroBits, kZeroBits, kZeroBits}, {0, 0, 0, 0}};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const bool mine = g >> 2 == j && (g & 1) == odd;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint32_t v = WordOf(low[r][j], low[r][j], 2 * w + i) >> (4 * odd) & 0x0f0f0f0fu;
              if (kType == kQ5_K) {
                const uint32_t bits = WordOf(high[r], high[r], 2 * w + i) >> (t & 2);
                v |= (bits >> (4 * j + odd) & 0x01010101u) << 4;
              }
              a[2 * i + r] = v;
            }
          }
          AddMmaS8(c[w], a, mine ? WordOf(x, x, 2 * w) : 0, mine ? WordOf(x, x, 2 * w + 1) : 0);
        }
      }
    }
    const int which = t >> 1, shift = (t & 1) * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t scale = ScalesOf(head[r], which) >> shift, min = MinimaOf(head[r], which) >> shift;
      const HalfPair a{IntegerOf(c[0][2 * r] + c[1][2 * r]), ByteFloat<0>(scale), ByteFloat<0>(min),
                       meta[0].x, meta[0].y};
      const HalfPair b{IntegerOf(c[0][2 * r + 1] + c[1][2 * r + 1]), ByteFloat<1>(scale), ByteFloat<1>(min),
                       meta[1].x, meta[1].y};
      sum[r] += SumOfPairs(PairSum(HalfBits(head[r].x & 0xffff), HalfBits(head[r].x >> 16), a, b));
    }
  }
};

// A column of Q6_K. Of half j of a block's 128 bytes of low bits, lane (g, t) has bytes 16 t to 16 t + 15:
// values 16 (t % 2) and the 15 behind it, which have one scale, of sub-blocks 4 j + t / 2 (low halves of the
// bytes) and 4 j + 2 + t / 2 (high halves). As for Q4_K; and values with the first scale of their sub-blocks
// and those with the second are summed apart.
struct OneQ6K {
  static constexpr int kStages = 2;
  uint4 low[2][2], high[2][2];
  uint32_t scales[2];  // of sub-blocks 2 t and 2 t + 1
  uint32_t d[2];
  uint4 x;        // the same values of sub-block g, zeros where this lane has no weights of it
  float meta[2];  // scales of sub-blocks 2 t and 2 t + 1

  static TANDEM_HOST_DEVICE int Count(int cols) { return cols >> 8; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int cols, int unit, int lane) {
    const int blocks = cols >> 8, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        low[r][j] = Constant16(row[r] + unit * 128 + j * 64 + 16 * t);
        high[r][j] = Constant16(row[r] + blocks * 128 + unit * 64 + j * 32 + 16 * (t & 1));
      }
      scales[r] = Constant4(row[r] + blocks * 192 + unit * 16 + 4 * t);
      d[r] = Constant2(row[r] + blocks * 208 + unit * 2);
    }
  }
  __device__ __forceinline__ void LoadColumn(const int8_t* q, const float2* m, int unit, int lane) {
    const int g = lane >> 2, t = lane & 3;
    x = make_uint4(0, 0, 0, 0);
    if ((g & 1) == t >> 1) {
      x = *reinterpret_cast<const uint4*>(q + (unit * 8 + g) * 256 + (t & 1) * 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) meta[i] = m[(unit * 8 + t * 2 + i) * 8].x;
  }

  __device__ __forceinline__ void Add(int lane, float (&sum)[2]) const {
    const int g = lane >> 2, t = lane & 3;
    int c[2][4] = {};  // [16 values]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const bool mine = g >> 2 == j && (g >> 1 & 1) == upper;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              // The sub-block's quarter is t / 2 + 2 upper.
              const uint32_t bits = WordOf(high[r][j], high[r][j], 2 * w + i) << (2 - (t & 2));
              a[2 * i + r] =
                  FourTimes(WordOf(low[r][j], low[r][j], 2 * w + i), upper, bits << (4 - 4 * upper));
            }
          }
          const uint32_t b0 = mine ? WordOf(x, x, 2 * w) : 0, b1 = mine ? WordOf(x, x, 2 * w + 1) : 0;
          AddMmaS8(c[0], a, (t & 1) == 0 ? b0 : 0, (t & 1) == 0 ? b1 : 0);
          AddMmaS8(c[1], a, (t & 1) == 0 ? 0 : b0, (t & 1) == 0 ? 0 : b1);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int weighted[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        weighted[k] = Weighted6(c[0][2 * r + k], static_cast<int8_t>(scales[r] >> (16 * k)), c[1][2 * r + k],
                                static_cast<int8_t>(scales[r] >> (16 * k + 8)));
      }
      sum[r] = fmaf(HalfBits(d[r]), SumOfPairs(PairSum6(weighted[0], weighted[1], meta[0], meta[1])), sum[r]);
    }
  }
};

}  // namespace tandem::attention::cuda
