// Every product, type and instruction set against the scalar twin, bit for bit, and the twin against the
// reference precision.
#include "common/kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "common/kernels/dispatch.h"
#include "common/kernels/test_util.h"

namespace tandem::kernels {
namespace {

using namespace testing;  // NOLINT

std::vector<float> Product(Isa isa, const Matrix& w, const std::vector<float>& x, int64_t n,
                           Precision precision = Precision::kFast) {
  const ScopedIsa scoped(isa);
  Activations a;
  a.Assign(x.data(), n, w.cols);
  a.Prepare(w.type, precision);
  std::vector<float> y(static_cast<size_t>(n * w.rows), NAN);
  MatMul(w, 0, w.rows, a, y.data(), w.rows, precision);
  return y;
}

class EveryType : public ::testing::TestWithParam<TensorType> {
 protected:
  TensorType type() const { return GetParam(); }
  // Column counts of every kind: one block, units with a tail, whole units; odd ones for float types.
  int64_t RandomCols(std::mt19937& rng) const {
    if (IsFloat(type())) return 1 + static_cast<int64_t>(rng() % 700);
    if (BlockSize(type()) == 32) return 32 * (1 + static_cast<int64_t>(rng() % 26));
    return 256 * (1 + static_cast<int64_t>(rng() % 4));
  }
};

std::string TypeParamName(const ::testing::TestParamInfo<TensorType>& info) {
  return std::string(gguf::TypeName(info.param));
}
INSTANTIATE_TEST_SUITE_P(Types, EveryType, ::testing::ValuesIn(AllTypes()), TypeParamName);

TEST_P(EveryType, EqualsTheTwinOverRandomShapes) {
  std::mt19937 rng(101);
  const int64_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 31, 33, 50};
  for (int round = 0; round < 34; ++round) {
    const int64_t n = tokens[round % 17];
    const int64_t rows = round < 6 ? 1 + round * 13 % 7 : 1 + static_cast<int64_t>(rng() % 150);
    const int64_t cols = RandomCols(rng);
    Weights w =
        round % 2 == 0 ? RandomBlocks(rng, type(), rows, cols) : QuantizedGaussian(rng, type(), rows, cols);
    const std::vector<float> x = Gaussian(rng, n * cols, round % 3 == 0 ? 30.0f : 1.0f);
    const std::vector<uint32_t> want = Bits(Product(Isa::kScalar, w.m, x, n));
    for (Isa isa : AvailableIsas()) {
      EXPECT_EQ(want, Bits(Product(isa, w.m, x, n)))
          << IsaName(isa) << " rows " << rows << " cols " << cols << " tokens " << n;
    }
  }
}

TEST_P(EveryType, ManyTokensEqualTheTwin) {
  std::mt19937 rng(102);
  const int64_t cols = IsFloat(type()) ? 300 : BlockSize(type()) == 32 ? 288 : 512;
  Weights w = RandomBlocks(rng, type(), 70, cols);
  const int64_t n = 530;  // more than one pass over the weights
  const std::vector<float> x = Gaussian(rng, n * cols);
  const std::vector<uint32_t> want = Bits(Product(Isa::kScalar, w.m, x, n));
  for (Isa isa : AvailableIsas()) EXPECT_EQ(want, Bits(Product(isa, w.m, x, n))) << IsaName(isa);
}

TEST_P(EveryType, RowRangesAndStridesTouchOnlyTheirOutput) {
  std::mt19937 rng(103);
  const int64_t cols = RandomCols(rng);
  const int64_t rows = 90;
  Weights w = RandomBlocks(rng, type(), rows, cols);
  const int64_t n = 5, stride = cols + 3, ldy = rows + 11;
  const std::vector<float> x = Gaussian(rng, n * stride);
  for (Isa isa : AvailableIsas()) {
    const ScopedIsa scoped(isa);
    Activations a;
    a.Assign(x.data(), n, cols, stride);
    a.Prepare(type(), Precision::kFast);
    std::vector<float> all(static_cast<size_t>(n * ldy), -7.0f);
    MatMul(w.m, 0, rows, a, all.data(), ldy, Precision::kFast);
    std::vector<float> parts(static_cast<size_t>(n * ldy), -7.0f);
    const int64_t cuts[] = {0, 1, 18, 50, 83, 90};
    for (int i = 0; i + 1 < 6; ++i) MatMul(w.m, cuts[i], cuts[i + 1], a, parts.data(), ldy, Precision::kFast);
    EXPECT_EQ(Bits(all), Bits(parts)) << IsaName(isa);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t r = rows; r < ldy; ++r) EXPECT_EQ(all[static_cast<size_t>(t * ldy + r)], -7.0f);
    }
  }
}

