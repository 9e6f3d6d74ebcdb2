#include "services/attention_gpu/experts/deferral.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/attention_gpu/experts/deferral_rule.h"

namespace tandem::attention {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

model::ModelConfig Config(int64_t k) {
  model::ModelConfig c;
  c.num_hidden_layers = 6;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = k;
  return c;
}

TEST(Deferral, FromNoneToAllButOne) {
  for (int64_t n : {0, 1, 7}) EXPECT_TRUE(CheckDeferExperts(Config(8), n).ok()) << n;
  for (int64_t n : {-1, 8, 100}) {
    const absl::Status s = CheckDeferExperts(Config(8), n);
    EXPECT_TRUE(absl::IsInvalidArgument(s)) << n;
    EXPECT_THAT(std::string(s.message()), HasSubstr("a token goes to 8 experts, of which 0 to 7"));
  }
  model::ModelConfig dense = Config(8);
  dense.n_routed_experts = 0;
  dense.first_k_dense_replace = dense.num_hidden_layers;
  EXPECT_TRUE(CheckDeferExperts(dense, 0).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(CheckDeferExperts(dense, 1)));
}

// Selection goes by score and bias, weights by score alone: the order of the ids is not that of the weights.
TEST(Deferral, TheSmallestWeightsWaitAndOfEqualOnesTheLater) {
  const float weights[] = {0.3f, 0.1f, 0.4f, 0.1f};
  const auto waiting = [&](int32_t n) {
    std::vector<int> out;
    for (int32_t j = 0; j < 4; ++j) {
      if (IsDeferred(weights, 4, j, n)) out.push_back(j);
    }
    return out;
  };
  EXPECT_THAT(waiting(0), ElementsAre());
  EXPECT_THAT(waiting(1), ElementsAre(3));
  EXPECT_THAT(waiting(2), ElementsAre(1, 3));
  EXPECT_THAT(waiting(3), ElementsAre(0, 1, 3));
}

TEST(Deferral, EveryExpertIsInOneOfTheTwoCalls) {
  const std::vector<int32_t> ids = {5, 2, 9, 7, 1, 3};
  const std::vector<float> weights = {0.5f, 0.2f, 0.3f, 0.1f, 0.6f, 0.3f};
  const std::vector<int32_t> defers = {0, 1};
  SplitRouting split;
  split.Assign(ids.data(), weights.data(), defers, 3, 2);
  EXPECT_THAT(split.ids, ElementsAre(5, 2, 9, -1, 1, -1));
  EXPECT_THAT(split.weights, ElementsAre(0.5f, 0.2f, 0.3f, 0, 0.6f, 0));
  EXPECT_THAT(split.later_ids, ElementsAre(-1, -1, -1, 7, -1, 3));
  EXPECT_THAT(split.later_weights, ElementsAre(0, 0, 0, 0.1f, 0, 0.3f));
}

}  // namespace
}  // namespace tandem::attention
