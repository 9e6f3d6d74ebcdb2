// Products with quantized weights against sums in double over what quant::Dequantize gives.
#include <cmath>
#include <cstdlib>
#include <deque>
#include <limits>

#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using gguf::TensorType;
using kernels::testing::Gaussian;
using kernels::testing::RandomBlocks;
using kernels::testing::Weights;
using testing::Check;
using testing::DeviceActivations;
using testing::DeviceArray;
using testing::DeviceTypes;
using testing::DeviceWeight;
using testing::SameBits;

std::vector<float> Dequantized(const kernels::Matrix& m) {
  std::vector<float> w(m.rows * m.cols);
  for (int64_t r = 0; r < m.rows; ++r) {
    quant::Dequantize(m.type, m.data + r * m.row_bytes, w.data() + r * m.cols, m.cols);
  }
  return w;
}

struct Case {
  int64_t rows, cols;
  int columns;
};

// Columns as the products see them: x itself, or its int8 form.
std::vector<double> Seen(const std::vector<float>& x, const DeviceActivations& a, bool integers,
                         int64_t cols) {
  std::vector<double> seen(x.begin(), x.end());
  if (!integers) return seen;
  const auto q = a.q();
  const auto meta = a.meta();
  for (size_t i = 0; i < seen.size(); ++i) {
    seen[i] = double{meta[i / cols * (cols / 32) + i % cols / 32].x} * q[i];
  }
  return seen;
}

// |got - sum w x| <= of_sum * sum |w x| + of_x * sum |x| for all rows and columns.
void ExpectProduct(const std::vector<float>& w, const std::vector<double>& x, const Case& c,
                   const std::vector<float>& got, double of_sum, double of_x, const std::string& what) {
  for (int j = 0; j < c.columns; ++j) {
    for (int64_t r = 0; r < c.rows; ++r) {
      double sum = 0, size = 0, x_size = 0;
      for (int64_t k = 0; k < c.cols; ++k) {
        const double term = w[r * c.cols + k] * x[j * c.cols + k];
        sum += term;
        size += std::fabs(term);
        x_size += std::fabs(x[j * c.cols + k]);
      }
      const float y = got[j * c.rows + r];
      ASSERT_LE(std::fabs(y - sum), of_sum * size + of_x * x_size)
          << what << ", row " << r << ", column " << j << ": " << y << " instead of " << sum;
    }
  }
}

std::vector<float> Product(const DeviceMatrix& w, const DeviceActivations& a, int columns, bool many) {
  DeviceArray<float> y(w.rows * columns);
  ProductParams p;
  p.w = w;
  p.x = a.get();
  p.y = y.get();
  p.y_column = w.rows;
  p.columns = columns;
  Check(many ? LaunchMatMul(p, nullptr) : LaunchMatVec(p, nullptr));
  return y.Download();
}

std::string Name(TensorType type, const Case& c) {
  return std::string(gguf::TypeName(type)) + " " + std::to_string(c.rows) + "x" + std::to_string(c.cols) +
         " by " + std::to_string(c.columns);
}

TEST(CudaProducts, FewColumnsEqualTheSumsOverTheIntegers) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(1);
  for (TensorType type : DeviceTypes()) {
    for (const Case& c : {Case{37, 256, 1},
                          {64, 512, 2},
                          {5, 2048, 3},
                          {130, 1536, 5},
                          {33, 7168, 16},
                          {40, 512, 41},
                          {48, 1024, 64},
                          {96, 768, 11},
                          {300, 256, 8}}) {
      const Weights w = RandomBlocks(rng, type, c.rows, c.cols);
      const auto x = Gaussian(rng, c.columns * c.cols);
      const DeviceWeight device(w.m);
      const DeviceActivations a(x, c.columns, c.cols, c.cols);
      const bool integers = !IsFloatType(device.matrix().type);
      ExpectProduct(Dequantized(w.m), Seen(x, a, integers, c.cols), c,
                    Product(device.matrix(), a, c.columns, false), 3e-6, 0, Name(type, c));
    }
  }
}

