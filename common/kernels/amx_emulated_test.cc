// The AMX kernels, on emulated tiles, against the scalar twin.
#include <gtest/gtest.h>

#include <numeric>

#include "common/kernels/dispatch.h"
#include "common/kernels/test_util.h"

namespace tandem::kernels {
namespace internal {
const KTables* EmulatedAmxTables();
}
namespace {

using namespace testing;  // NOLINT

class AmxEmulated : public ::testing::TestWithParam<TensorType> {
 protected:
  void SetUp() override {
    if (DetectIsa() < Isa::kAvx512Vnni) GTEST_SKIP() << "needs AVX-512 VNNI";
  }
  void TearDown() override { internal::SetTablesForTesting(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Types, AmxEmulated, ::testing::ValuesIn(AllTypes()),
                         [](const auto& info) { return std::string(gguf::TypeName(info.param)); });

TEST_P(AmxEmulated, EqualsTheTwin) {
  std::mt19937 rng(301);
  const int64_t tokens[] = {1, 8, 9, 15, 16, 17, 31, 32, 33, 48, 70, 530};
  for (int64_t n : tokens) {
    const int64_t rows = n > 500 ? 20 : 1 + static_cast<int64_t>(rng() % 100);
    const int64_t cols = BlockSize(GetParam()) == 256 ? 512 : 32 * (1 + static_cast<int64_t>(rng() % 20));
    Weights w = RandomBlocks(rng, GetParam(), rows, cols);
    const std::vector<float> x = Gaussian(rng, n * cols);
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (int32_t& id : ids) id = static_cast<int32_t>(rng() % static_cast<uint64_t>(n));
    const int64_t n_leaves = (cols + kLeaf - 1) / kLeaf;
    std::vector<float> y[2], gathered[2], leaves[2];
    std::vector<double> sums[2];
    const std::vector<float> weights = Gaussian(rng, n);
    for (int i = 0; i < 2; ++i) {
      internal::SetTablesForTesting(i == 0 ? internal::ScalarTables() : internal::EmulatedAmxTables());
      Activations a;
      a.Assign(x.data(), n, cols);
      a.Prepare(GetParam(), Precision::kFast);
      y[i].resize(static_cast<size_t>(n * rows));
      gathered[i].resize(y[i].size());
      leaves[i].resize(y[i].size() * static_cast<size_t>(n_leaves));
      MatMul(w.m, 0, rows, a, y[i].data(), rows, Precision::kFast);
      MatMulGather(w.m, 0, rows, a, ids, gathered[i].data(), rows, Precision::kFast);
      MatMulLeaves(w.m, 0, rows, a, ids, leaves[i].data(), Precision::kFast);
      sums[i].resize(static_cast<size_t>(n * rows));
      MatMulLeafSum(w.m, 0, rows, a, ids, {weights.data(), ids.data(), sums[i].data(), rows, 6291456.0},
                    Precision::kFast);
    }
    EXPECT_EQ(Bits(y[0]), Bits(y[1])) << "tokens " << n << " rows " << rows << " cols " << cols;
    EXPECT_EQ(Bits(gathered[0]), Bits(gathered[1])) << "tokens " << n;
    EXPECT_EQ(Bits(leaves[0]), Bits(leaves[1])) << "tokens " << n;
    EXPECT_EQ(sums[0], sums[1]) << "tokens " << n;
  }
}

TEST_P(AmxEmulated, ExtremeBlocksEqualTheTwin) {
  std::mt19937 rng(302);
  if (IsFloat(GetParam())) GTEST_SKIP() << "no integers to overflow";
  const int64_t rows = 16, cols = 512, n = 16;
  for (uint8_t fill : {0x00, 0x7f, 0x80, 0xff}) {
    Weights w = RandomBlocks(rng, GetParam(), rows, cols);
    std::fill(w.bytes.begin(), w.bytes.end(), fill);
    const int64_t block_bytes = gguf::GetTypeInfo(GetParam()).type_size;
    for (int64_t b = 0; b < rows * cols / BlockSize(GetParam()); ++b) {
      for (int offset : HalfOffsets(GetParam())) {
        w.data()[b * block_bytes + offset] = 0x66;
        w.data()[b * block_bytes + offset + 1] = 0x2e;
      }
    }
    std::vector<float> x(static_cast<size_t>(n * cols));
    for (float& f : x) f = rng() % 2 == 0 ? -3.0f : 3.0f;
    std::vector<float> y[2];
    for (int i = 0; i < 2; ++i) {
      internal::SetTablesForTesting(i == 0 ? internal::ScalarTables() : internal::EmulatedAmxTables());
      Activations a;
      a.Assign(x.data(), n, cols);
      a.Prepare(GetParam(), Precision::kFast);
      y[i].resize(static_cast<size_t>(n * rows));
      MatMul(w.m, 0, rows, a, y[i].data(), rows, Precision::kFast);
    }
    EXPECT_EQ(Bits(y[0]), Bits(y[1]));
  }
}

}  // namespace
}  // namespace tandem::kernels
