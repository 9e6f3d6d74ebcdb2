// Small models with random experts for tests, and the plain computation that answers are compared with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"

namespace tandem::expert::testing {

struct SyntheticShape {
  int64_t hidden = 256;
  int64_t inner = 256;
  int64_t experts = 4;
  int64_t experts_per_token = 2;
  int64_t layers = 2;  // the first is dense
  gguf::TensorType gate = gguf::TensorType::kQ4_K;
  gguf::TensorType up = gguf::TensorType::kQ4_K;
  gguf::TensorType down = gguf::TensorType::kQ6_K;
  bool fused_gate_up = false;
  uint32_t seed = 1;
};

// Removes the file at the end.
class SyntheticModel {
 public:
  explicit SyntheticModel(const SyntheticShape& shape);
  ~SyntheticModel();
  SyntheticModel(const SyntheticModel&) = delete;
  SyntheticModel& operator=(const SyntheticModel&) = delete;

  const std::string& path() const { return path_; }
  const SyntheticShape& shape() const { return shape_; }

  // The equations in double on the dequantized weights, without any of the code under test.
  // x: [n, hidden], ids and weights: [n, k]. Layer 1 and up.
  std::vector<double> Reference(int64_t layer, const std::vector<float>& x, const std::vector<int32_t>& ids,
                                const std::vector<float>& weights, int64_t k) const;

 private:
  struct Stack {
    std::vector<uint8_t> bytes;
    std::vector<float> values;  // dequantized
  };
  Stack Random(gguf::TensorType type, int64_t cols, int64_t rows);

  SyntheticShape shape_;
  std::string path_;
  uint64_t random_state_;
  std::vector<Stack> gate_, up_, down_;  // by layer
};

// Uniform in [-1, 1), the same on every machine.
std::vector<float> RandomFloats(int64_t n, uint64_t seed);

// [n, k] distinct expert ids a token.
std::vector<int32_t> RandomIds(int64_t n, int64_t k, int64_t experts, uint64_t seed);

}  // namespace tandem::expert::testing
