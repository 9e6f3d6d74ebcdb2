// Round-to-nearest quantizers. Scales come from the largest value of a block (symmetric formats) or its range
// (formats with a minimum); integers are then rounded against the scale as the block stores it, so that the
// rounding of the scale does not add up with that of the values. Values that are not finite give some block,
// not undefined behaviour.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/check.h"
#include "common/quant/blocks.h"
#include "common/quant/quant.h"

namespace tandem::quant {
namespace {

constexpr float kHalfMax = 65504.0f;

// Nearest integer within low..high; NaN gives low.
int RoundTo(float v, int low, int high) {
  if (!(v > static_cast<float>(low))) return low;
  if (v >= static_cast<float>(high)) return high;
  return static_cast<int>(std::lrint(v));
}

float Inverse(float v) { return v == 0.0f ? 0.0f : 1.0f / v; }

// Stored form of a scale, kept finite.
uint16_t HalfScale(float v) { return FloatToHalf(std::isnan(v) ? 0.0f : std::clamp(v, -kHalfMax, kHalfMax)); }

// The value of largest magnitude, with its sign.
float Extreme(const float* x, int n) {
  float out = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(out)) out = x[i];
  }
  return out;
}

struct Range {
  float min;
  float max;
};
Range RangeOf(const float* x, int n) {
  const auto [low, high] = std::minmax_element(x, x + n);
  return {*low, *high};
}

// Scales of symmetric formats are signed: the largest value meets the negative end, which reaches one
// further.
void Encode(const float* x, BlockQ4_0* b) {
  b->d = HalfScale(Extreme(x, 32) / -8.0f);
  const float inverse = Inverse(HalfToFloat(b->d));
  for (int j = 0; j < 16; ++j) {
    const int low = RoundTo(x[j] * inverse + 8.0f, 0, 15);
    const int high = RoundTo(x[j + 16] * inverse + 8.0f, 0, 15);
    b->qs[j] = static_cast<uint8_t>(low | high << 4);
  }
}

void Encode(const float* x, BlockQ4_1* b) {
  const Range r = RangeOf(x, 32);
  b->d = HalfScale((r.max - r.min) / 15.0f);
  b->m = HalfScale(r.min);
  const float inverse = Inverse(HalfToFloat(b->d));
  const float m = HalfToFloat(b->m);
  for (int j = 0; j < 16; ++j) {
    const int low = RoundTo((x[j] - m) * inverse, 0, 15);
    const int high = RoundTo((x[j + 16] - m) * inverse, 0, 15);
    b->qs[j] = static_cast<uint8_t>(low | high << 4);
  }
}

// Packs 5-bit integers into the fields of a Q5_0 or Q5_1 block.
void Pack5(const int q[32], uint8_t qh[4], uint8_t qs[16]) {
  uint32_t high = 0;
  for (int i = 0; i < 32; ++i) high |= static_cast<uint32_t>(q[i] >> 4) << i;
  for (int j = 0; j < 16; ++j) qs[j] = static_cast<uint8_t>((q[j] & 15) | (q[j + 16] & 15) << 4);
  std::memcpy(qh, &high, sizeof high);
}

void Encode(const float* x, BlockQ5_0* b) {
  b->d = HalfScale(Extreme(x, 32) / -16.0f);
  const float inverse = Inverse(HalfToFloat(b->d));
  int q[32];
  for (int i = 0; i < 32; ++i) q[i] = RoundTo(x[i] * inverse + 16.0f, 0, 31);
  Pack5(q, b->qh, b->qs);
}

void Encode(const float* x, BlockQ5_1* b) {
  const Range r = RangeOf(x, 32);
  b->d = HalfScale((r.max - r.min) / 31.0f);
  b->m = HalfScale(r.min);
  const float inverse = Inverse(HalfToFloat(b->d));
  const float m = HalfToFloat(b->m);
  int q[32];
  for (int i = 0; i < 32; ++i) q[i] = RoundTo((x[i] - m) * inverse, 0, 31);
  Pack5(q, b->qh, b->qs);
}

void Encode(const float* x, BlockQ8_0* b) {
  b->d = HalfScale(std::fabs(Extreme(x, 32)) / 127.0f);
  const float inverse = Inverse(HalfToFloat(b->d));
  for (int i = 0; i < 32; ++i) b->qs[i] = static_cast<int8_t>(RoundTo(x[i] * inverse, -127, 127));
}

// Scales and minimums of a K block with minimums, in `kSub` sub-blocks: as integers of up to `limit`, against
// the halves d and dmin. The minimum is stored as the non-negative number that is subtracted.
template <int kSub>
struct SubScales {
  uint16_t d;
  uint16_t dmin;
  int scale[kSub];
  int min[kSub];

