// The parts of a call by themselves: grouping, accumulation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "common/model/expert_sum.h"
#include "services/expert_cpu/moe/accumulate.h"
#include "services/expert_cpu/moe/grouping.h"
#include "services/expert_cpu/testing/synthetic_model.h"

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

TEST(AccumulateTest, EveryInstructionSetIsTheDefinition) {
  for (int64_t leaves = 1; leaves <= 17; ++leaves) {
    const int64_t rows = 5;
    const std::vector<float> parts = testing::RandomFloats(rows * leaves, static_cast<uint64_t>(leaves));
    const float weight = 0.37f;
    std::vector<double> want(static_cast<size_t>(rows), 0.5);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < leaves; ++b) {
        model::AccumulateExpert(weight, &parts[static_cast<size_t>(r * leaves + b)],
                                &want[static_cast<size_t>(r)], 1);
      }
    }
    for (const kernels::Isa isa : kernels::AvailableIsas()) {
      std::vector<double> got(static_cast<size_t>(rows), 0.5);
      AccumulateLeavesFor(isa)(weight, parts.data(), rows, leaves, got.data());
      EXPECT_EQ(std::memcmp(got.data(), want.data(), got.size() * sizeof(double)), 0)
          << kernels::IsaName(isa) << ", " << leaves << " leaves";
    }
  }
}

TEST(AccumulateTest, InfinitiesPassThrough) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> parts = {1, 2, 3, 1, infinity, 3};
  for (const kernels::Isa isa : kernels::AvailableIsas()) {
    std::vector<double> got(2, 0.0);
    AccumulateLeavesFor(isa)(infinity, parts.data(), 2, 3, got.data());
    EXPECT_TRUE(std::isnan(got[0]) || std::isinf(got[0])) << kernels::IsaName(isa);
    got.assign(2, 0.0);
    AccumulateLeavesFor(isa)(1.0f, parts.data(), 2, 3, got.data());
    EXPECT_EQ(got[0], 6.0);
    EXPECT_FALSE(std::isfinite(got[1]));
  }
}

}  // namespace
}  // namespace tandem::expert
