// What a loop over the pool costs, and what is left of its speed when another thread keeps a processor busy.
#include <benchmark/benchmark.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "common/threading/thread_pool.h"

namespace tandem::threading {
namespace {

void EmptyLoop(benchmark::State& state) {
  ThreadPool pool({.threads = static_cast<int>(state.range(0))});
  for (auto _ : state) {
    pool.ParallelFor(2 * state.range(0), 1,
                     [](int64_t begin, int64_t, int) { benchmark::DoNotOptimize(begin); });
  }
}
BENCHMARK(EmptyLoop)->Arg(1)->Arg(2)->UseRealTime();

void EmptyPhases(benchmark::State& state) {
  ThreadPool pool({.threads = static_cast<int>(state.range(0))});
  const auto fn = [](int64_t begin, int64_t, int) { benchmark::DoNotOptimize(begin); };
  const std::vector<ThreadPool::Phase> phases(16, {2 * state.range(0), 1, fn});
  for (auto _ : state) pool.RunPhases(phases);
  state.SetItemsProcessed(state.iterations() * 16);  // phases
}
BENCHMARK(EmptyPhases)->Arg(1)->Arg(2)->UseRealTime();

void Work(int64_t units) {  // about a microsecond each
  for (int64_t i = 0; i < units * 1000; ++i) benchmark::DoNotOptimize(i);
}

// 32 chunks of some 20 us a loop; arg 1: whether a thread of ours, pinned to the last processor, burns it
// meanwhile.
void BusyNeighbour(benchmark::State& state) {
  const int cpus = static_cast<int>(std::thread::hardware_concurrency());
  std::vector<int> pins;
  if (state.range(1) != 0) {
    for (int i = 0; i < cpus; ++i) pins.push_back(i);
    PinCurrentThread(0);
  }
  ThreadPool pool({.threads = cpus, .cpus = pins});
  std::atomic<bool> stop{false};
  std::thread neighbour;
  if (state.range(0) != 0) {
    neighbour = std::thread([&] {
      PinCurrentThread(cpus - 1);
      while (!stop.load(std::memory_order_relaxed)) Work(1);
    });
  }
  for (auto _ : state) {
    pool.ParallelFor(32, 1, [](int64_t, int64_t, int) { Work(20); });
  }
  stop.store(true);
  if (neighbour.joinable()) neighbour.join();
}
BENCHMARK(BusyNeighbour)
    ->Args({0, 0})
    ->Args({1, 0})
    ->Args({0, 1})
    ->Args({1, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.5);

}  // namespace
}  // namespace tandem::threading
