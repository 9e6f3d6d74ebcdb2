// The products on bf16 tiles, emulated and (where the machine has them) real, against double sums.
#include "common/kernels/bulk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/kernels/activations.h"
#include "common/kernels/bulk_emulated_for_test.h"
#include "common/kernels/test_util.h"

namespace tandem::kernels {
namespace {

using namespace testing;  // NOLINT

enum class Unit { kEmulated, kReal };

class Bulk : public ::testing::TestWithParam<std::tuple<Unit, TensorType>> {
 protected:
  void SetUp() override {
    if (std::get<0>(GetParam()) == Unit::kReal) {
      if (!BulkAvailable()) GTEST_SKIP() << "needs AMX-BF16";
    } else {
      if (!emulated_.usable()) GTEST_SKIP() << "needs AVX512-BF16";
      emulated_.Use();
    }
  }
  TensorType type() const { return std::get<1>(GetParam()); }

  EmulatedBulk emulated_;
};

INSTANTIATE_TEST_SUITE_P(Types, Bulk,
                         ::testing::Combine(::testing::Values(Unit::kEmulated, Unit::kReal),
                                            ::testing::Values(TensorType::kQ4_K, TensorType::kQ5_K,
                                                              TensorType::kQ6_K, TensorType::kQ8_0)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == Unit::kReal ? "real_"
                                                                                     : "emulated_") +
                                  std::string(gguf::TypeName(std::get<1>(info.param)));
                         });

// Tokens in the tiles' form.
struct Tokens {
  Tokens(TensorType type, const std::vector<float>& x, int64_t count, int64_t columns)
      : n(count), cols(columns), tiles(BulkTiles(count)) {
    std::vector<uint16_t> rows(static_cast<size_t>(n * cols));
    for (int64_t t = 0; t < n; ++t) {
      BulkOrderFloat(type, reinterpret_cast<const uint8_t*>(x.data() + t * cols), cols,
                     rows.data() + t * cols);
    }
    std::vector<int32_t> ids(static_cast<size_t>(n));
    std::iota(ids.begin(), ids.end(), 0);
    words.Resize(BulkTokenWords(tiles, cols));
    for (int64_t t = 0; t < tiles; ++t) {
      const auto first = static_cast<size_t>(t * kBulkTileTokens);
      const size_t here = std::min<size_t>(kBulkTileTokens, ids.size() - first);
      BulkPack(rows.data(), cols, std::span(ids).subspan(first, here),
               words.data() + BulkTokenWords(t, cols));
    }
  }
  int64_t n, cols, tiles;
  Buffer<uint16_t> words;
};

struct Sums {
  Sums(const Matrix& w, const Tokens& x, int64_t begin, int64_t end) : tiles(x.tiles), row_begin(begin) {
    values.Resize(BulkSums(x.tiles, end - begin));
    BulkMatMul(w, begin, end, x.words.data(), x.tiles, values.data(), {&w, begin, end, x.n});
  }
  float At(int64_t row, int64_t token) const {
    const int64_t r = row - row_begin;
    return values.data()[((r / 16 * tiles + token / 16) * 16 + r % 16) * 16 + token % 16];
  }
  int64_t tiles, row_begin;
  Buffer<float> values;
};

TEST_P(Bulk, AgreesWithDoubleSums) {
  std::mt19937 rng(401);
  for (const int64_t n : {1, 15, 16, 17, 32, 33, 50, 100}) {
    const int64_t rows = 32 * (1 + static_cast<int64_t>(rng() % 6));
    const int64_t cols = 256 * (1 + static_cast<int64_t>(rng() % 5));
    Weights w =
        n % 2 == 0 ? QuantizedGaussian(rng, type(), rows, cols) : RandomBlocks(rng, type(), rows, cols);
    const std::vector<float> x = Gaussian(rng, n * cols);
    const Tokens tokens(type(), x, n, cols);
    const Sums sums(w.m, tokens, 0, rows);
    std::vector<float> row(static_cast<size_t>(cols));
    double error = 0, size = 0;
    for (int64_t r = 0; r < rows; ++r) {
      quant::Dequantize(type(), w.m.data + r * w.m.row_bytes, row.data(), cols);
      for (int64_t t = 0; t < n; ++t) {
        double sum = 0, magnitude = 0, squares = 0;
        for (int64_t c = 0; c < cols; ++c) {
          const double term =
              static_cast<double>(row[static_cast<size_t>(c)]) * x[static_cast<size_t>(t * cols + c)];
          sum += term;
          magnitude += std::fabs(term);
          squares += term * term;
        }
        const double off = sums.At(r, t) - sum;
        // Either factor is off by up to 2^-9 of itself.
        ASSERT_LE(std::fabs(off), 1.01 / 256 * magnitude + 1e-4)
            << "row " << r << " token " << t << " of " << n;
        error += off * off;
        size += squares;
      }
    }
    EXPECT_LE(std::sqrt(error / size), 0.0035) << n << " tokens";
  }
}

// The many tokens are passed a unit of columns at a time, the few a block of rows at a time.
TEST_P(Bulk, AResultDependsOnItsRowAndTokenAlone) {
  std::mt19937 rng(402);
  const int64_t rows = 224, cols = 1280, n = 300;
  Weights w = QuantizedGaussian(rng, type(), rows, cols);
  const std::vector<float> x = Gaussian(rng, n * cols);
  const Sums all(w.m, Tokens(type(), x, n, cols), 0, rows);
  for (const int64_t some : {1, 16, 20, 40, 290}) {
    const std::vector<float> last(x.end() - some * cols, x.end());
    const int64_t begin = 32 * static_cast<int64_t>(rng() % 4);
    const Sums part(w.m, Tokens(type(), last, some, cols), begin, begin + 96);
    for (int64_t r = begin; r < begin + 96; ++r) {
      for (int64_t t = 0; t < some; ++t) {
        ASSERT_EQ(part.At(r, t), all.At(r, n - some + t)) << "row " << r << " token " << t << " of " << some;
      }
    }
  }
}

TEST_P(Bulk, NaNStaysInItsToken) {
  std::mt19937 rng(403);
  const int64_t rows = 64, cols = 512, n = 20;
  Weights w = QuantizedGaussian(rng, type(), rows, cols);
  std::vector<float> x = Gaussian(rng, n * cols);
  x[static_cast<size_t>(7 * cols + 300)] = std::nanf("");
  const Sums sums(w.m, Tokens(type(), x, n, cols), 0, rows);
  for (int64_t t = 0; t < n; ++t) EXPECT_EQ(std::isnan(sums.At(5, t)), t == 7);
}

// Gate and up become the tokens of the next product; its sums are added up by token.
TEST_P(Bulk, FromSumsToTokensAndAnswers) {
  std::mt19937 rng(404);
  const int64_t cols = 512, n = 37, tiles = BulkTiles(n);
  Buffer<float> gate, up;
  Tokens next(type(), std::vector<float>(static_cast<size_t>(n * cols)), n, cols);
  std::vector<float> h(static_cast<size_t>(n * cols));
  for (int64_t begin = 0; begin < cols; begin += 96) {
    const int64_t rows = std::min<int64_t>(96, cols - begin);
    gate.Resize(BulkSums(tiles, 96));
    up.Resize(BulkSums(tiles, 96));
    const std::vector<float> g = Gaussian(rng, BulkSums(tiles, rows)),
                             u = Gaussian(rng, BulkSums(tiles, rows));
    std::copy(g.begin(), g.end(), gate.data());
    std::copy(u.begin(), u.end(), up.data());
    std::vector<float> y(g.size());
    SiluMul(g.data(), u.data(), y.data(), static_cast<int64_t>(g.size()));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = 0; t < n; ++t) {
        h[static_cast<size_t>(t * cols + begin + r)] =
            y[static_cast<size_t>(((r / 16 * tiles + t / 16) * 16 + r % 16) * 16 + t % 16)];
      }
    }
    BulkSiluMul(type(), gate.data(), up.data(), tiles, begin, begin + rows, cols, next.words.data());
  }
  const Tokens expected(type(), h, n, cols);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t place = 0; place < cols; ++place) {
      const int64_t at =
          (t / 16 * (cols / 32) + place / 32) * 512 + place % 32 / 2 * 32 + t % 16 * 2 + place % 2;
      ASSERT_EQ(next.words.data()[at], expected.words.data()[at]) << "token " << t << " place " << place;
    }
  }

  const int64_t out = 160, ld = out + 64, begin = 32, end = 128;
  Weights w = QuantizedGaussian(rng, type(), out, cols);
  const Sums sums(w.m, next, begin, end);
  std::vector<float> weights = Gaussian(rng, n);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int64_t t = 0; t < n; ++t) ids[static_cast<size_t>(t)] = static_cast<int32_t>(t / 2);
  std::vector<double> sum(static_cast<size_t>(n * ld), 1.0), want = sum;
  const double grid = 6291456.0;
  BulkAdd(sums.values.data(), tiles, n, begin, end, {weights.data(), ids.data(), sum.data(), ld, grid});
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = begin; r < end; ++r) {
      const double term = static_cast<double>(weights[static_cast<size_t>(t)]) * sums.At(r, t);
      want[static_cast<size_t>(ids[static_cast<size_t>(t)] * ld + r)] += (term + grid) - grid;
    }
  }
  EXPECT_EQ(sum, want);
}

TEST(BulkShapes, OfWeightsThatFit) {
  EXPECT_TRUE(BulkFits(TensorType::kQ4_K, 2048, 7168));
  EXPECT_FALSE(BulkFits(TensorType::kQ3_K, 2048, 7168));
  EXPECT_FALSE(BulkFits(TensorType::kQ8_0, 2048, 352));
  EXPECT_FALSE(BulkFits(TensorType::kQ6_K, 40, 256));
  EXPECT_TRUE(BulkSameOrder(TensorType::kQ6_K, TensorType::kQ8_0));
  EXPECT_FALSE(BulkSameOrder(TensorType::kQ4_K, TensorType::kQ8_0));
}

TEST(BulkShapes, NoneBelowAmx) {
  const ScopedIsa scope(Isa::kScalar);
  EXPECT_FALSE(BulkAvailable());
}

}  // namespace
}  // namespace tandem::kernels
