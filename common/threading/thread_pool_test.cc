#include "common/threading/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <random>
#include <thread>

namespace tandem::threading {
namespace {

using std::chrono::milliseconds;

double ProcessCpuSeconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

TEST(ThreadPool, EveryIndexOnceWhateverTheShape) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool({.threads = threads});
    ASSERT_EQ(pool.threads(), threads);
    std::mt19937 rng(7);
    for (int round = 0; round < 300; ++round) {
      const int64_t n = static_cast<int64_t>(rng() % 500);
      const int64_t grain = static_cast<int64_t>(rng() % 40);  // 0 counts as 1
      std::vector<int> hits(static_cast<size_t>(n), 0);        // not atomic: TSan sees what overlaps
      pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int worker) {
        EXPECT_LT(begin, end);
        EXPECT_EQ(begin % std::max<int64_t>(1, grain), 0);
        EXPECT_LE(end - begin, std::max<int64_t>(1, grain));
        EXPECT_GE(worker, 0);
        EXPECT_LT(worker, threads);
        for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
      });
      EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), n);
    }
  }
}

TEST(ThreadPool, ZeroThreadsMeansTheAllowedCpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  ThreadPool pool(ThreadPool::Options{});
  EXPECT_EQ(pool.threads(), CPU_COUNT(&set));
}

TEST(ThreadPool, NothingToDoCallsNothing) {
  ThreadPool pool({.threads = 2});
  pool.ParallelFor(0, 4, [](int64_t, int64_t, int) { FAIL(); });
  pool.ParallelFor(-3, 4, [](int64_t, int64_t, int) { FAIL(); });
  pool.RunPhases({});
}

TEST(ThreadPool, ResultsOfOneLoopAreVisibleToTheNext) {
  ThreadPool pool({.threads = 4});
  std::vector<int64_t> a(1000), b(1000);
  for (int round = 0; round < 500; ++round) {
    pool.ParallelFor(1000, 37, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) a[static_cast<size_t>(i)] = i + round;
    });
    pool.ParallelFor(1000, 29, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) b[static_cast<size_t>(i)] = a[static_cast<size_t>(999 - i)];
    });
    ASSERT_EQ(b[0], 999 + round);
    ASSERT_EQ(std::accumulate(b.begin(), b.end(), int64_t{0}), 499500 + 1000 * round);
  }
}

TEST(ThreadPool, PhasesRunInOrderEachAfterTheWholeOfTheOneBefore) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool({.threads = threads});
    for (int round = 0; round < 300; ++round) {
      std::vector<int> a(97, 0), b(97, 0);
      int64_t sum = 0;
      const auto first = [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) a[static_cast<size_t>(i)] = static_cast<int>(i) + 1;
      };
      const auto second = [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) b[static_cast<size_t>(i)] = 2 * a[static_cast<size_t>(96 - i)];
      };
      const auto third = [&](int64_t, int64_t, int) {
        sum = std::accumulate(b.begin(), b.end(), int64_t{0});
      };
      const ThreadPool::Phase phases[] = {{0, 1, third}, {97, 5, first}, {97, 3, second},
                                          {0, 1, first}, {1, 1, third},  {0, 1, first}};
      pool.RunPhases(phases);
      ASSERT_EQ(sum, 97 * 98);
    }
  }
}

TEST(ThreadPool, CallersFromSeveralThreadsTakeTurns) {
  ThreadPool pool({.threads = 3});
  std::atomic<int> inside{0};
  std::vector<std::thread> callers;
  std::vector<int64_t> totals(4, 0);
  for (size_t c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<int64_t> sum{0};
        pool.ParallelFor(64, 5, [&](int64_t begin, int64_t end, int) {
          inside.fetch_add(1);
          EXPECT_LE(inside.load(), 3);  // never more than the pool's threads at work
          for (int64_t i = begin; i < end; ++i) sum.fetch_add(i);
          inside.fetch_sub(1);
        });
        totals[c] += sum.load();
      }
    });
  }
  for (std::thread& t : callers) t.join();
  for (int64_t total : totals) EXPECT_EQ(total, 200 * 2016);
}

TEST(ThreadPool, WorkersWakeAfterTheyHaveParked) {
  ThreadPool pool({.threads = 3, .spin_microseconds = 10});
  for (int round = 0; round < 30; ++round) {
    std::this_thread::sleep_for(milliseconds(2));
    std::atomic<int> arrived{0};
    std::atomic<bool> together{false};
    // Three chunks that each wait for the others: done only if all three threads come.
    pool.ParallelFor(3, 1, [&](int64_t, int64_t, int) {
      arrived.fetch_add(1);
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (arrived.load() < 3 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      if (arrived.load() == 3) together.store(true);
    });
    ASSERT_TRUE(together.load());
  }
}

TEST(ThreadPool, AnIdlePoolUsesNoProcessorTime) {
  ThreadPool pool({.threads = 4});
  pool.ParallelFor(100, 1, [](int64_t, int64_t, int) {});
  std::this_thread::sleep_for(milliseconds(100));
  const double before = ProcessCpuSeconds();
  std::this_thread::sleep_for(milliseconds(500));
  EXPECT_LT(ProcessCpuSeconds() - before, 0.01);
}

// A chunk that takes long holds up the end of the loop, but not the other chunks.
TEST(ThreadPool, ASlowChunkDoesNotHoldUpTheOthers) {
  ThreadPool pool({.threads = 2});
  std::atomic<int> done{0};
  std::atomic<bool> slow_saw_all{false};
  pool.ParallelFor(50, 1, [&](int64_t begin, int64_t, int) {
    if (begin == 0) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (done.load() < 49 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      slow_saw_all.store(done.load() == 49);
    } else {
      done.fetch_add(1);
    }
  });
  EXPECT_TRUE(slow_saw_all.load());
}

TEST(ThreadPool, PinsItsWorkersAndOutlivesCpusThatDoNotExist) {
  cpu_set_t set;
  CPU_ZERO(&set);
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &set)) ++cpu;
  for (int target : {cpu, CPU_SETSIZE + 5}) {
    ThreadPool pool({.threads = 2, .cpus = {target}});
    std::atomic<int> arrived{0};
    std::atomic<int> seen_cpus{-1};
    pool.ParallelFor(2, 1, [&](int64_t, int64_t, int worker) {
      arrived.fetch_add(1);
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (arrived.load() < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      if (worker == 1) {
        cpu_set_t own;
        CPU_ZERO(&own);
        sched_getaffinity(0, sizeof own, &own);
        seen_cpus.store(CPU_COUNT(&own));
      }
    });
    EXPECT_EQ(seen_cpus.load(), target == cpu ? 1 : CPU_COUNT(&set));
  }
}

TEST(ThreadPool, ComesAndGoesQuickly) {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool({.threads = 4});
    if (round % 2 == 0) {
      std::atomic<int> sum{0};
      pool.ParallelFor(10, 1, [&](int64_t begin, int64_t, int) { sum.fetch_add(static_cast<int>(begin)); });
      EXPECT_EQ(sum.load(), 45);
    }
  }
}

}  // namespace
}  // namespace tandem::threading
