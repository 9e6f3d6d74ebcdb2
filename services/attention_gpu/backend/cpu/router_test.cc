#include "services/attention_gpu/backend/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

using model::ModelConfig;
using model::ScoringFunc;

ModelConfig V3Like(int experts, int groups, int top_groups, int k) {
  ModelConfig c;
  c.n_routed_experts = experts;
  c.n_group = groups;
  c.topk_group = top_groups;
  c.num_experts_per_tok = k;
  c.scoring_func = ScoringFunc::kSigmoid;
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.5;
  return c;
}

struct Routed {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routed RouteOne(const ModelConfig& c, const std::vector<float>& logits, const std::vector<float>& bias = {}) {
  Routed r{std::vector<int32_t>(c.num_experts_per_tok), std::vector<float>(c.num_experts_per_tok)};
  std::vector<float> scratch(2 * c.n_routed_experts);
  Route(c, logits.data(), bias.empty() ? nullptr : bias.data(), r.ids.data(), r.weights.data(),
        scratch.data());
  return r;
}

// The report's equations, written with sorts instead of scans.
Routed Naive(const ModelConfig& c, const std::vector<float>& logits, const std::vector<float>& bias) {
  const int n = static_cast<int>(logits.size()), size = n / static_cast<int>(c.n_group);
  std::vector<double> score(n), choice(n);
  double total = 0;
  for (int e = 0; e < n; ++e) total += std::exp(logits[e]);
  for (int e = 0; e < n; ++e) {
    score[e] = c.scoring_func == ScoringFunc::kSigmoid ? 1 / (1 + std::exp(-logits[e]))
                                                       : std::exp(logits[e]) / total;
    choice[e] = score[e] + (bias.empty() ? 0 : bias[e]);
  }
  std::vector<std::pair<double, int>> groups;
  for (int g = 0; g < c.n_group; ++g) {
    std::vector<double> in(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(in.rbegin(), in.rend());
    groups.push_back({-(c.scoring_func == ScoringFunc::kSigmoid && size > 1 ? in[0] + in[1] : in[0]), g});
  }
  std::sort(groups.begin(), groups.end());
  std::vector<std::pair<double, int>> eligible;
  for (int i = 0; i < c.topk_group; ++i) {
    for (int e = groups[i].second * size; e < (groups[i].second + 1) * size; ++e)
      eligible.push_back({-choice[e], e});
  }
  std::sort(eligible.begin(), eligible.end());
  Routed r;
  double sum = 0;
  for (int i = 0; i < c.num_experts_per_tok; ++i) sum += score[eligible[i].second];
  for (int i = 0; i < c.num_experts_per_tok; ++i) {
    r.ids.push_back(eligible[i].second);
    r.weights.push_back(
        static_cast<float>(score[r.ids[i]] / (c.norm_topk_prob ? sum : 1) * c.routed_scaling_factor));
  }
  return r;
}

TEST(Route, EqualsTheEquationsOverRandomScores) {
  std::mt19937 rng(1);
  std::normal_distribution<float> d(0, 2);
  for (int round = 0; round < 400; ++round) {
    ModelConfig c = V3Like(256, 8, 4, 8);
    if (round % 4 == 1) c = V3Like(16, 4, 2, 4);
    if (round % 4 == 2) c = V3Like(64, 1, 1, 6);
    if (round % 4 == 3) {
      c = V3Like(160, 8, 3, 6);
      c.scoring_func = ScoringFunc::kSoftmax;
      c.norm_topk_prob = false;
      c.routed_scaling_factor = 16;
    }
    std::vector<float> logits(c.n_routed_experts), bias;
    for (float& l : logits) l = d(rng);
    if (c.scoring_func == ScoringFunc::kSigmoid) {
      for (int64_t e = 0; e < c.n_routed_experts; ++e) bias.push_back(0.1f * d(rng));
    }
    const Routed got = RouteOne(c, logits, bias), want = Naive(c, logits, bias);
    ASSERT_EQ(got.ids, want.ids) << "round " << round;
    for (size_t i = 0; i < got.ids.size(); ++i)
      ASSERT_NEAR(got.weights[i], want.weights[i], 1e-5 * want.weights[i]);
  }
}

TEST(Route, TheBiasChoosesButDoesNotWeigh) {
  const ModelConfig c = V3Like(4, 1, 1, 1);
  const Routed r = RouteOne(c, {2, 1, 0, -1}, {0, 0, 0, 5});
  EXPECT_EQ(r.ids[0], 3);
  EXPECT_FLOAT_EQ(r.weights[0], 2.5f);
}

TEST(Route, GroupsKeepGoodExpertsOut) {
  // Group 0 holds the single best expert, groups 1 and 2 the better pairs.
  const ModelConfig c = V3Like(6, 3, 2, 2);
  const Routed r = RouteOne(c, {3, -9, 2, 2, 2.5f, 1});
  EXPECT_THAT(r.ids, testing::ElementsAre(4, 2));
}

TEST(Route, BrokenLogitsStillGiveDistinctIdsInRange) {
  const ModelConfig c = V3Like(16, 4, 2, 4);
  const Routed r = RouteOne(c, std::vector<float>(16, std::numeric_limits<float>::quiet_NaN()));
  std::vector<int32_t> ids = r.ids;
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::unique(ids.begin(), ids.end()), ids.end());
  EXPECT_GE(ids.front(), 0);
  EXPECT_LT(ids.back(), 16);
}

}  // namespace
}  // namespace tandem::attention
