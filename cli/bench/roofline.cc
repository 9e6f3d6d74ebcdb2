// What threads can read of memory, and how near products with each weight type come to it.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "cli/bench/util.h"
#include "cli/synth/random_blocks.h"
#include "common/base/status_macros.h"
#include "common/kernels/read_ceiling.h"
#include "common/topology/limits.h"
#include "services/expert_cpu/shard/arena.h"

namespace tandem::cli {
namespace {

using gguf::TensorType;

constexpr int64_t kCols = 7168;               // of R1's gate and up matrices
constexpr double kLongestPass = 1;            // seconds
constexpr int64_t kLeastBytes = 128'000'000;  // of a matrix, against caches
constexpr TensorType kTypes[] = {TensorType::kQ2_K, TensorType::kQ3_K, TensorType::kQ4_K, TensorType::kQ5_K,
                                 TensorType::kQ6_K, TensorType::kQ4_0, TensorType::kQ5_0, TensorType::kQ8_0,
                                 TensorType::kF16,  TensorType::kBF16, TensorType::kF32};

Measurement Basis(const std::string& machine) {
  Measurement m;
  m.bench = "roofline";
  m.machine = machine;
  m.isa = std::string(kernels::IsaName(kernels::ActiveIsa()));
  return m;
}

// One matrix of one type, as large as the memory: products with one token and plain reads in turn.
Measurement MeasureType(TensorType type, const BenchOptions& options, threading::ThreadPool& pool,
                        const expert::Arena& arena, const std::string& machine) {
  const int64_t row_bytes = gguf::RowBytes(type, kCols);
  int64_t rows = std::max<int64_t>(1, static_cast<int64_t>(arena.bytes()) / row_bytes);
  pool.ParallelFor(rows, kernels::kRowGrain, [&](int64_t begin, int64_t end, int) {
    const auto blocks_per_row = static_cast<uint64_t>(row_bytes / gguf::GetTypeInfo(type).type_size);
    FillRandomBlocks(type, 0.01, 1, static_cast<uint64_t>(begin) * blocks_per_row,
                     {arena.data() + begin * row_bytes, static_cast<size_t>((end - begin) * row_bytes)});
  });
  std::vector<float> x(kCols), y(static_cast<size_t>(rows));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) / 8 - 1;
  kernels::Activations activations;
  // Seconds of a product with the first `n` rows.
  const auto multiply = [&](int64_t n) {
    const kernels::Matrix w = kernels::Matrix::Of(type, arena.data(), n, kCols);
    const Stopwatch watch;
    activations.Assign(x.data(), 1, kCols);
    activations.Prepare(type, kernels::Precision::kFast);
    pool.ParallelFor((n + kernels::kRowGrain - 1) / kernels::kRowGrain, 1,
                     [&](int64_t begin, int64_t end, int) {
                       kernels::MatMul(w, begin * kernels::kRowGrain, std::min(n, end * kernels::kRowGrain),
                                       activations, y.data(), n, kernels::Precision::kFast);
                     });
    return watch.Seconds();
  };
  // Fewer rows where kernels are slow (the scalar ones), down to what still exceeds the caches of a core.
  const int64_t some = std::max<int64_t>(1, rows / 16);
  const double estimate = 16 * multiply(some);
  if (estimate > kLongestPass) {
    const auto fewer = static_cast<int64_t>(static_cast<double>(rows) * kLongestPass / estimate);
    rows = std::min(rows, std::max(fewer, kLeastBytes / row_bytes));
  }
  const auto bytes = static_cast<double>(rows * row_bytes);
  const auto product = [&] { return bytes / multiply(rows) / 1e9; };
  const auto read = [&] {
    return kernels::MeasureReadBandwidth(pool, arena.data(), static_cast<int64_t>(bytes)) / 1e9;
  };
  product();
  std::vector<double> gbps, ceilings, ratios;
  double before = read();
  for (Passes passes(options); passes.Next();) {
    gbps.push_back(product());
    const double after = read();
    ceilings.push_back(after);
    ratios.push_back(2 * gbps.back() / (before + after));
    before = after;
  }
  Measurement m = Basis(machine);
  m.threads = pool.threads();
  m.shape = absl::StrCat(std::string(gguf::TypeName(type)), " ", kCols, " x ", rows);
  m.tokens = 1;
  m.bytes = bytes;
  m.gbps = Median(gbps);
  m.seconds = bytes / 1e9 / *m.gbps;
  m.ceiling_gbps = Median(ceilings);
  m.ratio = Median(ratios);
  return m;
}

}  // namespace

absl::Status BenchRoofline(const BenchOptions& options, Report& report) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<kernels::Isa> isas, BenchIsas(options.isa));
  TANDEM_ASSIGN_OR_RETURN(const std::vector<int> cpus, BenchCpus(options.threads));
  const uint64_t bytes = static_cast<uint64_t>(options.megabytes) * 1'000'000;
  const uint64_t usable = topology::ReadMemoryInfo().UsableBytes();
  if (bytes > usable / 10 * 9) {
    return absl::ResourceExhaustedError(
        absl::StrCat("--megabytes ", options.megabytes, ": ", usable / 1'000'000, " MB are available"));
  }
  TANDEM_ASSIGN_OR_RETURN(const expert::Arena arena, expert::Arena::Allocate(bytes));
  const std::string machine = MachineName();
  for (const kernels::Isa isa : isas) {
    const IsaScope scope(isa);
    for (size_t n = 1; n <= cpus.size(); n = n < 4 ? n + 1 : std::max(n + 1, std::min(n * 2, cpus.size()))) {
      const auto pool = PinnedPool({cpus.begin(), cpus.begin() + static_cast<int64_t>(n)});
      if (n == 1) {
        // Written by nobody, the pages would all be the kernel's one page of zeros.
        pool->ParallelFor(1, 1, [&](int64_t, int64_t, int) {
          FillRandomBlocks(TensorType::kQ8_0, 0.01, 1, 0, {arena.data(), arena.bytes() / 34 * 34});
        });
      }
      std::vector<double> gbps;
      for (Passes passes(options); passes.Next();) {
        gbps.push_back(
            kernels::MeasureReadBandwidth(*pool, arena.data(), static_cast<int64_t>(arena.bytes())) / 1e9);
      }
      Measurement m = Basis(machine);
      m.threads = static_cast<int64_t>(n);
      m.shape = "read";
      m.bytes = static_cast<double>(arena.bytes());
      m.gbps = m.ceiling_gbps = Median(gbps);
      m.seconds = *m.bytes / 1e9 / *m.gbps;
      m.ratio = 1.0;
      report.Add(m);
    }
    const auto pool = PinnedPool(cpus);
    for (const TensorType type : kTypes) report.Add(MeasureType(type, options, *pool, arena, machine));
  }
  return absl::OkStatus();
}

}  // namespace tandem::cli
