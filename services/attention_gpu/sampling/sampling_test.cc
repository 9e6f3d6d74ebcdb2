#include "services/attention_gpu/sampling/sampling.h"

#include <cmath>
#include <limits>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

using Counts = std::unordered_map<int32_t, int32_t>;

SampledToken SampleCopy(std::vector<float> logits, const SamplingParams& p, uint64_t position = 0,
                        const Counts& counts = {}) {
  return Sample(logits, p, position, counts);
}

std::vector<float> RandomLogits(int n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> d(0, 3);
  std::vector<float> l(n);
  for (float& x : l) x = d(rng);
  return l;
}

// The share of each token over many positions.
std::vector<double> Shares(const std::vector<float>& logits, const SamplingParams& p, int draws) {
  std::vector<double> share(logits.size());
  for (int i = 0; i < draws; ++i) share[SampleCopy(logits, p, i).token] += 1.0 / draws;
  return share;
}

std::vector<double> Softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  double sum = 0;
  for (float l : logits) {
    p.push_back(std::exp(l / temperature));
    sum += p.back();
  }
  for (double& x : p) x /= sum;
  return p;
}

// Known answers of Philox 4x32-10 with a zero key and counter, and with all ones (Random123's test vectors):
// first words 6627e8d5 e169c58d and 408f276d 41c83b0e.
TEST(UniformAt, IsPhilox) {
  const uint64_t zero = (uint64_t{0x6627e8d5} << 32 | 0xe169c58d) >> 11;
  EXPECT_EQ(UniformAt(0, 0), static_cast<double>(zero) * 0x1p-53);
}

TEST(UniformAt, IsUniformAndDependsOnSeedAndPosition) {
  double sum = 0;
  for (int i = 0; i < 10000; ++i) sum += UniformAt(42, i);
  EXPECT_NEAR(sum / 10000, 0.5, 0.02);
  EXPECT_NE(UniformAt(1, 5), UniformAt(2, 5));
  EXPECT_NE(UniformAt(1, 5), UniformAt(1, 6));
  EXPECT_EQ(UniformAt(1, 5), UniformAt(1, 5));
}

TEST(Sample, GreedyTakesTheFirstOfTheBest) { EXPECT_EQ(SampleCopy({1, 3, 2, 3}, {}).token, 1); }

TEST(Sample, NanCountsAsImpossible) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(SampleCopy({nan, 1, nan, 2}, {}).token, 3);
  SamplingParams p;
  p.temperature = 1;
  for (int i = 0; i < 100; ++i) EXPECT_THAT(SampleCopy({nan, 1, nan, 2}, p, i).token, testing::AnyOf(1, 3));
  EXPECT_EQ(SampleCopy({nan, nan}, {}).token, 0);
}

TEST(Sample, WithoutFiniteWeightsTheFirstOfTheBestIsTaken) {
  const float inf = std::numeric_limits<float>::infinity();
  SamplingParams p;
  p.temperature = 1;
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(SampleCopy({-inf, -inf, -inf}, p, i).token, 0);
    EXPECT_EQ(SampleCopy({1, inf, 2, inf}, p, i).token, 1);
  }
}

TEST(Sample, TopPIsAShareOfWhatALargeTopKLeaves) {
  // 20 likely tokens of equal weight, far above the rest: 0.5 of them are 10, whatever min_p drops of the
  // rest.
  std::vector<float> logits(2000, 0.0f);
  std::fill_n(logits.begin(), 20, 20.0f);
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 1000;
  p.top_p = 0.499f;
  p.min_p = 0.1f;
  const auto share = Shares(logits, p, 2000);
  for (int i = 0; i < 10; ++i) EXPECT_NEAR(share[i], 0.1, 0.03);
  EXPECT_EQ(share[10], 0);
}

TEST(Sample, FollowsTheDistribution) {
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f, 1.0f, 0.0f};
  for (double t : {0.5, 1.0, 2.0}) {
    SamplingParams p;
    p.temperature = static_cast<float>(t);
    p.seed = 11;
    const auto want = Softmax(logits, t), got = Shares(logits, p, 40000);
    for (size_t i = 0; i < logits.size(); ++i)
      EXPECT_NEAR(got[i], want[i], 0.01) << "token " << i << " at " << t;
  }
}

TEST(Sample, TopKAndTopPAndMinPCutTheTail) {
  const std::vector<float> logits = {0, 1, 2, 3, 4};  // shares .012 .032 .086 .234 .636
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 2;
  auto s = Shares(logits, p, 4000);
  EXPECT_EQ(s[0] + s[1] + s[2], 0);
  EXPECT_NEAR(s[4], 0.731, 0.03);
  p.top_k = 0;
  p.top_p = 0.8f;  // .636 alone is not enough, with .234 it is
  s = Shares(logits, p, 4000);
  EXPECT_EQ(s[0] + s[1] + s[2], 0);
  EXPECT_GT(s[3], 0.2);
  p.top_p = 0.6f;
  EXPECT_NEAR(Shares(logits, p, 500)[4], 1, 1e-9);
  p.top_p = 1;
  p.min_p = 0.2f;  // exp(-1) = .37 stays, exp(-2) = .14 goes
  s = Shares(logits, p, 4000);
  EXPECT_EQ(s[0] + s[1] + s[2], 0);
  EXPECT_GT(s[3], 0.2);
}

