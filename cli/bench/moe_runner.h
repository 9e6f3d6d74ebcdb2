// Who answers the calls of `tandem bench moe`: this process, or a group of processes with a slice each.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/expert_cpu/shard/generate.h"

namespace tandem::cli {

// One call; the spans are the runner's own memory, see MoeRunner::Prepare.
struct MoeCall {
  int64_t layer = 0;
  int64_t n_tokens = 0;
};

// Not thread-safe.
class MoeRunner {
 public:
  virtual ~MoeRunner() = default;

  // Where the caller writes what the next calls take: ids int32 and weights float [n_tokens, k], activations
  // bf16 [n_tokens, hidden].
  virtual std::span<int32_t> ids() = 0;
  virtual std::span<float> weights() = 0;
  virtual std::span<uint16_t> activations() = 0;

  struct Result {
    double seconds = 0;  // from the call to the whole answer, in float32
    double bytes = 0;    // of the distinct experts' weights
  };
  virtual absl::StatusOr<Result> Forward(const MoeCall& call) = 0;
  // The answer of the last call, float32 [n_tokens, hidden].
  virtual std::span<const float> answer() = 0;

  // Bytes a second of a plain read of about `bytes` of the weights, by the same threads; each time others.
  virtual absl::StatusOr<double> Read(uint64_t bytes) = 0;
  virtual uint64_t resident_bytes() const = 0;
};

struct MoeRunnerOptions {
  expert::GenerateOptions generate;  // the request is left out
  int64_t max_tokens = 0;
  std::vector<int> cpus;  // a thread each
  uint64_t seed = 1;
  bool bulk = false;  // expert::Call::bulk
};

// In this process, with all experts whole.
absl::StatusOr<std::unique_ptr<MoeRunner>> MakeLocalRunner(const MoeRunnerOptions& options);

// `slices` processes, forked from this one (which may have no threads then), each with a slice of every
// expert and an equal share of the CPUs. They take a call from shared memory; this process adds up their
// partial answers. One slice: the same with a single process, to compare with.
absl::StatusOr<std::unique_ptr<MoeRunner>> MakeProcessRunner(const MoeRunnerOptions& options, int64_t slices);

}  // namespace tandem::cli
