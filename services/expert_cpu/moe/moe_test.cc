#include "services/expert_cpu/moe/moe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <thread>

#include "common/quant/quant.h"
#include "services/expert_cpu/moe/moe_test_util.h"

namespace tandem::expert {
namespace {

using gguf::TensorType;
using kernels::Precision;
using testing::Batch;
using testing::Bytes;
using ::testing::HasSubstr;
using testing::Process;
using testing::RelativeError;
using testing::SameBits;
using testing::SyntheticModel;
using testing::SyntheticShape;
using testing::ToCall;

class MoeTypesTest : public ::testing::TestWithParam<TensorType> {};

TEST_P(MoeTypesTest, AgreesWithThePlainComputation) {
  SyntheticShape shape;
  shape.inner = 512;
  shape.gate = shape.up = shape.down = GetParam();
  const SyntheticModel model(shape);
  const Batch batch = Batch::Random(shape, 5, 11);
  const std::vector<double> want = model.Reference(1, batch.x, batch.ids, batch.weights, batch.k);
  Process fast(model);
  EXPECT_LT(RelativeError(fast.F32(batch), want), 0.02);
  Process reference(model, {}, 2, Precision::kReference);
  EXPECT_LT(RelativeError(reference.F32(batch), want), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Types, MoeTypesTest,
                         ::testing::Values(TensorType::kF32, TensorType::kF16, TensorType::kBF16,
                                           TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ5_0,
                                           TensorType::kQ5_1, TensorType::kQ8_0, TensorType::kQ2_K,
                                           TensorType::kQ3_K, TensorType::kQ4_K, TensorType::kQ5_K,
                                           TensorType::kQ6_K),
                         [](const auto& info) { return std::string(gguf::TypeName(info.param)); });

TEST(MoeTest, MixedTypesAndLayers) {
  SyntheticShape shape;
  shape.layers = 3;
  shape.gate = TensorType::kQ4_K;
  shape.up = TensorType::kQ8_0;
  shape.down = TensorType::kF16;
  const SyntheticModel model(shape);
  Process process(model);
  for (const int64_t layer : {1, 2}) {
    const Batch batch = Batch::Random(shape, 3, 5);
    const auto want = model.Reference(layer, batch.x, batch.ids, batch.weights, batch.k);
    EXPECT_LT(RelativeError(process.F32(batch, layer), want), 0.02) << layer;
  }
}

// The answers of the parts, added in double and rounded once.
std::vector<float> Together(const SyntheticModel& model, const std::vector<ShardRequest>& parts,
                            const Batch& batch, Precision precision) {
  std::vector<double> sum;
  for (const ShardRequest& part : parts) {
    Process process(model, part, 2, precision);
    const std::vector<double> answer = process.F64(batch);
    sum.resize(answer.size());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += answer[i];
  }
  return {sum.begin(), sum.end()};
}

void ExpectSameBitsHoweverShared(const SyntheticModel& model, const std::vector<int64_t>& slice_counts) {
  const Batch batch = Batch::Random(model.shape(), 4, 21);
  for (const Precision precision : {Precision::kFast, Precision::kReference}) {
    Process whole(model, {}, 2, precision);
    const std::vector<float> want = whole.F32(batch);
    const std::vector<double> exact = whole.F64(batch);
    EXPECT_TRUE(SameBits(want, std::vector<float>(exact.begin(), exact.end())));
    for (const int64_t n : slice_counts) {
      std::vector<ShardRequest> parts;
      for (int64_t k = n - 1; k >= 0; --k) parts.push_back({.slice_index = k, .slice_count = n});
      EXPECT_TRUE(SameBits(Together(model, parts, batch, precision), want)) << n << " slices";
    }
    const int64_t half = model.shape().experts / 2;
    EXPECT_TRUE(
        SameBits(Together(model, {{.expert_end = half}, {.expert_begin = half}}, batch, precision), want));
    EXPECT_TRUE(SameBits(Together(model,
                                  {{.expert_end = 1},
                                   {.slice_index = 0, .slice_count = 2, .expert_begin = 1},
                                   {.slice_index = 1, .slice_count = 2, .expert_begin = 1}},
                                  batch, precision),
                         want))
        << "a range, and slices of the rest";
  }
}

TEST(MoeTest, SlicesAndRangesGiveTheSameBits) {
  SyntheticShape shape;
  shape.inner = 2048;
  shape.down = TensorType::kQ6_K;
  ExpectSameBitsHoweverShared(SyntheticModel(shape), {2, 4, 8});
}

TEST(MoeTest, UnevenSlicesGiveTheSameBits) {
  SyntheticShape shape;
  shape.inner = 672;  // two leaves and a short one, of blocks of 32
  shape.down = TensorType::kQ5_0;
  ExpectSameBitsHoweverShared(SyntheticModel(shape), {2, 3});
}

TEST(MoeTest, FloatWeightsInSlicesGiveTheSameBits) {
  SyntheticShape shape;
  shape.inner = 600;
  shape.gate = TensorType::kF32;
  shape.up = TensorType::kF16;
  shape.down = TensorType::kBF16;
  ExpectSameBitsHoweverShared(SyntheticModel(shape), {2, 3});
}

TEST(MoeTest, ATokensAnswerDoesNotDependOnItsBatch) {
  SyntheticShape shape;
  shape.inner = 512;
  shape.experts = 8;
  shape.experts_per_token = 4;
  const SyntheticModel model(shape);
  Process process(model);
  const Batch batch = Batch::Random(shape, 70, 31);
  const std::vector<float> all = process.F32(batch);
  for (const int64_t t : {0, 1, 17, 69}) {
    const std::vector<float> alone = process.F32(batch.Token(t));
    const auto first = all.begin() + t * shape.hidden;
    EXPECT_TRUE(SameBits(alone, std::vector<float>(first, first + shape.hidden))) << t;
  }
}

TEST(MoeTest, BatchesOfSeveralWaves) {
  SyntheticShape shape;
  shape.experts = 12;
  shape.experts_per_token = 8;
  const SyntheticModel model(shape);
  Process process(model);
  const Batch batch = Batch::Random(shape, 900, 41);  // 7200 pairs
  const std::vector<float> all = process.F32(batch);
  for (const int64_t t : {0, 450, 899}) {
    const std::vector<float> alone = process.F32(batch.Token(t));
    const auto first = all.begin() + t * shape.hidden;
    EXPECT_TRUE(SameBits(alone, std::vector<float>(first, first + shape.hidden))) << t;
  }
}

TEST(MoeTest, ThreadsDoNotChangeTheBits) {
  SyntheticShape shape;
  shape.inner = 768;
  const SyntheticModel model(shape);
  const Batch batch = Batch::Random(shape, 9, 51);
  Process one(model, {}, 1);
  const std::vector<float> want = one.F32(batch);
  for (const int threads : {2, 3, 7}) {
    Process many(model, {}, threads);
    EXPECT_TRUE(SameBits(many.F32(batch), want)) << threads;
  }
}

TEST(MoeTest, InstructionSetsDoNotChangeTheBits) {
  SyntheticShape shape;
  shape.inner = 768;
  const SyntheticModel model(shape);
  const Batch batch = Batch::Random(shape, 6, 61);
  const kernels::Isa before = kernels::ActiveIsa();
  std::vector<float> want;
  for (const kernels::Isa isa : kernels::AvailableIsas()) {
    kernels::SetActiveIsaForTesting(isa);
    Process process(model);
    const std::vector<float> got = process.F32(batch);
    if (want.empty()) want = got;
    EXPECT_TRUE(SameBits(got, want)) << kernels::IsaName(isa);
  }
  kernels::SetActiveIsaForTesting(before);
}

TEST(MoeTest, AbsentAndForeignExpertsAddNothing) {
  const SyntheticModel model(SyntheticShape{});
  Process whole(model);
  Batch batch = Batch::Random(model.shape(), 2, 71);
  batch.ids = {1, -1, 3, 2};
  const std::vector<double> want = model.Reference(1, batch.x, batch.ids, batch.weights, batch.k);
  EXPECT_LT(RelativeError(whole.F32(batch), want), 0.02);

  Process first_two(model, {.expert_begin = 0, .expert_end = 2});
  const std::vector<float> part = first_two.F32(batch);
  Batch only = batch;
  only.ids = {1, -1, -1, -1};
  EXPECT_TRUE(SameBits(part, whole.F32(only)));
  for (int64_t o = 0; o < model.shape().hidden; ++o) {
    EXPECT_EQ(part[static_cast<size_t>(model.shape().hidden + o)], 0.0f) << "token 1 has no expert here";
  }
  batch.ids = {-1, -1, -1, -1};
  for (const float value : whole.F32(batch)) EXPECT_EQ(value, 0.0f);
}

TEST(MoeTest, TheSameExpertTwiceCountsTwice) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  Batch twice = Batch::Random(model.shape(), 1, 81);
  twice.ids = {3, 3};
  twice.weights = {0.25f, 0.5f};
  Batch once = twice;
  once.ids = {3, -1};
  once.weights = {0.75f, 0.0f};
  const std::vector<float> a = process.F32(twice), b = process.F32(once);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-6 * (1 + std::abs(b[i])));
}

TEST(MoeTest, Bf16Activations) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  Batch batch = Batch::Random(model.shape(), 3, 91);
  std::vector<uint16_t> half;
  for (float& value : batch.x) {
    half.push_back(quant::FloatToBf16(value));
    value = quant::Bf16ToFloat(half.back());
  }
  Call call = ToCall(batch, AnswerType::kF32);
  call.activations = Bytes(half);
  call.activation_type = ActivationType::kBf16;
  EXPECT_TRUE(SameBits(process.Run<float>(call), process.F32(batch)));
}