  // `q_max`: the largest integer of a value.
  SubScales(const float* x, int q_max, int limit) {
    constexpr int kLength = kSuperBlock / kSub;
    float scales[kSub];
    float mins[kSub];
    for (int s = 0; s < kSub; ++s) {
      const Range r = RangeOf(x + s * kLength, kLength);
      mins[s] = std::max(0.0f, -r.min);
      scales[s] = std::max(0.0f, r.max + mins[s]) / static_cast<float>(q_max);
    }
    d = HalfScale(*std::max_element(scales, scales + kSub) / static_cast<float>(limit));
    dmin = HalfScale(*std::max_element(mins, mins + kSub) / static_cast<float>(limit));
    const float inverse_d = Inverse(HalfToFloat(d));
    const float inverse_dmin = Inverse(HalfToFloat(dmin));
    for (int s = 0; s < kSub; ++s) {
      scale[s] = RoundTo(scales[s] * inverse_d, 0, limit);
      min[s] = RoundTo(mins[s] * inverse_dmin, 0, limit);
    }
  }

  // The integers of all values.
  void Round(const float* x, int q_max, int q[kSuperBlock]) const {
    constexpr int kLength = kSuperBlock / kSub;
    for (int s = 0; s < kSub; ++s) {
      const float inverse = Inverse(HalfToFloat(d) * static_cast<float>(scale[s]));
      const float offset = HalfToFloat(dmin) * static_cast<float>(min[s]);
      for (int i = s * kLength; i < (s + 1) * kLength; ++i)
        q[i] = RoundTo((x[i] + offset) * inverse, 0, q_max);
    }
  }
};

// Packs 2 bits of each value as Q2_K and Q3_K hold them.
void Pack2(const int q[kSuperBlock], uint8_t qs[64]) {
  std::memset(qs, 0, 64);
  for (int i = 0; i < kSuperBlock; ++i) {
    qs[32 * (i / 128) + i % 32] |= static_cast<uint8_t>((q[i] & 3) << (2 * (i % 128 / 32)));
  }
}

// Packs 4 bits of each value as Q4_K and Q5_K hold them.
void Pack4(const int q[kSuperBlock], uint8_t qs[128]) {
  std::memset(qs, 0, 128);
  for (int i = 0; i < kSuperBlock; ++i) {
    qs[32 * (i / 64) + i % 32] |= static_cast<uint8_t>((q[i] & 15) << (4 * (i / 32 % 2)));
  }
}

// The inverse of UnpackScaleMin, for all eight sub-blocks.
void PackScaleMins(const int scale[8], const int min[8], uint8_t scales[12]) {
  for (int s = 0; s < 4; ++s) {
    scales[s] = static_cast<uint8_t>(scale[s] | (scale[s + 4] >> 4) << 6);
    scales[s + 4] = static_cast<uint8_t>(min[s] | (min[s + 4] >> 4) << 6);
    scales[s + 8] = static_cast<uint8_t>((scale[s + 4] & 15) | (min[s + 4] & 15) << 4);
  }
}

void Encode(const float* x, BlockQ2_K* b) {
  const SubScales<16> sub(x, 3, 15);
  int q[kSuperBlock];
  sub.Round(x, 3, q);
  b->d = sub.d;
  b->dmin = sub.dmin;
  for (int s = 0; s < 16; ++s) b->scales[s] = static_cast<uint8_t>(sub.scale[s] | sub.min[s] << 4);
  Pack2(q, b->qs);
}

// Symmetric K formats: the scale of each of 16 sub-blocks as an integer of magnitude up to `limit`, against
// d. Values take q_min .. -q_min - 1.
uint16_t SymmetricScales(const float* x, int q_min, int limit, int scale[16], int q[kSuperBlock]) {
  float scales[16];
  for (int s = 0; s < 16; ++s) scales[s] = Extreme(x + 16 * s, 16) / static_cast<float>(q_min);
  const uint16_t half = HalfScale(std::fabs(Extreme(scales, 16)) / static_cast<float>(limit));
  const float d = HalfToFloat(half);
  const float inverse_d = Inverse(d);
  for (int s = 0; s < 16; ++s) {
    scale[s] = RoundTo(scales[s] * inverse_d, -limit, limit);
    const float inverse = Inverse(d * static_cast<float>(scale[s]));
    for (int i = 16 * s; i < 16 * s + 16; ++i) q[i] = RoundTo(x[i] * inverse, q_min, -q_min - 1);
  }
  return half;
}

