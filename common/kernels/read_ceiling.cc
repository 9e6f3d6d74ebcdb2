#include "common/kernels/read_ceiling.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "common/kernels/dispatch.h"

namespace tandem::kernels {

uint64_t ReadOnce(const uint8_t* data, int64_t bytes) { return internal::ActiveTables().read(data, bytes); }

double MeasureReadBandwidth(threading::ThreadPool& pool, const uint8_t* data, int64_t bytes, int64_t grain) {
  const internal::KTables& tables = internal::ActiveTables();
  std::atomic<uint64_t> sum{0};
  const auto start = std::chrono::steady_clock::now();
  pool.ParallelFor((bytes + grain - 1) / grain, 1, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * grain;
    const int64_t last = std::min(bytes, end * grain);
    sum.fetch_add(tables.read(data + first, last - first), std::memory_order_relaxed);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  // The sum is used, so that no compiler may drop the loads.
  volatile uint64_t sink = sum.load();
  static_cast<void>(sink);
  return static_cast<double>(bytes) / seconds.count();
}

}  // namespace tandem::kernels