TEST(MoeTest, UnalignedBytes) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  const Batch batch = Batch::Random(model.shape(), 2, 95);
  Call call = ToCall(batch, AnswerType::kF64);
  std::vector<uint8_t> bytes(1);
  bytes.insert(bytes.end(), call.activations.begin(), call.activations.end());
  call.activations = std::span<const uint8_t>(bytes).subspan(1);
  std::vector<uint8_t> answer(1 + process.moe().AnswerBytes(2, AnswerType::kF64));
  ASSERT_TRUE(process.moe().Forward(call, std::span<uint8_t>(answer).subspan(1)).ok());
  const std::vector<double> want = process.F64(batch);
  EXPECT_EQ(std::memcmp(answer.data() + 1, want.data(), want.size() * 8), 0);
}

TEST(MoeTest, ATokenThatIsNotANumberSpoilsOnlyItself) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  Batch batch = Batch::Random(model.shape(), 3, 101);
  const std::vector<float> want = process.F32(batch);
  const auto hidden = static_cast<size_t>(model.shape().hidden);
  batch.x[hidden] = std::numeric_limits<float>::quiet_NaN();
  batch.x[hidden + 1] = std::numeric_limits<float>::infinity();
  const std::vector<float> got = process.F32(batch);
  EXPECT_EQ(std::memcmp(got.data(), want.data(), hidden * 4), 0);
  EXPECT_EQ(std::memcmp(got.data() + 2 * hidden, want.data() + 2 * hidden, hidden * 4), 0);
}