TEST_P(EveryType, GatherTakesAnyTokensInAnyOrder) {
  std::mt19937 rng(104);
  const int64_t rows = 37, cols = RandomCols(rng), n = 40;
  Weights w = RandomBlocks(rng, type(), rows, cols);
  const std::vector<float> x = Gaussian(rng, n * cols);
  for (int64_t count : {1, 2, 7, 19, 64}) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(rng() % n);  // repeats included
    for (Isa isa : AvailableIsas()) {
      const std::vector<float> all = Product(isa, w.m, x, n);
      const ScopedIsa scoped(isa);
      Activations a;
      a.Assign(x.data(), n, cols);
      a.Prepare(type(), Precision::kFast);
      std::vector<float> y(static_cast<size_t>(count * rows), NAN);
      MatMulGather(w.m, 0, rows, a, ids, y.data(), rows, Precision::kFast);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          ASSERT_EQ(std::bit_cast<uint32_t>(y[static_cast<size_t>(i * rows + r)]),
                    std::bit_cast<uint32_t>(all[static_cast<size_t>(ids[static_cast<size_t>(i)] * rows + r)]))
              << IsaName(isa) << " token " << i << " row " << r;
        }
      }
    }
  }
}

TEST_P(EveryType, ATokenDoesNotDependOnItsBatch) {
  std::mt19937 rng(105);
  const int64_t rows = 33, cols = RandomCols(rng), n = 21;
  Weights w = RandomBlocks(rng, type(), rows, cols);
  const std::vector<float> x = Gaussian(rng, n * cols);
  for (Precision precision : {Precision::kFast, Precision::kReference}) {
    for (Isa isa : AvailableIsas()) {
      const std::vector<float> batch = Product(isa, w.m, x, n, precision);
      for (int64_t t = 0; t < n; ++t) {
        const std::vector<float> own(x.begin() + t * cols, x.begin() + (t + 1) * cols);
        const std::vector<float> part(batch.begin() + t * rows, batch.begin() + (t + 1) * rows);
        EXPECT_EQ(Bits(Product(isa, w.m, own, 1, precision)), Bits(part)) << IsaName(isa) << " token " << t;
      }
    }
  }
}

TEST_P(EveryType, LeavesAreProductsOfTheirOwn) {
  std::mt19937 rng(106);
  const int64_t rows = 35;
  for (int64_t n : {1, 3, 18}) {
    const int64_t cols = RandomCols(rng);
    Weights w = RandomBlocks(rng, type(), rows, cols);
    const std::vector<float> x = Gaussian(rng, n * cols);
    std::vector<int32_t> ids(static_cast<size_t>(n));
    std::iota(ids.rbegin(), ids.rend(), 0);
    const int64_t n_leaves = (cols + kLeaf - 1) / kLeaf;
    const int64_t begin = 2, end = 34;
    for (Precision precision : {Precision::kFast, Precision::kReference}) {
      for (Isa isa : AvailableIsas()) {
        const ScopedIsa scoped(isa);
        Activations a;
        a.Assign(x.data(), n, cols);
        a.Prepare(type(), precision);
        std::vector<float> y(static_cast<size_t>(n * (end - begin) * n_leaves), NAN);
        MatMulLeaves(w.m, begin, end, a, ids, y.data(), precision);
        for (int64_t b = 0; b < n_leaves; ++b) {
          Matrix slice = w.m;
          slice.data += gguf::RowBytes(type(), b * kLeaf);
          slice.cols = std::min(kLeaf, cols - b * kLeaf);
          Activations part;
          part.Assign(x.data() + b * kLeaf, n, slice.cols, cols);
          part.Prepare(type(), precision);
          std::vector<float> want(static_cast<size_t>(n * rows));
          MatMulGather(slice, 0, rows, part, ids, want.data(), rows, precision);
          for (int64_t i = 0; i < n; ++i) {
            for (int64_t r = begin; r < end; ++r) {
              ASSERT_EQ(std::bit_cast<uint32_t>(
                            y[static_cast<size_t>((i * (end - begin) + r - begin) * n_leaves + b)]),
                        std::bit_cast<uint32_t>(want[static_cast<size_t>(i * rows + r)]))
                  << IsaName(isa) << " leaf " << b << " token " << i << " row " << r;
            }
          }
        }
      }
    }
  }
}

