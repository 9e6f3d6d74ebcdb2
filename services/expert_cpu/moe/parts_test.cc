// The parts of a call by themselves: grouping, claims.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "services/expert_cpu/moe/claims.h"
#include "services/expert_cpu/moe/grouping.h"

namespace tandem::expert {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

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

// Whatever the workers' speeds, each number comes once, and what was announced comes unless it was taken.
TEST(ClaimsTest, EveryNumberOnce) {
  std::mt19937 random(5);
  for (const int workers : {1, 2, 5}) {
    Claims claims(workers);
    for (const int64_t n : {0, 1, 4, 5, 6, 1000}) {
      claims.Reset(n);
      std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
      std::vector<std::thread> threads;
      for (int w = 0; w < workers; ++w) {
        const unsigned delay = random() % 4;
        threads.emplace_back([&, w, delay] {
          int64_t announced = -1;
          claims.Run(w, [&](int64_t number, bool expected, int64_t next) {
            ++seen[static_cast<size_t>(number)];
            EXPECT_EQ(expected, announced == number && announced >= 0);
            announced = next;
            for (unsigned i = 0; i < delay; ++i) std::this_thread::yield();
          });
        });
      }
      for (std::thread& t : threads) t.join();
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(seen[static_cast<size_t>(i)], 1) << i << " of " << n;
    }
  }
}

// A worker that never comes leaves nothing undone.
TEST(ClaimsTest, WhatAnAbsentWorkerHoldsIsTaken) {
  Claims claims(4);
  claims.Reset(9);
  std::vector<int64_t> seen;
  claims.Run(2, [&](int64_t number, bool, int64_t) { seen.push_back(number); });
  EXPECT_THAT(seen, UnorderedElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8));
  EXPECT_EQ(seen.front(), 2);
}

}  // namespace
}  // namespace tandem::expert
