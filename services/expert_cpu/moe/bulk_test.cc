// Bulk calls of Moe, on emulated tiles where the machine has none.
#include <gtest/gtest.h>

#include "common/kernels/bulk.h"
#include "common/kernels/bulk_emulated_for_test.h"
#include "common/quant/quant.h"
#include "services/expert_cpu/moe/moe_test_util.h"

namespace tandem::expert {
namespace {

using gguf::TensorType;
using kernels::Precision;
using testing::Batch;
using testing::Bytes;
using testing::Process;
using testing::RelativeError;
using testing::SameBits;
using testing::SyntheticModel;
using testing::SyntheticShape;

Call BulkCall(const Batch& batch, AnswerType answer = AnswerType::kF32) {
  Call call = testing::ToCall(batch, answer);
  call.bulk = true;
  return call;
}

class BulkMoeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::BulkAvailable()) return;
    if (!emulated_.usable()) GTEST_SKIP() << "needs AVX512-BF16";
    emulated_.Use();
  }
  kernels::EmulatedBulk emulated_;
};

SyntheticShape Shape(TensorType gate_up, TensorType down) {
  SyntheticShape shape;
  shape.hidden = 512;
  shape.inner = 512;
  shape.gate = shape.up = gate_up;
  shape.down = down;
  return shape;
}

TEST_F(BulkMoeTest, AgreesWithThePlainComputation) {
  const TensorType types[][2] = {{TensorType::kQ4_K, TensorType::kQ6_K},
                                 {TensorType::kQ6_K, TensorType::kQ4_K},
                                 {TensorType::kQ5_K, TensorType::kQ8_0}};
  for (const auto& [gate_up, down] : types) {
    const SyntheticModel model(Shape(gate_up, down));
    Process process(model);
    for (const int64_t n : {1, 5, 70}) {
      const Batch batch = Batch::Random(model.shape(), n, 11);
      const auto want = model.Reference(1, batch.x, batch.ids, batch.weights, batch.k);
      const std::vector<float> got = process.Run<float>(BulkCall(batch));
      EXPECT_LT(RelativeError(got, want), 0.006) << n << " tokens";
      EXPECT_FALSE(SameBits(got, process.F32(batch)));
    }
  }
}

// Neither on the batch nor on threads; many tokens of an expert take other ways through memory than few.
TEST_F(BulkMoeTest, AnAnswerDependsOnItsTokenAlone) {
  SyntheticShape shape = Shape(TensorType::kQ4_K, TensorType::kQ6_K);
  shape.experts = 3;
  const SyntheticModel model(shape);
  const Batch batch = Batch::Random(shape, 500, 21);
  Process one(model, {}, 1), three(model, {}, 3);
  const std::vector<float> want = one.Run<float>(BulkCall(batch));
  EXPECT_TRUE(SameBits(three.Run<float>(BulkCall(batch)), want));
  for (const int64_t t : {0, 77, 499}) {
    const std::vector<float> alone = three.Run<float>(BulkCall(batch.Token(t)));
    EXPECT_EQ(std::memcmp(alone.data(), want.data() + t * shape.hidden, alone.size() * 4), 0)
        << "token " << t;
  }
  const std::vector<double> exact = three.Run<double>(BulkCall(batch, AnswerType::kF64));
  EXPECT_TRUE(SameBits(std::vector<float>(exact.begin(), exact.end()), want));
}

TEST_F(BulkMoeTest, ExpertsInPartsAddUpToTheSameBits) {
  SyntheticShape shape = Shape(TensorType::kQ4_K, TensorType::kQ4_K);
  const SyntheticModel model(shape);
  const Batch batch = Batch::Random(shape, 40, 31);
  Process whole(model);
  std::vector<double> sum(static_cast<size_t>(batch.n * shape.hidden));
  for (const ShardRequest& request : {ShardRequest{.expert_end = 1}, ShardRequest{.expert_begin = 1}}) {
    Process part(model, request);
    const std::vector<double> answer = part.Run<double>(BulkCall(batch, AnswerType::kF64));
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += answer[i];
  }
  EXPECT_TRUE(SameBits(std::vector<float>(sum.begin(), sum.end()), whole.Run<float>(BulkCall(batch))));
}

TEST_F(BulkMoeTest, BothActivationTypesAndTokensOfOtherProcesses) {
  const SyntheticModel model(Shape(TensorType::kQ4_K, TensorType::kQ6_K));
  Process process(model);
  Batch batch = Batch::Random(model.shape(), 20, 41);
  for (size_t i = 0; i < 10; ++i) batch.ids[i] = -1;
  std::vector<uint16_t> half;
  for (float& value : batch.x) {
    half.push_back(quant::FloatToBf16(value));
    value = quant::Bf16ToFloat(half.back());
  }
  const std::vector<float> want = process.Run<float>(BulkCall(batch));
  Call call = BulkCall(batch);
  call.activations = Bytes(half);
  call.activation_type = ActivationType::kBf16;
  EXPECT_TRUE(SameBits(process.Run<float>(call), want));
  for (size_t i = 0; i < static_cast<size_t>(5 * model.shape().hidden); ++i) EXPECT_EQ(want[i], 0.0f);
}

// Weights without a kernel for it, other precision: the call is as if it had not asked.
TEST_F(BulkMoeTest, ElsewhereItMeansNothing) {
  const SyntheticModel odd(Shape(TensorType::kQ4_K, TensorType::kQ3_K));
  const Batch batch = Batch::Random(odd.shape(), 20, 51);
  Process process(odd);
  EXPECT_TRUE(SameBits(process.Run<float>(BulkCall(batch)), process.F32(batch)));
  const SyntheticModel model(Shape(TensorType::kQ4_K, TensorType::kQ6_K));
  Process reference(model, {}, 2, Precision::kReference);
  EXPECT_TRUE(SameBits(reference.Run<float>(BulkCall(batch)), reference.F32(batch)));
}

TEST(BulkMoe, WithoutTilesItMeansNothing) {
  if (kernels::BulkAvailable()) GTEST_SKIP() << "this machine has them";
  const SyntheticModel model(Shape(TensorType::kQ4_K, TensorType::kQ6_K));
  const Batch batch = Batch::Random(model.shape(), 20, 61);
  Process process(model);
  EXPECT_TRUE(SameBits(process.Run<float>(BulkCall(batch)), process.F32(batch)));
}

}  // namespace
}  // namespace tandem::expert