// The sums are those of MatMulLeaves' leaves, formed as common/model/expert_sum.h says; telling what comes
// next changes nothing.
TEST_P(EveryType, LeafSumsAddWeightedLeavesOnTheGrid) {
  std::mt19937 rng(107);
  const double grid = 6291456.0;
  for (int64_t n : {1, 2, 7, 33, 530}) {
    const int64_t rows = n > 100 ? 19 : 70, cols = RandomCols(rng);
    Weights w = RandomBlocks(rng, type(), rows, cols), other = RandomBlocks(rng, type(), 40, cols);
    const std::vector<float> x = Gaussian(rng, n * cols), weights = Gaussian(rng, n);
    std::vector<int32_t> ids(static_cast<size_t>(n)), to(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      ids[static_cast<size_t>(i)] = static_cast<int32_t>(rng() % static_cast<uint32_t>(n));
      to[static_cast<size_t>(i)] = static_cast<int32_t>(rng() % 5);  // repeats: several experts of a token
    }
    const int64_t n_leaves = (cols + kLeaf - 1) / kLeaf, begin = 3, end = rows - 1, ld = rows + 2;
    for (Precision precision : {Precision::kFast, Precision::kReference}) {
      for (Isa isa : AvailableIsas()) {
        const ScopedIsa scoped(isa);
        Activations a;
        a.Assign(x.data(), n, cols);
        a.Prepare(type(), precision);
        std::vector<float> leaves(static_cast<size_t>(n * (end - begin) * n_leaves), NAN);
        MatMulLeaves(w.m, begin, end, a, ids, leaves.data(), precision);
        std::vector<double> want(static_cast<size_t>(5 * ld), 0.25), got = want;
        const float* leaf = leaves.data();
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t r = begin; r < end; ++r) {
            double& sum = want[static_cast<size_t>(to[static_cast<size_t>(i)] * ld + r)];
            for (int64_t b = 0; b < n_leaves; ++b) {
              sum += (static_cast<double>(weights[static_cast<size_t>(i)]) * static_cast<double>(*leaf++) +
                      grid) -
                     grid;
            }
          }
        }
        const Flow flow = {{&other.m, 2, 40, n}, n % 2 == 1};
        MatMulLeafSum(w.m, begin, end, a, ids, {weights.data(), to.data(), got.data(), ld, grid}, precision,
                      flow);
        EXPECT_EQ(want, got) << IsaName(isa) << " tokens " << n;
      }
    }
  }
}

TEST_P(EveryType, GatheredActivationsGiveTheSameProducts) {
  if (IsFloat(type())) GTEST_SKIP() << "float weights read float activations where they lie";
  std::mt19937 rng(108);
  const int64_t rows = 40, cols = RandomCols(rng), n = 50;
  Weights w = RandomBlocks(rng, type(), rows, cols);
  const std::vector<float> x = Gaussian(rng, n * cols);
  std::vector<int32_t> ids(37), counting(37);
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % n);
  std::iota(counting.begin(), counting.end(), 0);
  Activations a, gathered;
  a.Assign(x.data(), n, cols);
  a.Prepare(type(), Precision::kFast);
  gathered.Gather(a, ids);
  for (Isa isa : AvailableIsas()) {
    const ScopedIsa scoped(isa);
    std::vector<float> want(ids.size() * static_cast<size_t>(rows)), got = want;
    MatMulGather(w.m, 0, rows, a, ids, want.data(), rows, Precision::kFast);
    MatMulGather(w.m, 0, rows, gathered, counting, got.data(), rows, Precision::kFast);
    EXPECT_EQ(Bits(want), Bits(got)) << IsaName(isa);
  }
}

