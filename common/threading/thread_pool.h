// A pool of pinned worker threads that spin a short while for work and then park.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace tandem::threading {

// A non-owning reference to a callable, so that a parallel loop allocates nothing.
template <typename Signature>
class FunctionRef;
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F>
  FunctionRef(const F& f)  // NOLINT(google-explicit-constructor)
      : object_(&f), call_([](const void* o, Args... args) -> R {
          return (*static_cast<const F*>(o))(static_cast<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, static_cast<Args>(args)...); }

 private:
  const void* object_;
  R (*call_)(const void*, Args...);
};

// Pins the calling thread; false, with errno set, if the system refuses.
bool PinCurrentThread(int cpu);

// One loop runs at a time; calls from several threads wait for each other. Work is handed out in chunks from
// a shared counter, so that a core that is busy elsewhere takes less of it: no static shares, no barrier on
// which the fast wait for a descheduled thread that has nothing left to do.
class ThreadPool {
 public:
  struct Options {
    int threads = 0;  // including the calling thread; 0: one per allowed CPU
    // Worker i (from 1) is pinned to cpus[i % size]; empty: not pinned. cpus[0] is left for the caller, which
    // may take it with PinCurrentThread. A failure to pin is said once on stderr.
    std::vector<int> cpus = {};
    int64_t spin_microseconds = 50;  // how long an idle worker looks for work before it sleeps
    const char* name = "tandem-w";
  };
  explicit ThreadPool(const Options& options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls fn(begin, end, worker) over [0, n) in chunks of `grain`; worker in [0, threads()), 0 is the caller.
  // Returns when all of it is done. fn must not throw and must not call ParallelFor of the same pool.
  void ParallelFor(int64_t n, int64_t grain, FunctionRef<void(int64_t begin, int64_t end, int worker)> fn);

  // Loops that depend on each other, one after the other: a phase starts when every chunk of the one before
  // is done (and what it wrote is visible). Whoever finishes a phase starts the next, so it costs one
  // handover between cores a phase and waits for no thread that has nothing in hand. `phases` and what the
  // functions refer to must outlive the call.
  struct Phase {
    int64_t n;  // 0: skipped
    int64_t grain;
    FunctionRef<void(int64_t begin, int64_t end, int worker)> fn;
  };
  void RunPhases(std::span<const Phase> phases);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::threading