// Rows of a head: fewer values than a warp has lanes for.
TEST(CudaProducts, ShortRows) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(2);
  for (TensorType type : DeviceTypes()) {
    if (kernels::testing::BlockSize(type) > 32) continue;
    for (const Case& c :
         {Case{70, 32, 1}, {70, 32, 4}, {512, 128, 1}, {512, 128, 9}, {40, 64, 16}, {40, 96, 2}}) {
      const Weights w = RandomBlocks(rng, type, c.rows, c.cols);
      const auto x = Gaussian(rng, c.columns * c.cols);
      const DeviceWeight device(w.m);
      const DeviceActivations a(x, c.columns, c.cols, c.cols);
      const bool integers = !IsFloatType(device.matrix().type);
      ExpectProduct(Dequantized(w.m), Seen(x, a, integers, c.cols), c,
                    Product(device.matrix(), a, c.columns, false), 3e-6, 0, Name(type, c));
    }
  }
}

// Both factors are rounded to 11 bits: at most 2^-11 of each, together a little less than 1e-3.
TEST(CudaProducts, ManyColumnsAreCloseToTheExactProduct) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(3);
  for (TensorType type : DeviceTypes()) {
    if (type == TensorType::kF32) continue;
    for (const Case& c :
         {Case{128, 256, 64}, {200, 512, 17}, {70, 768, 65}, {129, 1536, 130}, {64, 2048, 200}}) {
      const Weights w = RandomBlocks(rng, type, c.rows, c.cols);
      auto x = Gaussian(rng, c.columns * c.cols);
      for (int j = 0; j < c.columns; ++j) {  // columns of very different size
        const float size = std::ldexp(1.0f, j % 41 - 20);
        for (int64_t k = 0; k < c.cols; ++k) x[j * c.cols + k] *= size;
      }
      const DeviceWeight device(w.m);
      const DeviceActivations a(x, c.columns, c.cols, c.cols);
      ExpectProduct(Dequantized(w.m), {x.begin(), x.end()}, c, Product(device.matrix(), a, c.columns, true),
                    1e-3, 6e-8, Name(type, c));
    }
  }
}

TEST(CudaProducts, ManyColumnsOfShortRows) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(4);
  for (TensorType type :
       {TensorType::kQ8_0, TensorType::kQ5_0, TensorType::kQ4_0, TensorType::kF16, TensorType::kBF16}) {
    for (const Case& c : {Case{140, 32, 70}, {64, 96, 20}, {512, 128, 33}}) {
      const Weights w = RandomBlocks(rng, type, c.rows, c.cols);
      const auto x = Gaussian(rng, c.columns * c.cols);
      const DeviceWeight device(w.m);
      const DeviceActivations a(x, c.columns, c.cols, c.cols);
      ExpectProduct(Dequantized(w.m), {x.begin(), x.end()}, c, Product(device.matrix(), a, c.columns, true),
                    1e-3, 6e-8, Name(type, c));
    }
  }
}

void ExpectTheSameBitsInAnyCompany(TensorType type, int64_t rows, int64_t cols) {
  std::mt19937 rng(5);
  const Weights w = RandomBlocks(rng, type, rows, cols);
  const DeviceWeight device(w.m);
  const auto x = Gaussian(rng, 40 * cols);
  auto of = [&](int first, int columns, bool many) {
    const std::vector<float> part(x.begin() + first * cols, x.begin() + (first + columns) * cols);
    const DeviceActivations a(part, columns, cols, cols);
    return Product(device.matrix(), a, columns, many);
  };
  const auto alone = of(3, 1, false);
  for (int columns : {2, 4, 7, 13, 16, 30}) {
    EXPECT_TRUE(SameBits(alone.data(), of(3, columns, false).data(), rows))
        << Name(type, {rows, cols, columns});
    EXPECT_TRUE(SameBits(alone.data(),
                         of(4 - columns < 0 ? 0 : 4 - columns, columns, false).data() +
                             (4 - columns < 0 ? 3 : columns - 1) * rows,
                         rows))
        << Name(type, {rows, cols, columns});
  }
  if (type == TensorType::kF32) return;
  const auto all = of(0, 40, true);
  EXPECT_TRUE(SameBits(all.data() + 3 * rows, of(3, 20, true).data(), rows)) << gguf::TypeName(type);
}