TEST(MoeTest, EveryDistinctExpertIsCountedOnce) {
  SyntheticShape shape;
  shape.experts = 8;
  const SyntheticModel model(shape);
  Process process(model);
  Batch batch = Batch::Random(shape, 3, 111);
  batch.ids = {0, 5, 5, 0, 7, -1};
  std::vector<uint8_t> answer(process.moe().AnswerBytes(3, AnswerType::kF32));
  const auto done = process.moe().Forward(ToCall(batch, AnswerType::kF32), answer);
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(done->distinct_experts, 3);
  const int64_t each = 2 * shape.inner * gguf::RowBytes(shape.gate, shape.hidden) +
                       shape.hidden * gguf::RowBytes(shape.down, shape.inner);
  EXPECT_EQ(done->weight_bytes_read, static_cast<uint64_t>(3 * each));
  EXPECT_GT(done->nanoseconds, 0);
}

TEST(MoeTest, CallsFromSeveralThreads) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  std::vector<std::thread> callers;
  for (uint64_t c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      const Batch batch = Batch::Random(model.shape(), static_cast<int64_t>(c) + 1, c);
      const std::vector<float> want = process.F32(batch);
      for (int i = 0; i < 20; ++i) EXPECT_TRUE(SameBits(process.F32(batch), want));
    });
  }
  for (std::thread& caller : callers) caller.join();
}

TEST(MoeTest, BadCallsAreNamedAndHarmless) {
  const SyntheticModel model(SyntheticShape{});
  Process process(model);
  const Batch batch = Batch::Random(model.shape(), 2, 121);
  const Call good = ToCall(batch, AnswerType::kF32);
  std::vector<uint8_t> answer(process.moe().AnswerBytes(2, AnswerType::kF32));
  const auto expect = [&](const Call& call, std::span<uint8_t> to, absl::StatusCode code, const char* text) {
    const auto done = process.moe().Forward(call, to);
    EXPECT_EQ(done.status().code(), code) << done.status();
    EXPECT_THAT(std::string(done.status().message()), HasSubstr(text));
  };
  Call call = good;
  for (const int64_t layer : {int64_t{0}, int64_t{2}, int64_t{-1}, int64_t{1} << 40}) {
    call.layer = layer;
    expect(call, answer, absl::StatusCode::kNotFound, "is not held here");
  }
  call = good;
  for (const int64_t n : {int64_t{0}, int64_t{-1}, int64_t{1025}, int64_t{1} << 62}) {
    call.n_tokens = n;
    expect(call, answer, absl::StatusCode::kInvalidArgument, "tokens; from 1 to 1024");
  }
  call = good;
  for (const int64_t k : {int64_t{0}, int64_t{-3}, int64_t{5}, int64_t{1} << 62}) {
    call.experts_per_token = k;
    expect(call, answer, absl::StatusCode::kInvalidArgument, "experts per token");
  }
  call = good;
  call.expert_ids = call.expert_ids.first(15);
  expect(call, answer, absl::StatusCode::kInvalidArgument, "expert_ids has 15 bytes");
  call = good;
  call.expert_weights = {};
  expect(call, answer, absl::StatusCode::kInvalidArgument, "expert_weights has 0 bytes");
  call = good;
  call.activation_type = ActivationType::kBf16;
  expect(call, answer, absl::StatusCode::kInvalidArgument, "activations has 2048 bytes");
  call = good;
  call.answer_type = AnswerType::kF64;
  expect(call, answer, absl::StatusCode::kInvalidArgument, "the answer has 2048 bytes");
  for (const int32_t id : {-2, 4, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Batch bad = batch;
    bad.ids[3] = id;
    expect(ToCall(bad, AnswerType::kF32), answer, absl::StatusCode::kInvalidArgument,
           "token 1, expert 1 of its 2");
  }
  EXPECT_TRUE(process.moe().Forward(good, answer).ok());
}

}  // namespace
}  // namespace tandem::expert