// Rows long enough for every count of units that the kernels take together, gaps between the rows, and with
// what comes next told; read in every way that some processor wants.
TEST_P(EveryType, FewTokensWithLongRowsEqualTheTwin) {
  if (IsFloat(type())) GTEST_SKIP() << "float weights have one way for all lengths";
  std::mt19937 rng(112);
  for (int round = 0; round < 60; ++round) {
    const int64_t n = 1 + round % 4, rows = 1 + static_cast<int64_t>(rng() % 50);
    const int64_t units = round == 0 ? 97 : 1 + static_cast<int64_t>(rng() % 40);
    const int64_t whole = units * 256 + (round % 3 == 0 ? 512 : 0);  // a slice of wider rows
    Weights w = RandomBlocks(rng, type(), rows, whole);
    Matrix slice = w.m;
    slice.cols = units * 256;
    if (slice.cols < whole) slice.data += gguf::RowBytes(type(), 256);
    const std::vector<float> x = Gaussian(rng, (n + 1) * slice.cols);
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (int32_t& id : ids) id = static_cast<int32_t>(rng() % static_cast<uint32_t>(n + 1));
    const Flow flow = {{&slice, 0, rows, 1 + round % 5}, round % 2 == 0};
    const auto products = [&](Isa isa) {
      const ScopedIsa scoped(isa);
      Activations a;
      a.Assign(x.data(), n + 1, slice.cols);
      a.Prepare(type(), Precision::kFast);
      std::vector<float> y(static_cast<size_t>(n * rows), NAN);
      MatMulGather(slice, 0, rows, a, ids, y.data(), rows, Precision::kFast, flow);
      std::vector<float> leaves(static_cast<size_t>(n * rows * units), NAN);
      MatMulLeaves(slice, 0, rows, a, ids, leaves.data(), Precision::kFast);
      y.insert(y.end(), leaves.begin(), leaves.end());
      return Bits(y);
    };
    const std::vector<uint32_t> want = products(Isa::kScalar);
    for (Isa isa : AvailableIsas()) {
      if (isa == Isa::kScalar) continue;
      using internal::Reading;
      for (const Reading& reading :
           {Reading{internal::kRequests, true, 4096}, Reading{internal::kNoRequests, false, 0},
            Reading{internal::kTwoRequests, true, 1 << 20}, Reading{internal::kSecondRequests, false, 0},
            Reading{internal::kSecondRequests, true, 1024}}) {
        internal::SetReadingForTesting(&reading);
        EXPECT_EQ(want, products(isa)) << IsaName(isa) << " rows " << rows << " units " << units << " tokens "
                                       << n << " by rows " << reading.by_rows;
      }
      internal::SetReadingForTesting(nullptr);
    }
  }
}

// The greatest values that a block can hold against the greatest activations: nothing saturates or overflows.
TEST_P(EveryType, ExtremeBlocksEqualTheTwin) {
  std::mt19937 rng(107);
  const int64_t rows = 20, cols = 512;
  for (uint8_t fill : {0x00, 0x7f, 0x80, 0xff, 0x3f, 0xf0, 0x0f}) {
    Weights w = RandomBlocks(rng, type(), rows, cols);
    if (!IsFloat(type())) {
      std::fill(w.bytes.begin(), w.bytes.end(), fill);
      const int64_t block_bytes = gguf::GetTypeInfo(type()).type_size;
      for (int64_t b = 0; b < rows * cols / BlockSize(type()); ++b) {
        for (int offset : HalfOffsets(type())) {
          w.data()[b * block_bytes + offset] = 0x66;  // 0.1
          w.data()[b * block_bytes + offset + 1] = 0x2e;
        }
      }
    }
    for (int sign : {1, -1, 0}) {
      const int64_t n = 9;
      std::vector<float> x(static_cast<size_t>(n * cols));
      for (float& f : x) f = sign != 0 ? 100.0f * static_cast<float>(sign) : (rng() % 2 == 0 ? -3.0f : 3.0f);
      const std::vector<float> twin = Product(Isa::kScalar, w.m, x, n);
      for (Isa isa : AvailableIsas()) EXPECT_EQ(Bits(twin), Bits(Product(isa, w.m, x, n))) << IsaName(isa);
      if (IsFloat(type())) continue;
      // These activations are whole multiples of their scale, so only rounding separates the precisions.
      const std::vector<float> exact = Product(Isa::kScalar, w.m, x, n, Precision::kReference);
      float greatest = 0.0f;
      for (float f : exact) greatest = std::max(greatest, std::abs(f));
      for (size_t i = 0; i < exact.size(); ++i) EXPECT_NEAR(twin[i], exact[i], 1e-4f * greatest + 1e-3f);
    }
  }
}

