#include "common/threading/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <mutex>
#include <string>
#include <thread>

#include "common/base/check.h"

namespace tandem::threading {
namespace {

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void FutexWait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

int64_t NowMicroseconds() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Spins until `ready` answers true or `microseconds` have passed; returns whether it is ready.
template <typename Ready>
bool SpinUntil(int64_t microseconds, const Ready& ready) {
  constexpr int kPausesPerLook = 64;  // about 2 us between looks at the clock
  if (ready()) return true;
  if (microseconds <= 0) return false;
  const int64_t end = NowMicroseconds() + microseconds;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (NowMicroseconds() < end);
  return ready();
}

}  // namespace

bool PinCurrentThread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (cpu < 0 || cpu >= CPU_SETSIZE) {
    errno = EINVAL;
    return false;
  }
  CPU_SET(cpu, &set);
  errno = pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  return errno == 0;
}

// How a worker behaves on a processor that somebody else uses too. Taken off it in the middle of a chunk, it
// keeps everybody waiting for the other's time slice, milliseconds. A worker that notices this (time in which
// it neither slept nor ran, and an involuntary switch) works in short stretches for a while and sleeps
// between them: the scheduler owes a sleeper time and lets it finish what it begins.
class Neighbourliness {
 public:
  // After a chunk that ran from `start` to `end` (microseconds): sleeps if it is time to.
  void ChunkDone(int64_t start, int64_t end) {
    if (end - start > kSuspicious && WasTakenOff(end)) careful_until_ = end + kCareful;
    if (end >= careful_until_ || end - stretch_start_ < kStretch) return;
    const timespec pause = {0, kPause * 1000};
    nanosleep(&pause, nullptr);
    Slept(end);
  }
  // Slept from `start` until now.
  void Slept(int64_t start) {
    stretch_start_ = NowMicroseconds();
    asleep_ += stretch_start_ - start;
  }

 private:
  static constexpr int64_t kSuspicious = 1000;  // all in microseconds
  static constexpr int64_t kCareful = 200'000;
  static constexpr int64_t kStretch = 1500;
  static constexpr int64_t kPause = 1700;

  // Since it was last asked. Not asked after short chunks: it costs two system calls.
  bool WasTakenOff(int64_t now) {
    timespec cpu;
    rusage usage;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu) != 0 || getrusage(RUSAGE_THREAD, &usage) != 0) {
      return false;
    }
    const int64_t ran = int64_t{cpu.tv_sec} * 1'000'000 + cpu.tv_nsec / 1000;
    const int64_t lost = (now - asked_ - asleep_) - (ran - ran_);
    const bool taken_off = asked_ != 0 && usage.ru_nivcsw != switches_ && lost > kSuspicious;
    asked_ = now;
    asleep_ = 0;
    ran_ = ran;
    switches_ = usage.ru_nivcsw;
    return taken_off;
  }

  int64_t asked_ = 0;   // when; 0: never
  int64_t asleep_ = 0;  // since then
  int64_t ran_ = 0;     // processor time by then
  int64_t switches_ = 0;
  int64_t careful_until_ = 0;
  int64_t stretch_start_ = 0;
};

// One phase's chunks are claimed from `state_`: the phase's number in the high half, the chunks left in the
// low half. A claim is a compare-and-swap that takes one off; once it succeeds the phase cannot end before
// the chunk is done, so the claimer may read the phase's fields, which are written before the phase is
// published. Whoever does the last chunk publishes the next phase, or ends the job. A worker that claims
// nothing delays nobody.
struct ThreadPool::Impl {
  Impl(const Options& options, int n_threads);
  ~Impl();

  void Run(std::span<const Phase> phases);
  int64_t Work(int worker, Neighbourliness* neighbourliness);
  void WorkerLoop(int worker);
  void Publish(size_t first_phase);
  void Finish();
  void Ring(int sleepers);
  bool HasWork() const { return (state.load(std::memory_order_acquire) & UINT32_MAX) != 0; }

  const int n_threads;
  int64_t spin_us;

  // Written by who publishes a phase, read by who has claimed a chunk of it.
  std::span<const Phase> phases;
  size_t phase = 0;
  int64_t n = 0;
  int64_t grain = 1;
  int64_t chunks = 0;
  uint32_t phase_number = 0;

  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> done{0};   // chunks of the phase that are finished
  alignas(64) std::atomic<uint32_t> bell{0};  // counts published phases; what parked workers wait on
  std::atomic<int> parked{0};
  alignas(64) std::atomic<uint32_t> ended{0};  // number of the last job that ended
  std::atomic<bool> stop{false};
  uint32_t jobs = 0;

  std::mutex mutex;  // one job at a time
  std::vector<std::thread> workers;
};

ThreadPool::Impl::Impl(const Options& options, int count) : n_threads(count) {
  // With more threads than processors, spinning takes the time of a thread that could work.
  spin_us = n_threads > AllowedCpus() ? 0 : std::max<int64_t>(0, options.spin_microseconds);
  workers.reserve(static_cast<size_t>(n_threads - 1));
  for (int i = 1; i < n_threads; ++i) {
    const int cpu = options.cpus.empty() ? -1 : options.cpus[static_cast<size_t>(i) % options.cpus.size()];
    const std::string name = (std::string(options.name) + std::to_string(i)).substr(0, 15);
    workers.emplace_back([this, i, cpu, name] {
      pthread_setname_np(pthread_self(), name.c_str());
      if (cpu >= 0 && !PinCurrentThread(cpu)) {
        static std::once_flag said;
        std::call_once(said, [cpu] {
          std::fprintf(stderr, "thread pool: cannot pin a thread to CPU %d: %s; running unpinned\n", cpu,
                       std::strerror(errno));
        });
      }
      WorkerLoop(i);
    });
  }
}

