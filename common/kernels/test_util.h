// Weights and activations for the tests of the kernels.
#pragma once

#include <bit>
#include <cstdint>
#include <random>
#include <vector>

#include "common/gguf/gguf.h"
#include "common/kernels/kernels.h"
#include "common/quant/quant.h"

namespace tandem::kernels::testing {

using gguf::TensorType;

inline const std::vector<TensorType>& AllTypes() {
  static const std::vector<TensorType> types = {
      TensorType::kF32,  TensorType::kF16,  TensorType::kBF16, TensorType::kQ4_0, TensorType::kQ4_1,
      TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ8_0, TensorType::kQ2_K, TensorType::kQ3_K,
      TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K};
  return types;
}

inline bool IsFloat(TensorType t) { return gguf::GetTypeInfo(t).block_size == 1; }
inline int64_t BlockSize(TensorType t) { return gguf::GetTypeInfo(t).block_size; }

inline std::vector<float> Gaussian(std::mt19937& rng, int64_t n, float sigma = 1.0f) {
  std::normal_distribution<float> dist(0.0f, sigma);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& f : v) f = dist(rng);
  return v;
}

// Where in a block its half-precision scales stand.
inline std::vector<int> HalfOffsets(TensorType t) {
  switch (t) {
    case TensorType::kQ4_1:
    case TensorType::kQ5_1:
    case TensorType::kQ4_K:
    case TensorType::kQ5_K:
      return {0, 2};
    case TensorType::kQ2_K:
      return {80, 82};
    case TensorType::kQ3_K:
      return {108};
    case TensorType::kQ6_K:
      return {208};
    default:
      return {0};
  }
}

// A matrix that owns its bytes. One byte is kept free at the front, so that rows are never aligned.
struct Weights {
  std::vector<uint8_t> bytes;
  Matrix m;

  void Shape(TensorType type, int64_t rows, int64_t cols) {
    bytes.resize(static_cast<size_t>(gguf::RowBytes(type, cols) * rows + 1));
    m = Matrix::Of(type, bytes.data() + 1, rows, cols);
  }
  uint8_t* data() { return bytes.data() + 1; }
};

inline Weights QuantizedGaussian(std::mt19937& rng, TensorType type, int64_t rows, int64_t cols) {
  Weights w;
  w.Shape(type, rows, cols);
  const std::vector<float> values = Gaussian(rng, rows * cols);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<uint8_t> row(static_cast<size_t>(w.m.row_bytes));
    quant::Quantize(type, values.data() + r * cols, row.data(), cols);
    std::copy(row.begin(), row.end(), w.data() + r * w.m.row_bytes);
  }
  return w;
}

// Every bit random, but the half-precision numbers finite: `half` for all of them, or random ones up to 2 if
// 0.
inline Weights RandomBlocks(std::mt19937& rng, TensorType type, int64_t rows, int64_t cols,
                            uint16_t half = 0) {
  if (IsFloat(type)) return QuantizedGaussian(rng, type, rows, cols);
  Weights w;
  w.Shape(type, rows, cols);
  for (uint8_t& b : w.bytes) b = static_cast<uint8_t>(rng());
  const int64_t block_bytes = gguf::GetTypeInfo(type).type_size;
  const int64_t blocks = rows * cols / BlockSize(type);
  std::uniform_real_distribution<float> dist(-2.0f, 2.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int offset : HalfOffsets(type)) {
      // Now and then a subnormal half.
      const uint16_t h = half != 0         ? half
                         : rng() % 16 == 0 ? static_cast<uint16_t>(rng() % 0x400)
                                           : quant::FloatToHalf(dist(rng));
      uint8_t* p = w.data() + b * block_bytes + offset;
      p[0] = static_cast<uint8_t>(h & 255);
      p[1] = static_cast<uint8_t>(h >> 8);
    }
  }
  return w;
}

inline std::vector<uint32_t> Bits(const std::vector<float>& v) {
  std::vector<uint32_t> bits;
  for (float f : v) bits.push_back(std::bit_cast<uint32_t>(f));
  return bits;
}

// Sets the ISA for a scope.
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa) : before_(ActiveIsa()) { SetActiveIsaForTesting(isa); }
  ~ScopedIsa() { SetActiveIsaForTesting(before_); }

 private:
  Isa before_;
};

}  // namespace tandem::kernels::testing