TEST_P(EveryType, TheTwinIsNearTheReference) {
  std::mt19937 rng(108);
  const int64_t rows = 24, cols = IsFloat(type()) ? 777 : 1024, n = 4;
  Weights w = QuantizedGaussian(rng, type(), rows, cols);
  const std::vector<float> x = Gaussian(rng, n * cols);
  const std::vector<float> fast = Product(Isa::kScalar, w.m, x, n);
  const std::vector<float> reference = Product(Isa::kScalar, w.m, x, n, Precision::kReference);
  std::vector<float> row(static_cast<size_t>(cols));
  for (int64_t r = 0; r < rows; ++r) {
    quant::Dequantize(type(), w.m.data + r * w.m.row_bytes, row.data(), cols);
    double norm = 0.0;
    for (float f : row) norm += static_cast<double>(f) * f;
    for (int64_t t = 0; t < n; ++t) {
      double direct = 0.0;
      for (int64_t c = 0; c < cols; ++c) {
        direct += static_cast<double>(row[static_cast<size_t>(c)]) * x[static_cast<size_t>(t * cols + c)];
      }
      const size_t i = static_cast<size_t>(t * rows + r);
      EXPECT_FLOAT_EQ(reference[i], static_cast<float>(direct));
      // Activations are rounded to 127 steps of their greatest (about 4 sigma): an error of uniform
      // distribution, sigma step / sqrt(12), over a sum of the row's norm. Six sigma of that.
      const double step = 4.5 / 127.0;
      const double bound =
          IsFloat(type()) ? 1e-5 * std::sqrt(norm) * 30 : 6 * step / std::sqrt(12.0) * std::sqrt(norm);
      EXPECT_NEAR(fast[i], reference[i], bound);
    }
  }
}

TEST_P(EveryType, NotANumberStaysWithItsToken) {
  std::mt19937 rng(109);
  const int64_t rows = 19, cols = 512, n = 7;
  Weights w = QuantizedGaussian(rng, type(), rows, cols);
  std::vector<float> x = Gaussian(rng, n * cols);
  x[static_cast<size_t>(2 * cols + 300)] = NAN;
  x[static_cast<size_t>(5 * cols + 7)] = INFINITY;
  std::fill(x.begin() + 3 * cols, x.begin() + 4 * cols, 0.0f);
  for (Isa isa : AvailableIsas()) {
    const std::vector<float> y = Product(isa, w.m, x, n);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        const float f = y[static_cast<size_t>(t * rows + r)];
        if (t == 2) {
          EXPECT_TRUE(std::isnan(f));
        } else if (t == 5) {
          EXPECT_FALSE(std::isfinite(f));
        } else if (t == 3) {
          EXPECT_EQ(f, 0.0f);
        } else {
          EXPECT_TRUE(std::isfinite(f));
        }
      }
    }
  }
}

TEST_P(EveryType, SubnormalActivationsAreNotDividedBy) {
  std::mt19937 rng(110);
  const int64_t rows = 17, cols = 256, n = 3;
  Weights w = QuantizedGaussian(rng, type(), rows, cols);
  for (float magnitude : {1e-45f, 1e-40f, 1e-38f, 1.5e-36f, 1e-30f, 1e30f}) {
    const std::vector<float> x = Gaussian(rng, n * cols, magnitude);
    const std::vector<float> want = Product(Isa::kScalar, w.m, x, n);
    for (float f : want) EXPECT_TRUE(std::isfinite(f));
    for (Isa isa : AvailableIsas()) EXPECT_EQ(Bits(want), Bits(Product(isa, w.m, x, n))) << IsaName(isa);
  }
}

TEST(Activations, PreparedInPiecesIsPreparedWhole) {
  std::mt19937 rng(111);
  const int64_t n = 13, cols = 512, rows = 40;
  const std::vector<float> x = Gaussian(rng, n * cols);
  for (TensorType type : {TensorType::kQ4_K, TensorType::kQ8_0}) {
    Weights w = QuantizedGaussian(rng, type, rows, cols);
    Activations a;
    a.Assign(x.data(), n, cols);
    EXPECT_TRUE(a.Reserve(type, Precision::kFast));
    for (int64_t t : {0, 3, 9}) a.PrepareTokens(type, t, t == 0 ? 3 : t == 3 ? 9 : n);
    EXPECT_FALSE(a.Reserve(type, Precision::kFast));
    EXPECT_FALSE(a.Reserve(type, Precision::kReference));
    std::vector<float> y(static_cast<size_t>(n * rows));
    MatMul(w.m, 0, rows, a, y.data(), rows, Precision::kFast);
    EXPECT_EQ(Bits(Product(ActiveIsa(), w.m, x, n)), Bits(y));
  }
}

TEST(Isa, NamesAreDistinctAndTheListRises) {
  const std::vector<Isa> isas = AvailableIsas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), Isa::kScalar);
  EXPECT_EQ(isas.back(), DetectIsa());
  EXPECT_TRUE(std::is_sorted(isas.begin(), isas.end()));
  EXPECT_LE(ActiveIsa(), DetectIsa());
  EXPECT_EQ(IsaName(Isa::kAvx512Vnni), "avx512-vnni");
}

}  // namespace
}  // namespace tandem::kernels