ThreadPool::Impl::~Impl() {
  stop.store(true);
  bell.fetch_add(1);
  FutexWake(bell, INT_MAX);
  for (std::thread& t : workers) t.join();
}

void ThreadPool::Impl::Publish(size_t first_phase) {
  size_t p = first_phase;
  while (p < phases.size() && phases[p].n <= 0) ++p;
  if (p == phases.size()) {
    Finish();
    return;
  }
  phase = p;
  n = phases[p].n;
  grain = std::max<int64_t>(1, phases[p].grain);
  chunks = (n + grain - 1) / grain;
  if (chunks > UINT32_MAX) {  // the counter has 32 bits
    grain = (n + UINT32_MAX - 1) / UINT32_MAX;
    chunks = (n + grain - 1) / grain;
  }
  done.store(0, std::memory_order_relaxed);
  ++phase_number;
  // From here on the fields belong to the claimers: the phase may end before this thread goes on.
  const int64_t count = chunks;
  state.store(static_cast<uint64_t>(phase_number) << 32 | static_cast<uint64_t>(count),
              std::memory_order_release);
  if (count > 1) Ring(static_cast<int>(std::min<int64_t>(count - 1, INT_MAX)));
}

// Wakes up to `sleepers` parked threads. Sequentially consistent with `parked`: who goes to sleep sees the
// bell changed or is seen.
void ThreadPool::Impl::Ring(int sleepers) {
  bell.fetch_add(1);
  if (parked.load() > 0) FutexWake(bell, sleepers);
}

void ThreadPool::Impl::Finish() {
  ended.fetch_add(1, std::memory_order_release);
  Ring(INT_MAX);
}

// Takes chunks until none is left; returns how many.
int64_t ThreadPool::Impl::Work(int worker, Neighbourliness* neighbourliness) {
  int64_t taken = 0;
  uint64_t s = state.load(std::memory_order_acquire);
  while ((s & UINT32_MAX) != 0) {
    if (!state.compare_exchange_weak(s, s - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    const int64_t begin = (chunks - static_cast<int64_t>(s & UINT32_MAX)) * grain;
    const int64_t total = chunks;
    const int64_t start = neighbourliness != nullptr ? NowMicroseconds() : 0;
    phases[phase].fn(begin, std::min(n, begin + grain), worker);
    ++taken;
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) Publish(phase + 1);
    if (neighbourliness != nullptr) neighbourliness->ChunkDone(start, NowMicroseconds());
    s = state.load(std::memory_order_acquire);
  }
  return taken;
}

void ThreadPool::Impl::WorkerLoop(int worker) {
  Neighbourliness neighbourliness;
  for (;;) {
    const uint32_t seen = bell.load();
    if (stop.load()) return;
    Work(worker, &neighbourliness);
    if (SpinUntil(spin_us, [&] { return HasWork() || stop.load(std::memory_order_relaxed); })) continue;
    if (spin_us == 0) {
      sched_yield();
      if (HasWork()) continue;
    }
    parked.fetch_add(1);
    // A phase published since `seen` was read changed the bell, and the wait returns at once.
    const int64_t start = NowMicroseconds();
    if (!HasWork() && !stop.load()) FutexWait(bell, seen);
    parked.fetch_sub(1);
    neighbourliness.Slept(start);
  }
}

void ThreadPool::Impl::Run(std::span<const Phase> job) {
  const std::lock_guard<std::mutex> lock(mutex);
  const uint32_t number = ++jobs;
  phases = job;
  Publish(0);
  const auto has_ended = [this, number] { return ended.load(std::memory_order_acquire) == number; };
  const auto can_go_on = [&] { return has_ended() || HasWork(); };
  for (;;) {
    const uint32_t seen = bell.load();
    const int64_t start = NowMicroseconds();
    const int64_t taken = Work(0, nullptr);
    if (has_ended()) return;
    // What is left is in the hands of workers, each at one chunk. One that needs far longer than the caller's
    // own chunks took has been taken off its processor: then the caller gives its own away, for the worker to
    // be moved there, rather than burn it for the milliseconds of a time slice.
    const int64_t chunk_us = taken == 0 ? 50 : (NowMicroseconds() - start) / taken;
    const int64_t patience_us = std::clamp<int64_t>(3 * chunk_us, 20, 500);
    if (SpinUntil(spin_us == 0 ? 0 : patience_us, can_go_on)) continue;
    parked.fetch_add(1);
    if (!can_go_on()) FutexWait(bell, seen);
    parked.fetch_sub(1);
  }
}

ThreadPool::ThreadPool(const Options& options) {
  TANDEM_CHECK(options.threads >= 0 && options.name != nullptr);
  impl_ = std::make_unique<Impl>(options, options.threads == 0 ? AllowedCpus() : options.threads);
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::threads() const { return impl_->n_threads; }

void ThreadPool::ParallelFor(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> fn) {
  if (n <= 0) return;
  const Phase phase = {n, grain, fn};
  impl_->Run({&phase, 1});
}

void ThreadPool::RunPhases(std::span<const Phase> phases) {
  if (!phases.empty()) impl_->Run(phases);
}

}  // namespace tandem::threading
