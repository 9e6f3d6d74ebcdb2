// The parts of a call by themselves: grouping.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "services/expert_cpu/moe/grouping.h"

namespace tandem::expert {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(GroupingTest, SortsPairsByExpertLargestFirst) {
  Grouping grouping;
  const std::vector<int32_t> ids = {7, 2, 2, -1, 5, 2};
  const std::vector<float> weights = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f};
  for (int repeat = 0; repeat < 2; ++repeat) {
    grouping.Build(ids, weights, 2, 2, 8);
    ASSERT_EQ(grouping.groups().size(), 3u);
    EXPECT_EQ(grouping.groups()[0].expert, 0);  // 2 is the first held
    EXPECT_EQ(grouping.groups()[0].pairs, 3);
    EXPECT_EQ(grouping.groups()[1].expert, 3);
    EXPECT_EQ(grouping.groups()[1].first_pair, 3);
    EXPECT_EQ(grouping.groups()[2].expert, 5);
    EXPECT_EQ(grouping.groups()[2].first_pair, 4);
    EXPECT_THAT(grouping.tokens(), ElementsAre(0, 1, 2, 2, 0));
    EXPECT_THAT(grouping.weights(), ElementsAre(0.2f, 0.3f, 0.6f, 0.5f, 0.1f));
  }
  grouping.Build(ids, weights, 2, 8, 10);
  EXPECT_THAT(grouping.groups(), IsEmpty());
  EXPECT_THAT(grouping.tokens(), IsEmpty());
}

}  // namespace
}  // namespace tandem::expert
