// The blocks of GGUF weight formats, as they lie in the file: packed, little-endian, no padding.
//
// Conventions of the comments: x[i] is value i of the block, q[i] its stored integer, f16 an IEEE half. "low
// nibble" is bits 0..3 of a byte. The K formats hold 256 values in sub-blocks of 16 or 32 with a small scale
// (and minimum) each, and a half over the whole block on top. Order of rounding, on which bit-exact twins
// rely: first scale = d * sub_scale, then scale * q, then the subtraction or addition of the minimum, each
// rounded to float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem::quant {

inline constexpr int kSmallBlock = 32;   // values of a Q4_0 ... Q8_0 block
inline constexpr int kSuperBlock = 256;  // values of a K block

#pragma pack(push, 1)

// x[i] = d * (q[i] - 8). qs[j], j < 16: low nibble q[j], high nibble q[j + 16].
struct BlockQ4_0 {
  uint16_t d;  // f16
  uint8_t qs[16];
};

// x[i] = d * q[i] + m. qs as in Q4_0.
struct BlockQ4_1 {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t qs[16];
};

// x[i] = d * (q[i] - 16). Bits 0..3 of q as in Q4_0; bit 4 of q[i] is bit i of the little-endian u32 in qh.
struct BlockQ5_0 {
  uint16_t d;  // f16
  uint8_t qh[4];
  uint8_t qs[16];
};

// x[i] = d * q[i] + m. q as in Q5_0.
struct BlockQ5_1 {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t qh[4];
  uint8_t qs[16];
};

// x[i] = d * qs[i].
struct BlockQ8_0 {
  uint16_t d;  // f16
  int8_t qs[32];
};

// Sub-block s = i / 16: x[i] = (d * low nibble of scales[s]) * q[i] - dmin * high nibble of scales[s].
// q has 2 bits. With half h = i / 128, pair p = (i % 128) / 32, l = i % 32: q[i] = qs[32 h + l] >> 2p & 3.
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d;     // f16
  uint16_t dmin;  // f16
};

// Sub-block s = i / 16: x[i] = (d * (scale[s] - 32)) * (q[i] - 4). q has 3 bits: bits 0..1 lie as in Q2_K;
// bit 2 of q[i] is bit i / 32 of hmask[i % 32]. scale[s] has 6 bits: bits 0..3 are the low (s < 8) or high (s
// >= 8) nibble of scales[s % 8]; bits 4..5 are scales[8 + s % 4] >> 2 (s / 4) & 3.
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;  // f16
};

// Sub-block s = i / 32: x[i] = (d * scale[s]) * q[i] - dmin * min[s]. q has 4 bits: with pair p = i / 64, l =
// i % 32: the nibble of qs[32 p + l], low for even s, high for odd s. scale and min have 6 bits, packed in
// scales as
//   s < 4:  scale[s] = scales[s] & 63,      min[s] = scales[s + 4] & 63
//   s >= 4: scale[s] = low nibble of scales[s + 4] | (scales[s - 4] >> 6) << 4
//           min[s]   = high nibble of scales[s + 4] | (scales[s] >> 6) << 4
struct BlockQ4_K {
  uint16_t d;     // f16
  uint16_t dmin;  // f16
  uint8_t scales[12];
  uint8_t qs[128];
};

// As Q4_K with a fifth bit: bit 4 of q[i] is bit i / 32 of qh[i % 32].
struct BlockQ5_K {
  uint16_t d;     // f16
  uint16_t dmin;  // f16
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};

// Sub-block s = i / 16: x[i] = (d * scales[s]) * (q[i] - 32). q has 6 bits. With half h = i / 128, quarter r
// = (i % 128) / 32, l = i % 32: bits 0..3 are a nibble of ql[64 h + 32 (r % 2) + l], low for r < 2, high for
// r >= 2; bits 4..5 are qh[32 h + l] >> 2r & 3.
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;  // f16
};

#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && alignof(BlockQ4_0) == 1);
static_assert(sizeof(BlockQ4_1) == 20 && alignof(BlockQ4_1) == 1);
static_assert(sizeof(BlockQ5_0) == 22 && alignof(BlockQ5_0) == 1);
static_assert(sizeof(BlockQ5_1) == 24 && alignof(BlockQ5_1) == 1);
static_assert(sizeof(BlockQ8_0) == 34 && alignof(BlockQ8_0) == 1);
static_assert(sizeof(BlockQ2_K) == 84 && alignof(BlockQ2_K) == 1);
static_assert(sizeof(BlockQ3_K) == 110 && alignof(BlockQ3_K) == 1);
static_assert(sizeof(BlockQ4_K) == 144 && alignof(BlockQ4_K) == 1);
static_assert(sizeof(BlockQ5_K) == 176 && alignof(BlockQ5_K) == 1);
static_assert(sizeof(BlockQ6_K) == 210 && alignof(BlockQ6_K) == 1);

// Scale and minimum of sub-block s (0..7) of a Q4_K or Q5_K block.
struct ScaleMin {
  uint8_t scale;  // 0..63
  uint8_t min;    // 0..63
};
inline ScaleMin UnpackScaleMin(const uint8_t scales[12], int s) {
  if (s < 4) {
    return {static_cast<uint8_t>(scales[s] & 63), static_cast<uint8_t>(scales[s + 4] & 63)};
  }
  return {static_cast<uint8_t>((scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4),
          static_cast<uint8_t>((scales[s + 4] >> 4) | (scales[s] >> 6) << 4)};
}

// Scale of sub-block s (0..15) of a Q3_K block, -32..31.
inline int UnpackQ3Scale(const uint8_t scales[12], int s) {
  const int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
  const int high = scales[8 + s % 4] >> (2 * (s / 4)) & 3;
  return (low | high << 4) - 32;
}

}  // namespace tandem::quant