TEST(Sample, AFlatDistributionNeedsMoreCandidatesThanTheFirstGuess) {
  const std::vector<float> flat(5000, 0.0f);
  SamplingParams p;
  p.temperature = 1;
  p.top_p = 0.9f;
  std::vector<int> seen(5000);
  int outside = 0;
  for (int i = 0; i < 3000; ++i) {
    const int t = SampleCopy(flat, p, i).token;
    outside += t >= 4501;
    ++seen[t / 500];
  }
  EXPECT_EQ(outside, 0) << "ties go to the lower ids, 90 % of them are ids below 4500";
  for (int bin = 0; bin < 9; ++bin) EXPECT_GT(seen[bin], 200);
}

TEST(Sample, TheSameSeedAndPositionGiveTheSameToken) {
  const auto logits = RandomLogits(1000, 3);
  SamplingParams p;
  p.temperature = 1.5f;
  p.seed = 99;
  for (int i = 0; i < 50; ++i) EXPECT_EQ(SampleCopy(logits, p, i).token, SampleCopy(logits, p, i).token);
}

TEST(Sample, PenaltiesAndBias) {
  SamplingParams p;
  p.frequency_penalty = 1;
  EXPECT_EQ(SampleCopy({3, 2.5f}, p, 0, {{0, 1}}).token, 1);
  p.frequency_penalty = 0;
  p.presence_penalty = 0.4f;
  EXPECT_EQ(SampleCopy({3, 2.5f}, p, 0, {{0, 9}}).token, 0);
  p.presence_penalty = 0;
  p.repetition_penalty = 2;
  EXPECT_EQ(SampleCopy({3, 2.5f}, p, 0, {{0, 1}}).token, 1);
  p.repetition_penalty = 1;
  p.logit_bias = {{1, 1.0f}};
  EXPECT_EQ(SampleCopy({3, 2.5f}, p).token, 1);
}

TEST(Sample, LogprobsAreTheModelsOwn) {
  const auto logits = RandomLogits(500, 5);
  SamplingParams p;
  p.temperature = 2;
  p.logprobs = true;
  p.top_logprobs = 5;
  p.logit_bias = {{3, 5.0f}};
  const SampledToken t = SampleCopy(logits, p, 8);
  const auto want = Softmax(logits, 1);
  ASSERT_EQ(t.top.size(), 5u);
  EXPECT_NEAR(t.logprob, std::log(want[t.token]), 1e-4);
  for (size_t i = 0; i < t.top.size(); ++i) {
    EXPECT_NEAR(t.top[i].logprob, std::log(want[t.top[i].token]), 1e-4);
    if (i > 0) {
      EXPECT_LE(t.top[i].logprob, t.top[i - 1].logprob);
    }
  }
}

TEST(Validate, NamesTheParameterAndItsRange) {
  auto message = [](auto change) {
    SamplingParams p;
    change(p);
    return std::string(Validate(p, 100).message());
  };
  EXPECT_EQ(message([](SamplingParams&) {}), "");
  EXPECT_THAT(message([](SamplingParams& p) { p.temperature = -1; }), testing::HasSubstr("temperature = -1"));
  EXPECT_THAT(message([](SamplingParams& p) { p.temperature = std::nanf(""); }),
              testing::HasSubstr("temperature"));
  EXPECT_THAT(message([](SamplingParams& p) { p.top_p = 1.5f; }), testing::HasSubstr("(0, 1]"));
  EXPECT_THAT(message([](SamplingParams& p) { p.min_p = 1; }), testing::HasSubstr("min_p"));
  EXPECT_THAT(message([](SamplingParams& p) { p.presence_penalty = 3; }),
              testing::HasSubstr("presence_penalty"));
  EXPECT_THAT(message([](SamplingParams& p) { p.frequency_penalty = -3; }),
              testing::HasSubstr("frequency_penalty"));
  EXPECT_THAT(message([](SamplingParams& p) { p.repetition_penalty = 0; }),
              testing::HasSubstr("repetition_penalty"));
  EXPECT_THAT(message([](SamplingParams& p) { p.top_logprobs = 21; }), testing::HasSubstr("top_logprobs"));
  EXPECT_THAT(message([](SamplingParams& p) {
                p.logit_bias = {{100, 0.0f}};
              }),
              testing::HasSubstr("[0, 100)"));
}

}  // namespace
}  // namespace tandem::attention
