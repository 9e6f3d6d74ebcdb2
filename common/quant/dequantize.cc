// What the blocks mean, in plain loops: see blocks.h for the layouts.
#include <cstring>

#include "common/base/check.h"
#include "common/quant/blocks.h"
#include "common/quant/quant.h"

namespace tandem::quant {
namespace {

void Decode(const BlockQ4_0& b, float* x) {
  const float d = HalfToFloat(b.d);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * static_cast<float>((b.qs[j] & 15) - 8);
    x[j + 16] = d * static_cast<float>((b.qs[j] >> 4) - 8);
  }
}

void Decode(const BlockQ4_1& b, float* x) {
  const float d = HalfToFloat(b.d);
  const float m = HalfToFloat(b.m);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * static_cast<float>(b.qs[j] & 15) + m;
    x[j + 16] = d * static_cast<float>(b.qs[j] >> 4) + m;
  }
}

// The 5-bit integers of a Q5_0 or Q5_1 block.
void Unpack5(const uint8_t qh[4], const uint8_t qs[16], int q[32]) {
  uint32_t high;
  std::memcpy(&high, qh, sizeof high);
  for (int j = 0; j < 16; ++j) {
    q[j] = (qs[j] & 15) | static_cast<int>(high >> j & 1) << 4;
    q[j + 16] = (qs[j] >> 4) | static_cast<int>(high >> (j + 16) & 1) << 4;
  }
}

void Decode(const BlockQ5_0& b, float* x) {
  const float d = HalfToFloat(b.d);
  int q[32];
  Unpack5(b.qh, b.qs, q);
  for (int i = 0; i < 32; ++i) x[i] = d * static_cast<float>(q[i] - 16);
}

void Decode(const BlockQ5_1& b, float* x) {
  const float d = HalfToFloat(b.d);
  const float m = HalfToFloat(b.m);
  int q[32];
  Unpack5(b.qh, b.qs, q);
  for (int i = 0; i < 32; ++i) x[i] = d * static_cast<float>(q[i]) + m;
}

void Decode(const BlockQ8_0& b, float* x) {
  const float d = HalfToFloat(b.d);
  for (int i = 0; i < 32; ++i) x[i] = d * static_cast<float>(b.qs[i]);
}

void Decode(const BlockQ2_K& b, float* x) {
  const float d = HalfToFloat(b.d);
  const float dmin = HalfToFloat(b.dmin);
  for (int s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(b.scales[s] & 15);
    const float min = dmin * static_cast<float>(b.scales[s] >> 4);
    const uint8_t* qs = b.qs + 32 * (s / 8) + 16 * (s % 2);
    const int shift = 2 * (s % 8 / 2);
    for (int l = 0; l < 16; ++l) x[16 * s + l] = scale * static_cast<float>(qs[l] >> shift & 3) - min;
  }
}

void Decode(const BlockQ3_K& b, float* x) {
  const float d = HalfToFloat(b.d);
  for (int s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(UnpackQ3Scale(b.scales, s));
    const uint8_t* qs = b.qs + 32 * (s / 8) + 16 * (s % 2);
    const uint8_t* hmask = b.hmask + 16 * (s % 2);
    const int shift = 2 * (s % 8 / 2);
    for (int l = 0; l < 16; ++l) {
      const int q = (qs[l] >> shift & 3) | (hmask[l] >> (s / 2) & 1) << 2;
      x[16 * s + l] = scale * static_cast<float>(q - 4);
    }
  }
}

void Decode(const BlockQ4_K& b, float* x) {
  const float d = HalfToFloat(b.d);
  const float dmin = HalfToFloat(b.dmin);
  for (int s = 0; s < 8; ++s) {
    const ScaleMin sm = UnpackScaleMin(b.scales, s);
    const float scale = d * static_cast<float>(sm.scale);
    const float min = dmin * static_cast<float>(sm.min);
    const uint8_t* qs = b.qs + 32 * (s / 2);
    const int shift = 4 * (s % 2);
    for (int l = 0; l < 32; ++l) x[32 * s + l] = scale * static_cast<float>(qs[l] >> shift & 15) - min;
  }
}

void Decode(const BlockQ5_K& b, float* x) {
  const float d = HalfToFloat(b.d);
  const float dmin = HalfToFloat(b.dmin);
  for (int s = 0; s < 8; ++s) {
    const ScaleMin sm = UnpackScaleMin(b.scales, s);
    const float scale = d * static_cast<float>(sm.scale);
    const float min = dmin * static_cast<float>(sm.min);
    const uint8_t* qs = b.qs + 32 * (s / 2);
    const int shift = 4 * (s % 2);
    for (int l = 0; l < 32; ++l) {
      const int q = (qs[l] >> shift & 15) | (b.qh[l] >> s & 1) << 4;
      x[32 * s + l] = scale * static_cast<float>(q) - min;
    }
  }
}

void Decode(const BlockQ6_K& b, float* x) {
  const float d = HalfToFloat(b.d);
  for (int s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(b.scales[s]);
    const int half = s / 8;
    const int quarter = s % 8 / 2;
    const int l0 = 16 * (s % 2);
    const uint8_t* ql = b.ql + 64 * half + 32 * (quarter % 2) + l0;
    const uint8_t* qh = b.qh + 32 * half + l0;
    for (int l = 0; l < 16; ++l) {
      const int q = (ql[l] >> (4 * (quarter / 2)) & 15) | (qh[l] >> (2 * quarter) & 3) << 4;
      x[16 * s + l] = scale * static_cast<float>(q - 32);
    }
  }
}

template <typename Block, int kValues>
void DecodeAll(const void* src, float* dst, int64_t n) {
  const auto* blocks = static_cast<const Block*>(src);  // packed: any address is aligned enough
  for (int64_t i = 0; i < n / kValues; ++i) Decode(blocks[i], dst + i * kValues);
}

// F16 and BF16 data may stand at any address.
template <typename Convert>
void Widen(const void* src, float* dst, int64_t n, Convert convert) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t h;
    std::memcpy(&h, bytes + 2 * i, sizeof h);
    dst[i] = convert(h);
  }
}

}  // namespace

void Dequantize(gguf::TensorType type, const void* src, float* dst, int64_t n) {
  using gguf::TensorType;
  const gguf::TypeInfo info = gguf::GetTypeInfo(type);
  TANDEM_CHECK(info.supported && n >= 0 && n % info.block_size == 0);
  if (n == 0) return;
  switch (type) {
    case TensorType::kF32:
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    case TensorType::kF16:
      return Widen(src, dst, n, HalfToFloat);
    case TensorType::kBF16:
      return Widen(src, dst, n, Bf16ToFloat);
    case TensorType::kQ4_0:
      return DecodeAll<BlockQ4_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ4_1:
      return DecodeAll<BlockQ4_1, kSmallBlock>(src, dst, n);
    case TensorType::kQ5_0:
      return DecodeAll<BlockQ5_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ5_1:
      return DecodeAll<BlockQ5_1, kSmallBlock>(src, dst, n);
    case TensorType::kQ8_0:
      return DecodeAll<BlockQ8_0, kSmallBlock>(src, dst, n);
    case TensorType::kQ2_K:
      return DecodeAll<BlockQ2_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ3_K:
      return DecodeAll<BlockQ3_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ4_K:
      return DecodeAll<BlockQ4_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ5_K:
      return DecodeAll<BlockQ5_K, kSuperBlock>(src, dst, n);
    case TensorType::kQ6_K:
      return DecodeAll<BlockQ6_K, kSuperBlock>(src, dst, n);
  }
}

}  // namespace tandem::quant
