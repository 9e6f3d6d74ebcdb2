// The parts of a call by themselves: grouping, units of work.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "services/expert_cpu/moe/grouping.h"
#include "services/expert_cpu/moe/work_units.h"

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

TEST(WorkUnitsTest, CoverAllRowsAndShrink) {
  WorkUnits units;
  for (const int64_t parts : {1, 2, 9}) {
    for (const int64_t rows : {1, 16, 40, 2048, 7168}) {
      for (const int64_t workers : {1, 2, 16, 100}) {
        const WorkUnits::Size size = {std::min<int64_t>(rows, 16), 256};
        units.Cut(parts, rows, workers, size);
        int64_t at = 0, shorter = 0, counted = 0;
        for (int64_t i = 0; i < units.count(); ++i) {
          const WorkUnits::Unit& unit = units[i];
          ASSERT_EQ(unit.part * rows + unit.begin, at);
          ASSERT_GT(unit.end, unit.begin);
          ASSERT_LE(unit.end, rows);
          ASSERT_LE(unit.end - unit.begin, size.most);
          // Only the end of a matrix makes one smaller than those after it.
          if (i > 0 && units[i - 1].end < rows) {
            ASSERT_GE(units[i - 1].end - units[i - 1].begin, unit.end - unit.begin);
          }
          shorter += unit.end - unit.begin < size.least ? 1 : 0;
          at += unit.end - unit.begin;
        }
        EXPECT_EQ(at, parts * rows);
        EXPECT_LE(shorter, parts);
        EXPECT_EQ(units[units.count() - 1].end, rows);
        for (int64_t part = 0; part < parts; ++part) counted += units.count_of(part);
        EXPECT_EQ(counted, units.count());
      }
    }
  }
}

TEST(WorkUnitsTest, ManyWorkersGetSmallUnitsAtTheEnd) {
  WorkUnits units;
  units.Cut(1, 7168, 16, {16, 256});
  EXPECT_EQ(units[0].end, 224);
  EXPECT_EQ(units[units.count() - 1].end - units[units.count() - 1].begin, 16);
  units.Cut(1, 24, 16, {16, 256});  // not a whole number of them
  ASSERT_EQ(units.count(), 2);
  EXPECT_EQ(units[1].begin, 16);
  EXPECT_EQ(units[1].end, 24);
}

}  // namespace
}  // namespace tandem::expert