TEST(CudaProducts, AColumnHasTheSameBitsInAnyCompany) {
  TANDEM_NEEDS_GPU();
  for (TensorType type : DeviceTypes()) {
    // Rows that 8 warps share, that 2 share, that each warp has alone.
    ExpectTheSameBitsInAnyCompany(type, 77, 4352);
    ExpectTheSameBitsInAnyCompany(type, 9000, 768);
    ExpectTheSameBitsInAnyCompany(type, 33000, 256);
  }
}

// What norms leave to products: each column times its row's factor.
TEST(CudaProducts, FactorsOfRows) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(14);
  for (TensorType type : DeviceTypes()) {
    // Rows that 8 warps share, that 2 share, that each warp has alone; a number of blocks that fours do not
    // divide.
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{77, 4352}, {9000, 768}, {33000, 256}}) {
      const Weights w = RandomBlocks(rng, type, rows, cols);
      const DeviceWeight device(w.m);
      for (int columns : {1, 2, 3, 11, 64}) {
        const auto x = Gaussian(rng, columns * cols);
        const DeviceActivations a(x, columns, cols, cols);
        std::vector<float> sums(columns * cols / 32);
        for (float& s : sums) s = 0.5f + static_cast<float>(rng() % 1000);
        const DeviceArray<float> squares(sums), factor(columns * 32);
        const DeviceArray<float> ones(std::vector<float>(columns * 32, 1.0f));
        const RowFactors factors{squares.get(), static_cast<int32_t>(cols / 32), 1e-3f};
        Check(LaunchScaleRows(ones.get(), factors, factor.get(), columns, 32, nullptr));
        DeviceArray<float> y(rows * columns);
        ProductParams p;
        p.w = device.matrix();
        p.x = a.get();
        p.x.factors = factors;
        p.y = y.get();
        p.y_column = rows;
        p.columns = columns;
        Check(LaunchMatVec(p, nullptr));
        const auto got = y.Download(), plain = Product(device.matrix(), a, columns, false),
                   f = factor.Download();
        for (int j = 0; j < columns; ++j) {
          double mean = 0;
          for (int64_t b = 0; b < cols / 32; ++b) mean += sums[j * cols / 32 + b] / static_cast<double>(cols);
          ASSERT_NEAR(f[j * 32], 1 / std::sqrt(mean + 1e-3), 1e-6 * f[j * 32]);
          for (int64_t r = 0; r < rows; ++r) {
            ASSERT_EQ(got[j * rows + r], plain[j * rows + r] * f[j * 32])
                << Name(type, {rows, cols, columns}) << ", row " << r << ", column " << j;
          }
        }
      }
    }
  }
}

struct FormCase {
  int64_t rows, cols;
  int32_t batches;
  int64_t of_head, values;
};

