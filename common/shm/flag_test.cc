#include "common/shm/flag.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <thread>

#include "absl/time/clock.h"
#include "common/shm/memory.h"

namespace tandem::shm {
namespace {

const std::atomic<bool> kNever{false};

class FlagTest : public ::testing::Test {
 protected:
  FlagTest() : memory_(*SharedMemory::Create("flag-test", 4096)) {
    there_ = new (memory_.data().data()) Flag{};
    back_ = new (memory_.data().data() + sizeof(Flag)) Flag{};
  }
  SharedMemory memory_;
  Flag* there_;
  Flag* back_;
};

TEST_F(FlagTest, TwoProcessesWakeEachOtherOutOfTheirSleep) {
  constexpr uint32_t kFirst = 0xffffff00, kRounds = 2000;  // past the wrap
  there_->sequence = kFirst;
  back_->sequence = kFirst;
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    Waiter waiter({absl::ZeroDuration()});
    for (uint32_t i = 1; i <= kRounds; ++i) {
      if (waiter.Wait(*there_, kFirst + i - 1, absl::Seconds(20), kNever) != WaitResult::kSignalled) _exit(1);
      if (there_->sequence != kFirst + i) _exit(2);
      Signal(*back_, kFirst + i);
    }
    _exit(0);
  }
  Waiter waiter({absl::ZeroDuration()});
  for (uint32_t i = 1; i <= kRounds; ++i) {
    Signal(*there_, kFirst + i);
    ASSERT_EQ(waiter.Wait(*back_, kFirst + i - 1, absl::Seconds(20), kNever), WaitResult::kSignalled) << i;
    ASSERT_EQ(back_->sequence, kFirst + i);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_GT(waiter.sleeps(), 0u);
}

// A device's number wakes nobody; SetAwake must, also who has just looked and is about to sleep.
TEST_F(FlagTest, NobodySleepsThroughADevicesNumber) {
  constexpr uint32_t kRounds = 20000;
  uint64_t overslept = 0;
  std::thread waiting([&] {
    Waiter waiter({absl::ZeroDuration()});
    for (uint32_t i = 0; i < kRounds; ++i) {
      ASSERT_EQ(waiter.Wait(*there_, i, absl::Seconds(20), kNever), WaitResult::kSignalled) << i;
      back_->sequence.store(i + 1, std::memory_order_release);
    }
    overslept = waiter.overslept();
  });
  for (uint32_t i = 0; i < kRounds; ++i) {
    // From the waiter's way to sleep to well after it.
    for (uint32_t pause = i % 2048; pause > 0; --pause) std::atomic_signal_fence(std::memory_order_seq_cst);
    SetAwake(*there_, true);
    there_->sequence.store(i + 1, std::memory_order_release);
    while (back_->sequence.load(std::memory_order_acquire) != i + 1) std::this_thread::yield();
    SetAwake(*there_, false);
  }
  waiting.join();
  EXPECT_EQ(overslept, 0u);
}

// Where the system takes the CPU away in between, a waiter sleeps; so one undisturbed run of many is asked
// for.
TEST_F(FlagTest, NoSystemCallWhileSpinningIsEnough) {
  uint64_t least = UINT64_MAX;
  for (int run = 0; run < 200 && least > 0; ++run) {
    there_->sequence = 0;
    back_->sequence = 0;
    Waiter here({absl::Seconds(20)}), over_there({absl::Seconds(20)});
    std::thread peer([&] {
      for (uint32_t i = 0; i < 50; ++i) {
        ASSERT_EQ(over_there.Wait(*there_, i, absl::Seconds(20), kNever), WaitResult::kSignalled);
        Signal(*back_, i + 1);
      }
    });
    for (uint32_t i = 0; i < 50; ++i) {
      Signal(*there_, i + 1);
      ASSERT_EQ(here.Wait(*back_, i, absl::Seconds(20), kNever), WaitResult::kSignalled);
    }
    peer.join();
    least = std::min(least, here.sleeps() + over_there.sleeps());
  }
  EXPECT_EQ(least, 0u);
}

TEST_F(FlagTest, TimesOutAndOnlyLooksWithoutTime) {
  Waiter waiter({absl::Milliseconds(1)});
  const absl::Time before = absl::Now();
  EXPECT_EQ(waiter.Wait(*there_, 0, absl::Milliseconds(30), kNever), WaitResult::kTimeout);
  EXPECT_GE(absl::Now() - before, absl::Milliseconds(29));
  EXPECT_EQ(waiter.Wait(*there_, 0, absl::ZeroDuration(), kNever), WaitResult::kTimeout);
  EXPECT_EQ(waiter.Wait(*there_, 7, absl::ZeroDuration(), kNever), WaitResult::kSignalled);
  EXPECT_EQ(there_->sleeping, 0u);
}

TEST_F(FlagTest, StopEndsSpinningAndSleeping) {
  for (const absl::Duration spin : {absl::Seconds(20), absl::ZeroDuration()}) {
    std::atomic<bool> stop{false};
    std::thread stopper([&] {
      absl::SleepFor(absl::Milliseconds(20));
      stop = true;
      Wake(*there_);
    });
    Waiter waiter({spin});
    EXPECT_EQ(waiter.Wait(*there_, 0, absl::Seconds(20), stop), WaitResult::kStopped);
    stopper.join();
  }
}

// A peer that clears the sleeper's mark, so that nobody is woken, delays the answer by the longest sleep.
TEST_F(FlagTest, LostWakeUpIsNotForEver) {
  std::thread peer([&] {
    absl::SleepFor(absl::Milliseconds(20));
    there_->sequence = 1;
  });
  Waiter waiter({absl::ZeroDuration()});
  EXPECT_EQ(waiter.Wait(*there_, 0, absl::Seconds(20), kNever), WaitResult::kSignalled);
  peer.join();
}

TEST_F(FlagTest, GivesUpSpinningWhenItIsInVain) {
  Waiter waiter({absl::Milliseconds(10)});
  for (int i = 0; i < 20; ++i) waiter.Wait(*there_, 0, absl::Milliseconds(12), kNever);
  rusage before{}, after{};
  getrusage(RUSAGE_THREAD, &before);
  for (int i = 0; i < 10; ++i) waiter.Wait(*there_, 0, absl::Milliseconds(12), kNever);
  getrusage(RUSAGE_THREAD, &after);
  const auto us = [](const timeval& t) { return t.tv_sec * 1'000'000 + t.tv_usec; };
  EXPECT_LT(us(after.ru_utime) + us(after.ru_stime) - us(before.ru_utime) - us(before.ru_stime), 9'000);
}

TEST(WaitPolicyTest, SpinsLongOnlyWithCpusToSpare) {
  EXPECT_GT(WaitPolicy::ForMachine(0).spin, WaitPolicy::ForMachine(AllowedCpus()).spin);
  EXPECT_LE(WaitPolicy::ForMachine(1 << 20).spin, absl::Microseconds(50));
}

}  // namespace
}  // namespace tandem::shm
