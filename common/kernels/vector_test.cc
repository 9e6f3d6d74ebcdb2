// The vector helpers against the scalar twin, bit for bit, and against the mathematics.
#include <gtest/gtest.h>

#include <cmath>

#include "common/kernels/kernels.h"
#include "common/kernels/test_util.h"

namespace tandem::kernels {
namespace {

using namespace testing;  // NOLINT

constexpr int64_t kLengths[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 255, 256, 1000, 7168};

TEST(Vector, DotEqualsTheTwinAndTheSum) {
  std::mt19937 rng(201);
  for (int64_t n : kLengths) {
    const std::vector<float> a = Gaussian(rng, n), b = Gaussian(rng, n);
    double want = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      want += static_cast<double>(a[static_cast<size_t>(i)]) * b[static_cast<size_t>(i)];
    }
    uint32_t twin = 0;
    for (Isa isa : AvailableIsas()) {
      const ScopedIsa scoped(isa);
      const float got = Dot(a.data(), b.data(), n);
      if (isa == Isa::kScalar) twin = std::bit_cast<uint32_t>(got);
      EXPECT_EQ(twin, std::bit_cast<uint32_t>(got)) << IsaName(isa) << " length " << n;
      EXPECT_NEAR(got, want, 1e-5 * std::sqrt(static_cast<double>(n)) + 1e-6);
    }
  }
}

TEST(Vector, AxpyEqualsFma) {
  std::mt19937 rng(202);
  for (int64_t n : kLengths) {
    const std::vector<float> x = Gaussian(rng, n), y = Gaussian(rng, n);
    std::vector<float> want = y;
    for (size_t i = 0; i < want.size(); ++i) want[i] = std::fma(0.37f, x[i], y[i]);
    for (Isa isa : AvailableIsas()) {
      const ScopedIsa scoped(isa);
      std::vector<float> got = y;
      Axpy(0.37f, x.data(), got.data(), n);
      EXPECT_EQ(Bits(want), Bits(got)) << IsaName(isa) << " length " << n;
    }
  }
}

TEST(Vector, RmsNormEqualsTheTwinAndTheFormula) {
  std::mt19937 rng(203);
  for (int64_t n : kLengths) {
    const std::vector<float> x = Gaussian(rng, n, 3.0f), weight = Gaussian(rng, n);
    double squares = 0.0;
    for (float f : x) squares += static_cast<double>(f) * f;
    const double rms = std::sqrt(squares / static_cast<double>(n) + 1e-6);
    std::vector<uint32_t> twin;
    for (Isa isa : AvailableIsas()) {
      const ScopedIsa scoped(isa);
      std::vector<float> y(x.size());
      RmsNorm(x.data(), weight.data(), 1e-6f, y.data(), n);
      if (isa == Isa::kScalar) twin = Bits(y);
      EXPECT_EQ(twin, Bits(y)) << IsaName(isa) << " length " << n;
      for (size_t i = 0; i < y.size(); ++i) {
        EXPECT_NEAR(y[i], x[i] / rms * weight[i], 2e-6 * std::abs(weight[i] * x[i] / rms) + 1e-12);
      }
    }
  }
}

TEST(Vector, SiluMulEqualsTheTwinAndTheFormula) {
  std::mt19937 rng(204);
  for (int64_t n : kLengths) {
    std::vector<float> gate = Gaussian(rng, n, 8.0f);
    const std::vector<float> up = Gaussian(rng, n);
    const float corners[] = {0.0f,   -0.0f,   80.0f, -80.0f, 200.0f, -200.0f,
                             1e-30f, -1e-30f, 88.5f, -88.5f, 1e37f};
    for (size_t i = 0; i < gate.size() && i < 11 && n > 20; ++i) gate[i] = corners[i];
    std::vector<uint32_t> twin;
    for (Isa isa : AvailableIsas()) {
      const ScopedIsa scoped(isa);
      std::vector<float> y(gate.size());
      SiluMul(gate.data(), up.data(), y.data(), n);
      if (isa == Isa::kScalar) twin = Bits(y);
      EXPECT_EQ(twin, Bits(y)) << IsaName(isa) << " length " << n;
      for (size_t i = 0; i < y.size(); ++i) {
        const double g = gate[i];
        const double want = g / (1.0 + std::exp(-g)) * up[i];
        EXPECT_NEAR(y[i], want, 4e-7 * std::abs(want) + 1e-30) << gate[i];
      }
    }
  }
}

TEST(Vector, SiluMulWorksInPlaceAndKeepsNotANumber) {
  std::mt19937 rng(205);
  for (Isa isa : AvailableIsas()) {
    const ScopedIsa scoped(isa);
    std::vector<float> gate = Gaussian(rng, 50);
    gate[3] = NAN;
    gate[40] = NAN;
    const std::vector<float> up = Gaussian(rng, 50);
    std::vector<float> y(50);
    SiluMul(gate.data(), up.data(), y.data(), 50);
    std::vector<float> in_place = gate;
    SiluMul(in_place.data(), up.data(), in_place.data(), 50);
    for (size_t i = 0; i < 50; ++i) {
      EXPECT_EQ(std::isnan(y[i]), i == 3 || i == 40);
      if (!std::isnan(y[i])) {
        EXPECT_EQ(y[i], in_place[i]);
      }
    }
  }
}

}  // namespace
}  // namespace tandem::kernels
