#include "cli/synth/random_blocks.h"

#include <cmath>
#include <cstring>

#include "common/base/check.h"
#include "common/quant/blocks.h"
#include "common/quant/quant.h"

namespace tandem::cli {
namespace {

using gguf::TensorType;

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

// Every block is random bits first; `finish` then sets its scales, so that the values are as wanted.
template <typename Block, typename Finish>
void FillBlocks(uint64_t seed, uint64_t first, std::span<uint8_t> out, const Finish& finish) {
  constexpr uint64_t kWords = (sizeof(Block) + 7) / 8;
  const uint64_t count = out.size() / sizeof(Block);
  for (uint64_t b = 0; b < count; ++b) {
    uint64_t words[kWords];
    const uint64_t base = seed + (first + b) * kWords * kGolden;
    for (uint64_t w = 0; w < kWords; ++w) words[w] = Mix(base + w * kGolden);
    Block block;
    std::memcpy(&block, words, sizeof block);
    finish(block);
    std::memcpy(out.data() + b * sizeof block, &block, sizeof block);
  }
}

// Uniform in [-bound, bound).
template <typename T, typename Convert>
void FillValues(uint64_t seed, uint64_t first, std::span<uint8_t> out, double bound, const Convert& convert) {
  const float step = static_cast<float>(bound / (1 << 23));
  const uint64_t count = out.size() / sizeof(T);
  for (uint64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<int64_t>(Mix(seed + (first + i) * kGolden) >> 40);
    const T value = convert(static_cast<float>(bits - (1 << 23)) * step);
    std::memcpy(out.data() + i * sizeof value, &value, sizeof value);
  }
}

// The 6-bit scales of a Q4_K or Q5_K block, each minimum the same number as its scale: with
// dmin = d * (half the largest q) the values are then centred on 0.
void EqualScalesAndMinima(uint8_t scales[12]) {
  std::memcpy(scales + 4, scales, 4);
  for (int i = 8; i < 12; ++i) scales[i] = static_cast<uint8_t>((scales[i] & 15) * 17);
}

// Root mean squares of what the formats hold, for uniform random bits and a scale of 1.
constexpr double kRmsSigned4 = 4.6368;   // -8..7
constexpr double kRmsCentred4 = 4.6098;  // 0..15, less 7.5
constexpr double kRmsSigned5 = 9.2466;   // -16..15
constexpr double kRmsCentred5 = 9.2331;  // 0..31, less 15.5
constexpr double kRmsSigned8 = 73.9020;  // -128..127
constexpr double kRmsScale6 = 36.5171;   // 0..63
constexpr double kRmsScale4 = 8.8034;    // 0..15
constexpr double kRmsCentred2 = 1.1180;  // 0..3, less 1.5
constexpr double kRmsSigned6 = 18.4797;  // -32..31
constexpr double kRmsSigned3 = 2.3452;   // -4..3

}  // namespace

uint64_t TensorSeed(uint64_t seed, std::string_view name) {
  uint64_t hash = Mix(seed + kGolden);
  for (const char c : name) hash = Mix(hash ^ static_cast<unsigned char>(c)) + kGolden;
  return hash;
}

void FillRandomBlocks(TensorType type, double rms, uint64_t seed, uint64_t first, std::span<uint8_t> out) {
  const gguf::TypeInfo info = gguf::GetTypeInfo(type);
  TANDEM_CHECK(info.supported && out.size() % info.type_size == 0);
  const double bound = rms * std::sqrt(3.0);
  const auto half = [](double value) { return quant::FloatToHalf(static_cast<float>(value)); };
  switch (type) {
    case TensorType::kF32:
      return FillValues<float>(seed, first, out, bound, [](float v) { return v; });
    case TensorType::kF16:
      return FillValues<uint16_t>(seed, first, out, bound, [](float v) { return quant::FloatToHalf(v); });
    case TensorType::kBF16:
      return FillValues<uint16_t>(seed, first, out, bound, [](float v) { return quant::FloatToBf16(v); });
    case TensorType::kQ4_0: {
      const uint16_t d = half(rms / kRmsSigned4);
      return FillBlocks<quant::BlockQ4_0>(seed, first, out, [&](quant::BlockQ4_0& b) { b.d = d; });
    }
    case TensorType::kQ4_1: {
      const uint16_t d = half(rms / kRmsCentred4), m = half(-7.5 * rms / kRmsCentred4);
      return FillBlocks<quant::BlockQ4_1>(seed, first, out, [&](quant::BlockQ4_1& b) { b.d = d, b.m = m; });
    }
    case TensorType::kQ5_0: {
      const uint16_t d = half(rms / kRmsSigned5);
      return FillBlocks<quant::BlockQ5_0>(seed, first, out, [&](quant::BlockQ5_0& b) { b.d = d; });
    }
    case TensorType::kQ5_1: {
      const uint16_t d = half(rms / kRmsCentred5), m = half(-15.5 * rms / kRmsCentred5);
      return FillBlocks<quant::BlockQ5_1>(seed, first, out, [&](quant::BlockQ5_1& b) { b.d = d, b.m = m; });
    }
    case TensorType::kQ8_0: {
      const uint16_t d = half(rms / kRmsSigned8);
      return FillBlocks<quant::BlockQ8_0>(seed, first, out, [&](quant::BlockQ8_0& b) { b.d = d; });
    }
    case TensorType::kQ2_K: {
      const double unit = rms / (kRmsScale4 * kRmsCentred2);
      const uint16_t d = half(unit), dmin = half(1.5 * unit);
      return FillBlocks<quant::BlockQ2_K>(seed, first, out, [&](quant::BlockQ2_K& b) {
        for (uint8_t& scale : b.scales) scale = static_cast<uint8_t>((scale & 15) * 17);
        b.d = d, b.dmin = dmin;
      });
    }
    case TensorType::kQ3_K: {
      const uint16_t d = half(rms / (kRmsSigned6 * kRmsSigned3));
      return FillBlocks<quant::BlockQ3_K>(seed, first, out, [&](quant::BlockQ3_K& b) { b.d = d; });
    }
    case TensorType::kQ4_K: {
      const double unit = rms / (kRmsScale6 * kRmsCentred4);
      const uint16_t d = half(unit), dmin = half(7.5 * unit);
      return FillBlocks<quant::BlockQ4_K>(seed, first, out, [&](quant::BlockQ4_K& b) {
        EqualScalesAndMinima(b.scales);
        b.d = d, b.dmin = dmin;
      });
    }
    case TensorType::kQ5_K: {
      const double unit = rms / (kRmsScale6 * kRmsCentred5);
      const uint16_t d = half(unit), dmin = half(15.5 * unit);
      return FillBlocks<quant::BlockQ5_K>(seed, first, out, [&](quant::BlockQ5_K& b) {
        EqualScalesAndMinima(b.scales);
        b.d = d, b.dmin = dmin;
      });
    }
    case TensorType::kQ6_K: {
      const uint16_t d = half(rms / (kRmsSigned8 * kRmsSigned6));
      return FillBlocks<quant::BlockQ6_K>(seed, first, out, [&](quant::BlockQ6_K& b) { b.d = d; });
    }
  }
}

}  // namespace tandem::cli
