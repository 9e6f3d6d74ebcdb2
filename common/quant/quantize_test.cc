// Quantize, then dequantize: errors within what each format allows, on data of several shapes.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/quant/quant.h"

namespace tandem::quant {
namespace {

using gguf::TensorType;

constexpr TensorType kQuantized[] = {
    TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ8_0,
    TensorType::kQ2_K, TensorType::kQ3_K, TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K};

std::vector<float> RoundTrip(TensorType type, const std::vector<float>& x) {
  const auto n = static_cast<int64_t>(x.size());
  // A guard behind the blocks: nothing may be written there.
  const auto bytes = static_cast<size_t>(gguf::RowBytes(type, n));
  std::vector<uint8_t> blocks(bytes + 16, 0xcd);
  Quantize(type, x.data(), blocks.data(), n);
  for (size_t i = bytes; i < blocks.size(); ++i) EXPECT_EQ(blocks[i], 0xcd) << gguf::TypeName(type);
  std::vector<float> out(x.size(), NAN);
  Dequantize(type, blocks.data(), out.data(), n);
  return out;
}

double RelativeRms(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  double power = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * static_cast<double>(a[i] - b[i]);
    power += b[i] * static_cast<double>(b[i]);
  }
  return std::sqrt(error / power);
}

std::vector<float> Gaussian(size_t n, float mean, float deviation) {
  std::mt19937 random(11);
  std::vector<float> out(n);
  for (float& v : out) {  // Box-Muller, so that the numbers are the same with every standard library
    const double u1 = (static_cast<double>(random()) + 1) / 4294967297.0;
    const double u2 = static_cast<double>(random()) / 4294967296.0;
    v = mean + deviation * static_cast<float>(std::sqrt(-2 * std::log(u1)) * std::cos(2 * M_PI * u2));
  }
  return out;
}

// Upper and lower bound of the relative RMS error on normally distributed values: the upper catches a
// quantizer that wastes bits, the lower a test that compares the data with itself.
struct Bounds {
  TensorType type;
  double low;
  double high;
};

TEST(Quantize, ErrorOnGaussianDataIsThatOfTheFormat) {
  const std::vector<float> x = Gaussian(256 * 400, 0.0f, 0.02f);
  for (const Bounds& b : {Bounds{TensorType::kF16, 1e-5, 4e-4}, Bounds{TensorType::kBF16, 1e-4, 3e-3},
                          Bounds{TensorType::kQ4_0, 0.05, 0.10}, Bounds{TensorType::kQ4_1, 0.04, 0.09},
                          Bounds{TensorType::kQ5_0, 0.02, 0.05}, Bounds{TensorType::kQ5_1, 0.02, 0.045},
                          Bounds{TensorType::kQ8_0, 0.002, 0.007}, Bounds{TensorType::kQ2_K, 0.2, 0.40},
                          Bounds{TensorType::kQ3_K, 0.08, 0.20}, Bounds{TensorType::kQ4_K, 0.04, 0.09},
                          Bounds{TensorType::kQ5_K, 0.02, 0.045}, Bounds{TensorType::kQ6_K, 0.01, 0.025}}) {
    const double error = RelativeRms(RoundTrip(b.type, x), x);
    EXPECT_LT(error, b.high) << gguf::TypeName(b.type);
    EXPECT_GT(error, b.low) << gguf::TypeName(b.type);
  }
  EXPECT_EQ(RoundTrip(TensorType::kF32, x), x);
}

// Each value is off by at most a step (half a step, and what rounding the scale of its sub-block adds).
TEST(Quantize, EveryValueIsWithinAStep) {
  const std::vector<float> x = Gaussian(256 * 100, 0.01f, 0.05f);
  for (const auto& [type, length, levels] :
       std::vector<std::tuple<TensorType, int, int>>{{TensorType::kQ4_0, 32, 15},
                                                     {TensorType::kQ4_1, 32, 15},
                                                     {TensorType::kQ5_0, 32, 31},
                                                     {TensorType::kQ5_1, 32, 31},
                                                     {TensorType::kQ8_0, 32, 254}}) {
    const std::vector<float> y = RoundTrip(type, x);
    for (size_t block = 0; block < x.size(); block += static_cast<size_t>(length)) {
      float extreme = 0;
      for (int i = 0; i < length; ++i) extreme = std::max(extreme, std::fabs(x[block + i]));
      const float step = 2 * extreme / static_cast<float>(levels);
      for (int i = 0; i < length; ++i) {
        ASSERT_NEAR(y[block + i], x[block + i], 1.1f * step)
            << gguf::TypeName(type) << " value " << block + i;
      }
    }
  }
}

TEST(Quantize, FormatsWithAMinimumHandleOneSidedData) {
  // Values in 1 .. 1.1: a symmetric format of 4 bits sees one level of them; one with a minimum sees them
  // all.
  std::vector<float> x(512);
  for (size_t i = 0; i < x.size(); ++i) x[i] = -1.1f + 0.1f * static_cast<float>(i % 32) / 31.0f;
  EXPECT_LT(RelativeRms(RoundTrip(TensorType::kQ4_1, x), x), 0.003);
  EXPECT_LT(RelativeRms(RoundTrip(TensorType::kQ5_1, x), x), 0.0015);
  EXPECT_LT(RelativeRms(RoundTrip(TensorType::kQ4_K, x), x), 0.01);
  EXPECT_LT(RelativeRms(RoundTrip(TensorType::kQ5_K, x), x), 0.01);
}

TEST(Quantize, ZerosStayZero) {
  const std::vector<float> zeros(512, 0.0f);
  for (const TensorType type : kQuantized) {
    for (const float v : RoundTrip(type, zeros)) ASSERT_EQ(v, 0.0f) << gguf::TypeName(type);
  }
}

TEST(Quantize, AConstantIsKept) {
  for (const float constant : {1.0f, -1.0f, 0.37f, -1000.0f, 0.03f}) {
    const std::vector<float> x(256, constant);
    for (const TensorType type : kQuantized) {
      const std::vector<float> y = RoundTrip(type, x);
      for (const float v : y) ASSERT_NEAR(v, constant, 0.02f * std::fabs(constant)) << gguf::TypeName(type);
    }
  }
}

TEST(Quantize, OneSpikeSurvives) {
  std::vector<float> x(512, 0.0f);
  x[300] = -7.5f;
  x[17] = 3.25f;
  for (const TensorType type : kQuantized) {
    const std::vector<float> y = RoundTrip(type, x);
    EXPECT_NEAR(y[300], -7.5f, 0.2f) << gguf::TypeName(type);
    EXPECT_NEAR(y[17], 3.25f, 0.1f) << gguf::TypeName(type);
    EXPECT_NEAR(y[100], 0.0f, 0.1f) << gguf::TypeName(type);
  }
}

TEST(Quantize, HugeAndNotFiniteValuesGiveSomeBlock) {
  for (const float bad : {std::numeric_limits<float>::max(), INFINITY, -INFINITY, std::nanf(""), 1e-40f}) {
    std::vector<float> x = Gaussian(512, 0.0f, 1.0f);
    x[5] = bad;
    x[400] = -bad;
    for (const TensorType type : kQuantized) {
      const std::vector<float> y = RoundTrip(type, x);
      // Scales are kept finite, so every decoded value is.
      for (const float v : y) ASSERT_TRUE(std::isfinite(v)) << gguf::TypeName(type) << " with " << bad;
    }
  }
}

TEST(Quantize, AQuantizedBlockQuantizesToItself) {
  const std::vector<float> x = Gaussian(512, 0.0f, 0.5f);
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ5_0, TensorType::kQ8_0}) {
    const std::vector<float> once = RoundTrip(type, x);
    const std::vector<float> twice = RoundTrip(type, once);
    EXPECT_LT(RelativeRms(twice, once), 1e-3) << gguf::TypeName(type);
  }
}

}  // namespace
}  // namespace tandem::quant