// The form of a product's results, made in its own launch, is that of LaunchQuantize.
TEST(CudaProducts, TheFormOfTheResults) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(15);
  for (TensorType type : DeviceTypes()) {
    for (const FormCase& c : {FormCase{384 * 24, 512, 1, 192, 128},  // heads of which a part goes on
                              {128, 512, 128, 0, 0},                 // the heads' results together
                              {7168, 2048, 1, 0, 0},
                              {33280, 256, 1, 0, 0}}) {
      const int64_t all = c.rows * c.batches, heads = c.of_head > 0 ? all / c.of_head : 1;
      const int64_t of_head = c.of_head > 0 ? c.of_head : all, values = c.values > 0 ? c.values : of_head;
      const Weights w = RandomBlocks(rng, type, all, c.cols);
      const DeviceWeight device(w.m, c.batches);
      for (int columns : {1, 2, 11, 64}) {
        const DeviceActivations a(Gaussian(rng, columns * c.batches * c.cols), columns * c.batches, c.cols,
                                  c.cols, c.batches);
        const auto before = Gaussian(rng, columns * all);
        const DeviceArray<float> y(before), want_y(before);
        const DeviceArray<int8_t> q(Int8FormRows(columns * heads, heads) * values), want_q(q.size());
        const DeviceArray<float2> meta(q.size() / 32), want_meta(q.size() / 32);
        ProductParams p;
        p.w = device.matrix();
        p.x = a.get();
        p.x_batch = 1;
        p.x_column = c.batches;
        p.y = want_y.get();
        p.y_batch = c.rows;
        p.y_column = all;
        p.columns = columns;
        p.batches = c.batches;
        p.accumulate = true;
        Check(LaunchMatVec(p, nullptr));
        QuantizeParams form;
        form.x = want_y.get();
        form.x_stride = of_head;
        form.rows = columns * heads;
        form.cols = values;
        form.heads = heads;
        form.q = want_q.get();
        form.q_meta = want_meta.get();
        Check(LaunchQuantize(form, nullptr));
        p.y = y.get();
        p.form = {q.get(), meta.get(), c.of_head, c.values};
        ASSERT_TRUE(CanForm(p));
        Check(LaunchMatVec(p, nullptr));
        const std::string name = Name(type, {c.rows, c.cols, columns});
        EXPECT_EQ(y.Download(), want_y.Download()) << name;
        EXPECT_EQ(q.Download(), want_q.Download()) << name;
        EXPECT_EQ(
            std::memcmp(meta.Download().data(), want_meta.Download().data(), meta.size() * sizeof(float2)), 0)
            << name;
      }
    }
  }
}

// Shapes that have no form of their own results are refused, not computed without one.
TEST(CudaProducts, WhatMakesNoForm) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(16);
  const DeviceArray<int8_t> q(64 * 4096);
  const DeviceArray<float2> meta(64 * 128);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{128, 4096}, {4100, 256}}) {
    const Weights w = RandomBlocks(rng, TensorType::kQ4_K, rows, cols);
    const DeviceWeight device(w.m);
    const DeviceActivations a(Gaussian(rng, cols), 1, cols, cols);
    const DeviceArray<float> y(rows);
    ProductParams p;
    p.w = device.matrix();
    p.x = a.get();
    p.y = y.get();
    p.y_column = rows;
    p.columns = 1;
    p.form.q = q.get();
    p.form.q_meta = meta.get();
    EXPECT_FALSE(CanForm(p));
    EXPECT_EQ(LaunchMatVec(p, nullptr), cudaErrorInvalidValue);
  }
}

// One launch for several matrices gives what one launch for each gives.
TEST(CudaProducts, SeveralMatricesOfTheSameActivations) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(9);
  const int64_t cols = 1024;
  for (TensorType type : DeviceTypes()) {
    for (int columns : {1, 5, 20}) {
      const auto x = Gaussian(rng, columns * cols);
      const DeviceActivations a(x, columns, cols, cols);
      // The last one has another type: a launch of its own.
      const Weights w[] = {RandomBlocks(rng, type, 130, cols), RandomBlocks(rng, type, 17, cols),
                           RandomBlocks(rng, type, 2100, cols), RandomBlocks(rng, type, 40, cols),
                           RandomBlocks(rng, TensorType::kQ8_0, 50, cols)};
      std::deque<DeviceWeight> device;
      std::deque<DeviceArray<float>> y;
      std::vector<ProductParams> products;
      for (const Weights& one : w) {
        device.emplace_back(one.m);
        y.emplace_back(one.m.rows * columns);
        ProductParams p;
        p.w = device.back().matrix();
        p.x = a.get();
        p.y = y.back().get();
        p.y_column = one.m.rows;
        p.columns = columns;
        products.push_back(p);
      }
      Check(LaunchMatVecs(products.data(), static_cast<int>(products.size()), nullptr));
      for (size_t i = 0; i < products.size(); ++i) {
        const auto alone = Product(device[i].matrix(), a, columns, false);
        EXPECT_TRUE(SameBits(alone.data(), y[i].Download().data(), alone.size()))
            << gguf::TypeName(type) << ", matrix " << i;
      }
    }
  }
}