void Encode(const float* x, BlockQ3_K* b) {
  int scale[16];
  int q[kSuperBlock];
  b->d = SymmetricScales(x, -4, 31, scale, q);
  std::memset(b->scales, 0, sizeof b->scales);
  std::memset(b->hmask, 0, sizeof b->hmask);
  for (int s = 0; s < 16; ++s) {
    const int stored = scale[s] + 32;
    b->scales[s % 8] |= static_cast<uint8_t>((stored & 15) << (s < 8 ? 0 : 4));
    b->scales[8 + s % 4] |= static_cast<uint8_t>((stored >> 4) << (2 * (s / 4)));
  }
  for (int i = 0; i < kSuperBlock; ++i) {
    q[i] += 4;
    b->hmask[i % 32] |= static_cast<uint8_t>((q[i] >> 2) << (i / 32));
  }
  Pack2(q, b->qs);
}

void Encode(const float* x, BlockQ4_K* b) {
  const SubScales<8> sub(x, 15, 63);
  int q[kSuperBlock];
  sub.Round(x, 15, q);
  b->d = sub.d;
  b->dmin = sub.dmin;
  PackScaleMins(sub.scale, sub.min, b->scales);
  Pack4(q, b->qs);
}

void Encode(const float* x, BlockQ5_K* b) {
  const SubScales<8> sub(x, 31, 63);
  int q[kSuperBlock];
  sub.Round(x, 31, q);
  b->d = sub.d;
  b->dmin = sub.dmin;
  PackScaleMins(sub.scale, sub.min, b->scales);
  Pack4(q, b->qs);
  std::memset(b->qh, 0, sizeof b->qh);
  for (int i = 0; i < kSuperBlock; ++i) b->qh[i % 32] |= static_cast<uint8_t>((q[i] >> 4) << (i / 32));
}

void Encode(const float* x, BlockQ6_K* b) {
  int scale[16];
  int q[kSuperBlock];
  b->d = SymmetricScales(x, -32, 127, scale, q);
  for (int s = 0; s < 16; ++s) b->scales[s] = static_cast<int8_t>(scale[s]);
  std::memset(b->ql, 0, sizeof b->ql);
  std::memset(b->qh, 0, sizeof b->qh);
  for (int i = 0; i < kSuperBlock; ++i) {
    const int stored = q[i] + 32;
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int l = i % 32;
    b->ql[64 * half + 32 * (quarter % 2) + l] |= static_cast<uint8_t>((stored & 15) << (4 * (quarter / 2)));
    b->qh[32 * half + l] |= static_cast<uint8_t>((stored >> 4) << (2 * quarter));
  }
}

template <typename Block, int kValues>
void EncodeAll(const float* src, void* dst, int64_t n) {
  auto* blocks = static_cast<Block*>(dst);  // packed: any address is aligned enough
  for (int64_t i = 0; i < n / kValues; ++i) Encode(src + i * kValues, &blocks[i]);
}

template <typename Convert>
void Narrow(const float* src, void* dst, int64_t n, Convert convert) {
  auto* bytes = static_cast<uint8_t*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t h = convert(src[i]);
    std::memcpy(bytes + 2 * i, &h, sizeof h);
  }
}

}  // namespace

void Quantize(gguf::TensorType type, const float* src, void* dst, int64_t n) {
  using gguf::TensorType;
  const gguf::TypeInfo info = gguf::GetTypeInfo(type);
  TANDEM_CHECK(info.supported && n >= 0 && n % info.block_size == 0);
  if (n == 0) return;
  switch (type) {
    case TensorType::kF32:
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    case TensorType::kF16:
      return Narrow(src, dst, n, FloatToHalf);
    case TensorType::kBF16:
      return Narrow(src, dst, n, FloatToBf16);
    case TensorType::kQ4_0:
      return EncodeAll<BlockQ4_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ4_1:
      return EncodeAll<BlockQ4_1, kSmallBlock>(src, dst, n);
    case TensorType::kQ5_0:
      return EncodeAll<BlockQ5_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ5_1:
      return EncodeAll<BlockQ5_1, kSmallBlock>(src, dst, n);
    case TensorType::kQ8_0:
      return EncodeAll<BlockQ8_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ2_K:
      return EncodeAll<BlockQ2_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ3_K:
      return EncodeAll<BlockQ3_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ4_K:
      return EncodeAll<BlockQ4_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ5_K:
      return EncodeAll<BlockQ5_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ6_K:
      return EncodeAll<BlockQ6_K, kSuperBlock>(src, dst, n);
  }
}

}  // namespace tandem::quant
