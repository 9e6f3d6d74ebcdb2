// The scalar twins: what every other implementation must equal, bit for bit. Plain loops, one row and one
// token at a time. std::fma rounds once; every other operation rounds as written (-ffp-contract=off).
//
// K types, a block of 256 columns, activation scale dx, integers x, sub-blocks j of 16 or 32 columns:
//   isum = sum_j scale_j * sum_i q_i x_i,   msum = sum_j min_j * sum_i x_i           (exact)
//   Q4_K, Q5_K, Q2_K:  acc = fma(d * dx, float(isum), acc);  acc = fma(-(dmin * dx), float(msum), acc)
//   Q6_K, Q3_K:        isum over q - 32 or q - 4;            acc = fma(d * dx, float(isum), acc)
// Types with blocks of 32, activation scale dx, xsum = sum_i x_i:
//   Q8_0, Q4_0, Q5_0:  isum = sum_i (q_i - offset) x_i;      acc = fma(d * dx, float(isum), acc)
//   Q4_1, Q5_1:        acc = fma(d * dx, float(isum), acc);  acc = fma(m, dx * float(xsum), acc)
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/kernels/internal.h"
#include "common/quant/blocks.h"
#include "common/quant/quant.h"

namespace tandem::kernels::internal {
namespace {

// A decoded block of 256, or one of 32 in its first 32 values.
struct Ints {
  int q[256];
  int scale[16];
  int min[16];
  int sub;  // columns a scale
  float d;
  float m;
};

void DecodeBlock(const quant::BlockQ4_K& b, Ints& o) {
  o.sub = 32;
  o.d = quant::HalfToFloat(b.d);
  o.m = quant::HalfToFloat(b.dmin);
  for (int s = 0; s < 8; ++s) {
    const quant::ScaleMin sm = quant::UnpackScaleMin(b.scales, s);
    o.scale[s] = sm.scale;
    o.min[s] = sm.min;
  }
  for (int i = 0; i < 256; ++i) o.q[i] = b.qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
}

void DecodeBlock(const quant::BlockQ5_K& b, Ints& o) {
  o.sub = 32;
  o.d = quant::HalfToFloat(b.d);
  o.m = quant::HalfToFloat(b.dmin);
  for (int s = 0; s < 8; ++s) {
    const quant::ScaleMin sm = quant::UnpackScaleMin(b.scales, s);
    o.scale[s] = sm.scale;
    o.min[s] = sm.min;
  }
  for (int i = 0; i < 256; ++i) {
    o.q[i] = (b.qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15) | (b.qh[i % 32] >> (i / 32) & 1) << 4;
  }
}

void DecodeBlock(const quant::BlockQ6_K& b, Ints& o) {
  o.sub = 16;
  o.d = quant::HalfToFloat(b.d);
  for (int s = 0; s < 16; ++s) o.scale[s] = b.scales[s];
  for (int i = 0; i < 256; ++i) {
    const int h = i / 128, r = i % 128 / 32, l = i % 32;
    const int low = b.ql[64 * h + 32 * (r % 2) + l] >> (r / 2 * 4) & 15;
    o.q[i] = (low | (b.qh[32 * h + l] >> (2 * r) & 3) << 4) - 32;
  }
}

void DecodeBlock(const quant::BlockQ2_K& b, Ints& o) {
  o.sub = 16;
  o.d = quant::HalfToFloat(b.d);
  o.m = quant::HalfToFloat(b.dmin);
  for (int s = 0; s < 16; ++s) {
    o.scale[s] = b.scales[s] & 15;
    o.min[s] = b.scales[s] >> 4;
  }
  for (int i = 0; i < 256; ++i) o.q[i] = b.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}

void DecodeBlock(const quant::BlockQ3_K& b, Ints& o) {
  o.sub = 16;
  o.d = quant::HalfToFloat(b.d);
  for (int s = 0; s < 16; ++s) o.scale[s] = quant::UnpackQ3Scale(b.scales, s);
  for (int i = 0; i < 256; ++i) {
    const int low = b.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    o.q[i] = (low | (b.hmask[i % 32] >> (i / 32) & 1) << 2) - 4;
  }
}

void DecodeBlock(const quant::BlockQ8_0& b, Ints& o) {
  o.d = quant::HalfToFloat(b.d);
  for (int i = 0; i < 32; ++i) o.q[i] = b.qs[i];
}

void DecodeBlock(const quant::BlockQ4_0& b, Ints& o) {
  o.d = quant::HalfToFloat(b.d);
  for (int i = 0; i < 32; ++i) o.q[i] = (b.qs[i % 16] >> (i / 16 * 4) & 15) - 8;
}

void DecodeBlock(const quant::BlockQ4_1& b, Ints& o) {
  o.d = quant::HalfToFloat(b.d);
  o.m = quant::HalfToFloat(b.m);
  for (int i = 0; i < 32; ++i) o.q[i] = b.qs[i % 16] >> (i / 16 * 4) & 15;
}

int FifthBit(const uint8_t qh[4], int i) { return (qh[i / 8] >> (i % 8) & 1) << 4; }

void DecodeBlock(const quant::BlockQ5_0& b, Ints& o) {
  o.d = quant::HalfToFloat(b.d);
  for (int i = 0; i < 32; ++i) o.q[i] = ((b.qs[i % 16] >> (i / 16 * 4) & 15) | FifthBit(b.qh, i)) - 16;
}

void DecodeBlock(const quant::BlockQ5_1& b, Ints& o) {
  o.d = quant::HalfToFloat(b.d);
  o.m = quant::HalfToFloat(b.m);
  for (int i = 0; i < 32; ++i) o.q[i] = (b.qs[i % 16] >> (i / 16 * 4) & 15) | FifthBit(b.qh, i);
}

float StepK(const Ints& w, bool has_min, const int8_t* q, float dx, float acc) {
  int32_t isum = 0;
  int32_t msum = 0;
  for (int j = 0; j < 256 / w.sub; ++j) {
    int32_t dot = 0;
    int32_t sum = 0;
    for (int i = j * w.sub; i < (j + 1) * w.sub; ++i) {
      dot += w.q[i] * q[i];
      sum += q[i];
    }
    isum += w.scale[j] * dot;
    if (has_min) msum += w.min[j] * sum;
  }
  acc = std::fma(w.d * dx, static_cast<float>(isum), acc);
  if (has_min) acc = std::fma(-(w.m * dx), static_cast<float>(msum), acc);
  return acc;
}

float Step32(const Ints& w, bool has_min, const int8_t* q, float dx, float acc) {
  int32_t isum = 0;
  int32_t xsum = 0;
  for (int i = 0; i < 32; ++i) {
    isum += w.q[i] * q[i];
    xsum += q[i];
  }
  acc = std::fma(w.d * dx, static_cast<float>(isum), acc);
  if (has_min) acc = std::fma(w.m, dx * static_cast<float>(xsum), acc);
  return acc;
}

template <typename Block, bool kHasMin>
void QuantRows(const QuantArgs& a) {
  constexpr bool kK = sizeof(Block) > 40;  // the K types have the large blocks
  constexpr int64_t kCols = kK ? 256 : 32;
  const int64_t blocks = a.cols / kCols;
  const int64_t units = (a.cols + kUnit - 1) / kUnit;
  const int64_t per_leaf = kUnit / kCols;
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t id = a.ids == nullptr ? i : a.ids[i];
      float acc = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) {
        Block block;
        std::memcpy(&block, a.w + r * a.row_bytes + b * static_cast<int64_t>(sizeof(Block)), sizeof(Block));
        Ints w;
        DecodeBlock(block, w);
        const int64_t unit = b / per_leaf;
        const int64_t at = unit * a.tokens + id;
        const int8_t* q = a.q + at * kUnit + b % per_leaf * kCols;
        if constexpr (kK) {
          acc = StepK(w, kHasMin, q, a.d[at], acc);
        } else {
          acc = Step32(w, kHasMin, q, a.d[at * kSubBlocks + b % per_leaf], acc);
        }
        if (a.leaves && (b % per_leaf == per_leaf - 1 || b == blocks - 1)) {
          if (a.sum != nullptr) {
            const double term = static_cast<double>(a.sum_weights[i]) * static_cast<double>(acc);
            a.sum[a.sum_ids[i] * a.ld_sum + r] += (term + a.grid) - a.grid;
          } else {
            a.y[(i * a.rows + r) * units + unit] = acc;
          }
          acc = 0.0f;
        }
      }
      if (!a.leaves) a.y[i * a.ldy + r] = acc;
    }
  }
}