// Matrices for each head, as F16 has them, and F32 with more columns than other types may have.
TEST(CudaProducts, FloatWeightsOfHeadsAndManyColumns) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(10);
  const int64_t heads = 5, rows = 70, cols = 128;
  for (TensorType type : {TensorType::kF16, TensorType::kBF16, TensorType::kF32}) {
    for (int columns : {1, 8, 16, 33, type == TensorType::kF32 ? 100 : 64}) {
      const Weights w = RandomBlocks(rng, type, heads * rows, cols);
      const DeviceWeight device(w.m, heads);
      const std::vector<float> dense = Dequantized(w.m);
      const auto x = Gaussian(rng, columns * heads * cols);
      const DeviceArray<float> d_x(x), y(columns * heads * rows);
      ProductParams p;
      p.w = device.matrix();
      p.x.x = d_x.get();
      p.x.x_stride = p.x.cols = cols;
      p.x_batch = 1;
      p.x_column = heads;
      p.y = y.get();
      p.y_batch = rows;
      p.y_column = heads * rows;
      p.columns = columns;
      p.batches = static_cast<int32_t>(heads);
      Check(LaunchMatVec(p, nullptr));
      const auto got = y.Download();
      for (int64_t j = 0; j < columns * heads; ++j) {
        for (int64_t r = 0; r < rows; ++r) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < cols; ++k) {
            const double term = double{dense[(j % heads * rows + r) * cols + k]} * x[j * cols + k];
            sum += term;
            size += std::fabs(term);
          }
          ASSERT_NEAR(got[j * rows + r], sum, 3e-6 * size)
              << gguf::TypeName(type) << ", " << columns << " columns, row " << r;
        }
      }
    }
  }
}

TEST(CudaProducts, HeadsAndAccumulation) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(6);
  const int64_t heads = 6, rows = 40, cols = 64, x_head = 96;  // of a head's 96 values the first 64
  for (int columns : {1, 7, 16, 30, 70}) {
    const Weights w = RandomBlocks(rng, TensorType::kQ8_0, heads * rows, cols);
    const std::vector<float> dense = Dequantized(w.m);
    const DeviceWeight device(w.m, heads);
    const auto x = Gaussian(rng, columns * heads * x_head);
    const DeviceActivations a(x, columns * heads, cols, x_head, heads);
    const auto before = Gaussian(rng, columns * heads * rows);
    DeviceArray<float> y(before);
    ProductParams p;
    p.w = device.matrix();
    p.x = a.get();
    p.x_batch = 1;
    p.x_column = heads;
    p.y = y.get();
    p.y_batch = rows;
    p.y_column = heads * rows;
    p.columns = columns;
    p.batches = static_cast<int32_t>(heads);
    p.accumulate = true;
    Check(columns > kMaxColumns ? LaunchMatMul(p, nullptr) : LaunchMatVec(p, nullptr));
    const auto got = y.Download();
    for (int j = 0; j < columns; ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t r = 0; r < rows; ++r) {
          double sum = before[(j * heads + h) * rows + r], size = std::fabs(sum);
          for (int64_t k = 0; k < cols; ++k) {
            const double term = double{dense[(h * rows + r) * cols + k]} * x[(j * heads + h) * x_head + k];
            sum += term;
            size += std::fabs(term);
          }
          ASSERT_NEAR(got[(j * heads + h) * rows + r], sum, 1e-2 * size) << columns << " columns";
        }
      }
    }
  }
}

TEST(CudaProducts, ByWarpgroupsWhereTheDeviceHasThem) {
  TANDEM_NEEDS_GPU();
  int major = 0, minor = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  const char* without = std::getenv("TANDEM_NO_WARPGROUPS");
  EXPECT_EQ(CanUseWarpgroups(), major == 9 && minor == 0 && without == nullptr);
}

