// Block formats of GGUF weights: what the bits mean. The slow, plain reference that every kernel is checked
// against; also quantizers, for tests and synthetic models. Thread-safe: pure functions.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/gguf/gguf.h"

namespace tandem::quant {

float HalfToFloat(uint16_t h);
uint16_t FloatToHalf(float f);  // round to nearest even
inline float Bf16ToFloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
uint16_t FloatToBf16(float f);  // round to nearest even, NaN stays NaN

// `n` values (a multiple of the type's block size) from blocks at `src`, of any alignment, into `dst`.
// Layouts and the order of rounding: blocks.h.
void Dequantize(gguf::TensorType type, const void* src, float* dst, int64_t n);

// `n` values into blocks at `dst` (RowBytes(type, n) bytes). Round-to-nearest with per-block scales; not
// tuned for quality: the error is that of the format, not of the best search.
void Quantize(gguf::TensorType type, const float* src, void* dst, int64_t n);

}  // namespace tandem::quant