void QuantMatMul(const QuantArgs& a) {
  switch (a.type) {
    case kTypeQ4_0:
      return QuantRows<quant::BlockQ4_0, false>(a);
    case kTypeQ4_1:
      return QuantRows<quant::BlockQ4_1, true>(a);
    case kTypeQ5_0:
      return QuantRows<quant::BlockQ5_0, false>(a);
    case kTypeQ5_1:
      return QuantRows<quant::BlockQ5_1, true>(a);
    case kTypeQ8_0:
      return QuantRows<quant::BlockQ8_0, false>(a);
    case kTypeQ2_K:
      return QuantRows<quant::BlockQ2_K, true>(a);
    case kTypeQ3_K:
      return QuantRows<quant::BlockQ3_K, false>(a);
    case kTypeQ4_K:
      return QuantRows<quant::BlockQ4_K, true>(a);
    case kTypeQ5_K:
      return QuantRows<quant::BlockQ5_K, true>(a);
    case kTypeQ6_K:
      return QuantRows<quant::BlockQ6_K, false>(a);
    default:
      __builtin_trap();
  }
}

// Lanes added as a tree: 8, 4, 2, 1.
float Tree(const float lanes[16]) {
  float v[8];
  for (int l = 0; l < 8; ++l) v[l] = lanes[l] + lanes[l + 8];
  for (int l = 0; l < 4; ++l) v[l] = v[l] + v[l + 4];
  for (int l = 0; l < 2; ++l) v[l] = v[l] + v[l + 2];
  return v[0] + v[1];
}

