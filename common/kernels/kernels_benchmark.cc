// Products of every type with 1 to 512 tokens on every ISA: bytes of weights a second against a plain read
// loop by the same threads over the same memory, interleaved with it; multiply-adds a second for many tokens.
//   TANDEM_BENCH_MIB (default 2048): working set; TANDEM_BENCH_THREADS (default: allowed CPUs)
// Counters: gbps, ceiling_gbps and ratio are medians over the rounds of an iteration; gmacs is the best
// round.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/kernels/kernels.h"
#include "common/kernels/read_ceiling.h"
#include "common/kernels/test_util.h"
#include "common/threading/thread_pool.h"

namespace tandem::kernels {
namespace {

using namespace testing;  // NOLINT

int64_t EnvOr(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoll(value);
}

constexpr int64_t kRows = 2048;  // of one matrix: an expert of R1
constexpr int64_t kCols = 7168;

threading::ThreadPool& Pool() {
  static threading::ThreadPool pool(
      {.threads = static_cast<int>(EnvOr("TANDEM_BENCH_THREADS", 0)), .spin_microseconds = 1000});
  return pool;
}

// The working set, as huge pages where the system gives them, filled with copies of one matrix.
struct Memory {
  uint8_t* data;
  int64_t bytes;
};
Memory WorkingSet(TensorType type) {
  static Memory memory = [] {
    Memory m;
    m.bytes = EnvOr("TANDEM_BENCH_MIB", 2048) << 20;
    void* p = mmap(nullptr, static_cast<size_t>(m.bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
    if (p == MAP_FAILED) std::abort();
    madvise(p, static_cast<size_t>(m.bytes), MADV_HUGEPAGE);
    m.data = static_cast<uint8_t*>(p);
    return m;
  }();
  static TensorType filled = static_cast<TensorType>(1000);
  if (filled != type) {
    std::mt19937 rng(1);
    const Weights w = RandomBlocks(rng, type, 64, kCols);
    const int64_t piece = w.m.row_bytes * w.m.rows;
    for (int64_t at = 0; at < memory.bytes; at += piece) {
      std::memcpy(memory.data + at, w.m.data, static_cast<size_t>(std::min(piece, memory.bytes - at)));
    }
    filled = type;
  }
  return memory;
}

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

double Median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

void MatMulBench(benchmark::State& state, TensorType type, Isa isa, int64_t tokens) {
  const ScopedIsa scoped(isa);
  const Memory memory = WorkingSet(type);
  const int64_t matrix_bytes = gguf::RowBytes(type, kCols) * kRows;
  const int64_t matrices = memory.bytes / matrix_bytes;
  const int64_t per_round = tokens <= 64 ? std::min<int64_t>(matrices, 12) : 2;
  std::mt19937 rng(2);
  const std::vector<float> x = Gaussian(rng, tokens * kCols);
  Activations a;
  a.Assign(x.data(), tokens, kCols);
  a.Prepare(type, Precision::kFast);
  std::vector<float> y(static_cast<size_t>(tokens * kRows));
  int64_t next = 0;
  std::vector<double> gbps, ceiling, ratio;
  double best = 0.0;
  for (auto _ : state) {
    for (int round = 0; round < (tokens <= 64 ? 12 : 2); ++round) {
      if (next + per_round > matrices) next = 0;
      const uint8_t* base = memory.data + next * matrix_bytes;
      const double top = MeasureReadBandwidth(Pool(), base, per_round * matrix_bytes);
      next += per_round;
      if (next + per_round > matrices) next = 0;
      base = memory.data + next * matrix_bytes;
      const auto start = std::chrono::steady_clock::now();
      for (int64_t i = 0; i < per_round; ++i) {
        const Matrix w = Matrix::Of(type, base + i * matrix_bytes, kRows, kCols);
        Pool().ParallelFor(kRows / 64, 2, [&](int64_t begin, int64_t end, int) {
          MatMul(w, begin * 64, end * 64, a, y.data(), kRows, Precision::kFast);
        });
      }
      const double seconds = Seconds(start);
      next += per_round;
      gbps.push_back(static_cast<double>(per_round * matrix_bytes) / seconds * 1e-9);
      ceiling.push_back(top * 1e-9);
      ratio.push_back(gbps.back() / ceiling.back());
      best = std::max(best, static_cast<double>(per_round * kRows * kCols * tokens) / seconds * 1e-9);
    }
  }
  state.counters["gbps"] = Median(gbps);
  state.counters["ceiling_gbps"] = Median(ceiling);
  state.counters["ratio"] = Median(ratio);
  state.counters["gmacs"] = best;
}

// One thread, everything in cache: what the integer dot product gives at most, without any loads to speak of.
void QuantizeBench(benchmark::State& state, TensorType type, Isa isa) {
  const ScopedIsa scoped(isa);
  std::mt19937 rng(3);
  const std::vector<float> x = Gaussian(rng, 8 * kCols);
  Activations a;
  for (auto _ : state) {
    a.Assign(x.data(), 8, kCols);
    a.Prepare(type, Precision::kFast);
  }
  state.SetItemsProcessed(state.iterations() * 8 * kCols);
}

void SiluMulBench(benchmark::State& state, Isa isa) {
  const ScopedIsa scoped(isa);
  std::mt19937 rng(4);
  const std::vector<float> gate = Gaussian(rng, kRows), up = Gaussian(rng, kRows);
  std::vector<float> y(static_cast<size_t>(kRows));
  for (auto _ : state) {
    SiluMul(gate.data(), up.data(), y.data(), kRows);
    benchmark::DoNotOptimize(y.data());
  }
  state.SetItemsProcessed(state.iterations() * kRows);
}

const int kRegistered = [] {
  for (TensorType type : AllTypes()) {
    for (Isa isa : AvailableIsas()) {
      if (isa == Isa::kScalar) continue;
      for (int64_t tokens : {1, 2, 4, 8, 16, 64, 512}) {
        const std::string name = "matmul/" + std::string(gguf::TypeName(type)) + "/" +
                                 std::string(IsaName(isa)) + "/" + std::to_string(tokens);
        benchmark::RegisterBenchmark(name.c_str(),
                                     [=](benchmark::State& s) { MatMulBench(s, type, isa, tokens); })
            ->Iterations(1)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  for (Isa isa : AvailableIsas()) {
    const std::string name(IsaName(isa));
    for (TensorType type : {TensorType::kQ4_K, TensorType::kQ8_0}) {
      benchmark::RegisterBenchmark(("quantize/" + std::string(gguf::TypeName(type)) + "/" + name).c_str(),
                                   [=](benchmark::State& s) { QuantizeBench(s, type, isa); });
    }
    benchmark::RegisterBenchmark(("silu_mul/" + name).c_str(),
                                 [=](benchmark::State& s) { SiluMulBench(s, isa); });
  }
  return 0;
}();

}  // namespace
}  // namespace tandem::kernels
