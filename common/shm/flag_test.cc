#include "common/shm/flag.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

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

TEST_F(FlagTest, NoSystemCallWhileSpinningIsEnough) {
  std::atomic<bool> stop{false};
  std::thread peer([&] {
    Waiter waiter({absl::Seconds(20)});
    for (uint32_t i = 0; i < 200; ++i) {
      ASSERT_EQ(waiter.Wait(*there_, i, absl::Seconds(20), kNever), WaitResult::kSignalled);
      Signal(*back_, i + 1);
    }
    EXPECT_EQ(waiter.sleeps(), 0u);
  });
  Waiter waiter({absl::Seconds(20)});
  for (uint32_t i = 0; i < 200; ++i) {
    Signal(*there_, i + 1);
    ASSERT_EQ(waiter.Wait(*back_, i, absl::Seconds(20), kNever), WaitResult::kSignalled);
  }
  peer.join();
  EXPECT_EQ(waiter.sleeps(), 0u);
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
  Waiter waiter({absl::Milliseconds(20)});
  for (int i = 0; i < 4; ++i) waiter.Wait(*there_, 0, absl::Milliseconds(60), kNever);
  rusage before{}, after{};
  getrusage(RUSAGE_THREAD, &before);
  for (int i = 0; i < 5; ++i) waiter.Wait(*there_, 0, absl::Milliseconds(60), kNever);
  getrusage(RUSAGE_THREAD, &after);
  const auto us = [](const timeval& t) { return t.tv_sec * 1'000'000 + t.tv_usec; };
  EXPECT_LT(us(after.ru_utime) + us(after.ru_stime) - us(before.ru_utime) - us(before.ru_stime), 20'000);
}

TEST(WaitPolicyTest, SpinsLongOnlyWithCpusToSpare) {
  EXPECT_GT(WaitPolicy::ForMachine(0).spin, WaitPolicy::ForMachine(AllowedCpus()).spin);
  EXPECT_LE(WaitPolicy::ForMachine(1 << 20).spin, absl::Microseconds(50));
}

}  // namespace
}  // namespace tandem::shm