float WeightAt(uint32_t type, const uint8_t* row, int64_t c) {
  if (type == kTypeF32) {
    float f;
    std::memcpy(&f, row + 4 * c, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, row + 2 * c, 2);
  return type == kTypeF16 ? quant::HalfToFloat(h) : quant::Bf16ToFloat(h);
}

void FloatMatMul(const FloatArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const uint8_t* row = a.w + r * a.row_bytes;
    for (int64_t i = 0; i < a.n; ++i) {
      const float* x = a.x + (a.ids == nullptr ? i : a.ids[i]) * a.x_stride;
      float lanes[16] = {};
      for (int64_t c = 0; c < a.cols; ++c)
        lanes[c % 16] = std::fma(WeightAt(a.type, row, c), x[c], lanes[c % 16]);
      a.y[i * a.ldy + r * a.row_step] = Tree(lanes);
    }
  }
}

// The scale of n values: NaN if one of them is not finite, 0 if it would be too small to divide by.
float ScaleOf(const float* x, int n) {
  uint32_t greatest = 0;
  for (int i = 0; i < n; ++i) greatest = std::max(greatest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  if (greatest >= 0x7f800000u) return std::numeric_limits<float>::quiet_NaN();
  const float scale = std::bit_cast<float>(greatest) / 127.0f;
  return scale < kSmallestScale ? 0.0f : scale;
}

int32_t QuantizeValues(const float* x, int n, float scale, int8_t* q) {
  if (!(scale > 0.0f)) {
    std::memset(q, 0, static_cast<size_t>(n));
    return 0;
  }
  const float inverse = 1.0f / scale;
  int32_t sum = 0;
  for (int i = 0; i < n; ++i) {
    q[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
    sum += q[i];
  }
  return sum;
}

void QuantizeK(const float* x, int8_t* q, float* d, int16_t* bsum16, int16_t* bsum32) {
  *d = ScaleOf(x, kUnit);
  for (int j = 0; j < 16; ++j)
    bsum16[j] = static_cast<int16_t>(QuantizeValues(x + 16 * j, 16, *d, q + 16 * j));
  for (int j = 0; j < 8; ++j) bsum32[j] = static_cast<int16_t>(bsum16[2 * j] + bsum16[2 * j + 1]);
}

void Quantize32(const float* x, int n, int8_t* q, float* d, int32_t* neg_bsum, float* dsum) {
  for (int j = 0; j < kSubBlocks; ++j) {
    d[j] = 32 * j < n ? ScaleOf(x + 32 * j, 32) : 0.0f;
    const int32_t sum = QuantizeValues(32 * j < n ? x + 32 * j : x, 32, d[j], q + 32 * j);
    neg_bsum[j] = -sum;
    dsum[j] = d[j] * static_cast<float>(sum);
  }
}

float Dot(const float* a, const float* b, int64_t n) {
  float lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % 16] = std::fma(a[i], b[i], lanes[i % 16]);
  return Tree(lanes);
}

void Axpy(float a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::fma(a, x[i], y[i]);
}

float Exp(float x) {
  x = x > kExpLow ? x : kExpLow;  // also NaN
  x = x < kExpHigh ? x : kExpHigh;
  const float n = std::nearbyintf(x * kLog2e);
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float p = kExpC4;
  p = std::fma(p, r, kExpC3);
  p = std::fma(p, r, kExpC2);
  p = std::fma(p, r, kExpC1);
  p = std::fma(p, r, kExpC0);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

void SiluMul(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] / (1.0f + Exp(0.0f - gate[i])) * up[i];
}

uint64_t Read(const uint8_t* data, int64_t bytes) {
  uint64_t sum = 0;
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    uint64_t v[4];
    std::memcpy(v, data + i, 32);
    sum ^= (v[0] ^ v[1]) ^ (v[2] ^ v[3]);
  }
  for (; i < bytes; ++i) sum += data[i];
  return sum;
}

constexpr KTables kTables = {"scalar", QuantMatMul, FloatMatMul, QuantizeK, Quantize32,
                             Dot,      Axpy,        SiluMul,     Read};

}  // namespace

const KTables* ScalarTables() { return &kTables; }

}  // namespace tandem::kernels::internal