// Whatever a block's width, and as float16 the same values rounded.
TEST(CudaProducts, TheTileDoesNotMatter) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(11);
  const int64_t heads = 2, rows = 150, cols = 768;
  for (TensorType type : {TensorType::kQ4_K, TensorType::kQ6_K, TensorType::kF16}) {
    const Weights w = RandomBlocks(rng, type, heads * rows, cols);
    const DeviceWeight device(w.m, heads);
    for (int columns : {70, 256, 301}) {
      const auto x = Gaussian(rng, columns * cols);
      const DeviceActivations a(x, columns, cols, cols);
      DeviceArray<float> y(columns * heads * rows);
      DeviceArray<uint16_t> half(columns * heads * rows);
      ProductParams p;
      p.w = device.matrix();
      p.x = a.get();
      p.y = y.get();
      p.y_batch = rows;
      p.y_column = heads * rows;
      p.columns = columns;
      p.batches = static_cast<int32_t>(heads);
      std::vector<float> first;
      for (int tile : {64, 128, 256}) {
        p.tile = tile;
        p.y_half = nullptr;
        Check(LaunchMatMul(p, nullptr));
        const auto got = y.Download();
        if (first.empty()) {
          first = got;
          // Both heads have the same activations.
          const std::vector<float> dense = Dequantized(w.m);
          const int64_t row = rows + 7, column = columns - 1;
          double sum = 0, size = 0;
          for (int64_t k = 0; k < cols; ++k) {
            sum += double{dense[row * cols + k]} * x[column * cols + k];
            size += std::fabs(dense[row * cols + k] * x[column * cols + k]);
          }
          EXPECT_NEAR(got[column * heads * rows + row], sum, 1e-3 * size);
        }
        EXPECT_TRUE(SameBits(first.data(), got.data(), got.size())) << tile << ", " << columns << " columns";
        // Added to what is there, once.
        const auto before = Gaussian(rng, static_cast<int64_t>(got.size()));
        DeviceArray<float> sums(before);
        p.y = sums.get();
        p.accumulate = true;
        Check(LaunchMatMul(p, nullptr));
        p.y = y.get();
        p.accumulate = false;
        const auto added = sums.Download();
        for (size_t i = 0; i < added.size(); ++i) {
          ASSERT_EQ(added[i], before[i] + first[i]) << tile << ", " << columns << " columns, " << i;
        }
        p.y_half = half.get();
        Check(LaunchMatMul(p, nullptr));
        const auto halves = half.Download();
        for (size_t i = 0; i < halves.size(); ++i) {
          ASSERT_EQ(halves[i], quant::FloatToHalf(first[i])) << tile << ", " << columns << " columns, " << i;
        }
      }
    }
  }
}

TEST(CudaProducts, BrokenInputStaysInItsColumn) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(7);
  const int64_t rows = 20, cols = 512;
  const Weights w = RandomBlocks(rng, TensorType::kQ4_K, rows, cols);
  const DeviceWeight device(w.m);
  auto x = Gaussian(rng, 70 * cols);
  x[1 * cols + 77] = std::numeric_limits<float>::quiet_NaN();
  x[2 * cols + 300] = std::numeric_limits<float>::infinity();
  for (int columns : {4, 70}) {
    const DeviceActivations a({x.begin(), x.begin() + columns * cols}, columns, cols, cols);
    const auto y = Product(device.matrix(), a, columns, columns > kMaxColumns);
    for (int j = 0; j < 4; ++j) {
      for (int64_t r = 0; r < rows; ++r) {
        EXPECT_EQ(std::isfinite(y[j * rows + r]), j == 0 || j == 3) << "column " << j << " of " << columns;
      }
    }
  }
}

TEST(CudaProducts, TheInt8FormIsTheNearest) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(8);
  auto x = Gaussian(rng, 9 * 352);
  std::fill(x.begin() + 64, x.begin() + 96, 0.0f);
  const DeviceActivations a(x, 9, 352, 352);
  const auto q = a.q();
  const auto meta = a.meta();
  for (size_t b = 0; b < meta.size(); ++b) {
    float largest = 0;
    int sum = 0;
    for (size_t i = b * 32; i < b * 32 + 32; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      sum += q[i];
    }
    EXPECT_NEAR(meta[b].x, largest / 127, largest * 1e-7);
    EXPECT_FLOAT_EQ(meta[b].y, meta[b].x * static_cast<float>(sum));
    for (size_t i = b * 32; i < b * 32 + 32; ++i)
      EXPECT_LE(std::fabs(meta[b].x * q[i] - x[i]), meta[b].x * 0.501f);
  }
}

}  // namespace
}  // namespace tandem::attention::cuda
