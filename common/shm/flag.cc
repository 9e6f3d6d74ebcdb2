#include "common/shm/flag.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <thread>

namespace tandem::shm {
namespace {

constexpr int kPausesPerLook = 32;   // between two looks at the clock
constexpr int kLongestPause = 1024;  // waits without spinning
// Longer between two looks at the clock: somebody else had this CPU, possibly the one that is waited for.
constexpr int64_t kPreempted = 50'000;
// Even where Wake is lost, and where a hostile peer has overwritten the number that it came with.
constexpr int64_t kLongestSleep = 100'000'000;

int64_t Now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Not the private kind: the waker is another process, with another address.
// False: the time has passed.
bool FutexWait(std::atomic<uint32_t>& word, uint32_t expected, int64_t nanoseconds) {
  const timespec relative{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  return syscall(SYS_futex, &word, FUTEX_WAIT, expected, &relative, nullptr, 0) == 0 || errno != ETIMEDOUT;
}

}  // namespace

void Signal(Flag& flag, uint32_t sequence) {
  // Both sequentially consistent, here and in Sleep: of "number written, then sleeper looked for" and
  // "sleeper announced, then number looked for" at least one sees the other.
  flag.sequence.store(sequence, std::memory_order_seq_cst);
  if (flag.sleeping.load(std::memory_order_seq_cst) != 0) Wake(flag);
}

void Wake(Flag& flag) {
  flag.wakes.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &flag.wakes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void SetAwake(Flag& flag, bool awake) {
  // As in Signal: of this and Sleep's announcement at least one sees the other.
  flag.awake.store(awake ? 1 : 0, std::memory_order_seq_cst);
  if (awake && flag.sleeping.load(std::memory_order_seq_cst) != 0) Wake(flag);
}

int AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

WaitPolicy WaitPolicy::ForMachine(int busy_threads) {
  // Measured on two crowded CPUs, both sides alike: an empty round trip takes 0.4 us while both spin on CPUs
  // of their own, 5 us with two sleeps and wake-ups, and the spin on top of that where both sides have to
  // share.
  const bool to_spare = AllowedCpus() > busy_threads;
  return {to_spare ? absl::Microseconds(200) : absl::ZeroDuration()};
}

WaitResult Waiter::Wait(Flag& flag, uint32_t last, absl::Duration most, const std::atomic<bool>& stop) {
  const auto signalled = [&] { return flag.sequence.load(std::memory_order_acquire) != last; };
  if (signalled()) return WaitResult::kSignalled;
  const int64_t wait = std::min(absl::ToInt64Nanoseconds(most), INT64_MAX / 4);
  if (wait <= 0) return WaitResult::kTimeout;
  const int64_t begin = Now();
  const int64_t end = begin + wait;
  if (flag.awake.load(std::memory_order_relaxed) != 0) return Rest(flag, last, end, stop);
  if (pause_ > 0) {
    --pause_;
    return Rest(flag, last, end, stop);
  }
  const int64_t spin_end = std::min(end, begin + spin_nanoseconds_);
  for (int64_t looked = begin; looked < spin_end;) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (!signalled()) {
        Pause();
        continue;
      }
      if (Now() - looked > kPreempted) break;
      last_pause_ = 0;
      return WaitResult::kSignalled;
    }
    if (stop.load(std::memory_order_acquire)) return WaitResult::kStopped;
    const int64_t now = Now();
    if (now - looked > kPreempted) break;
    looked = now;
  }
  last_pause_ = pause_ = std::clamp(2 * last_pause_, 1, kLongestPause);
  return Rest(flag, last, end, stop);
}

WaitResult Waiter::Rest(Flag& flag, uint32_t last, int64_t end, const std::atomic<bool>& stop) {
  for (;;) {
    const bool awake = flag.awake.load(std::memory_order_relaxed) != 0;
    const auto result = awake ? LookOn(flag, last, end, stop) : Sleep(flag, last, end, stop);
    if (result) return *result;
  }
}

// Where others want this CPU they get it, in turns.
std::optional<WaitResult> Waiter::LookOn(Flag& flag, uint32_t last, int64_t end,
                                         const std::atomic<bool>& stop) {
  int64_t looked = Now();
  for (;;) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (flag.sequence.load(std::memory_order_acquire) != last) return WaitResult::kSignalled;
      Pause();
    }
    if (stop.load(std::memory_order_acquire)) return WaitResult::kStopped;
    const int64_t now = Now();
    if (now >= end) return WaitResult::kTimeout;
    if (now - looked > kPreempted) sched_yield();
    looked = now;
    if (flag.awake.load(std::memory_order_relaxed) == 0) return std::nullopt;
  }
}

std::optional<WaitResult> Waiter::Sleep(Flag& flag, uint32_t last, int64_t end,
                                        const std::atomic<bool>& stop) {
  std::optional<WaitResult> result = WaitResult::kTimeout;
  bool in_time = true;
  flag.sleeping.store(1, std::memory_order_seq_cst);
  for (;;) {
    // Before all that is looked at: who changes one of them from now on changes this, too.
    const uint32_t wakes = flag.wakes.load(std::memory_order_seq_cst);
    if (flag.sequence.load(std::memory_order_seq_cst) != last) {
      result = WaitResult::kSignalled;
      break;
    }
    if (stop.load(std::memory_order_seq_cst)) {
      result = WaitResult::kStopped;
      break;
    }
    const int64_t left = end - Now();
    if (left <= 0) break;
    // The peer may have cleared `sleeping`; set again for each sleep.
    flag.sleeping.store(1, std::memory_order_seq_cst);
    if (flag.awake.load(std::memory_order_seq_cst) != 0) {
      result.reset();
      break;
    }
    ++sleeps_;
    in_time = FutexWait(flag.wakes, wakes, std::min(left, kLongestSleep));
  }
  if (!in_time && result != WaitResult::kTimeout) ++overslept_;
  flag.sleeping.store(0, std::memory_order_relaxed);
  return result;
}

}  // namespace tandem::shm
