#include "common/threading/claims.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

namespace tandem::threading {
namespace {

using ::testing::UnorderedElementsAre;

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
}  // namespace tandem::threading
