// The shapes and weight types of synthetic models. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"

namespace tandem::cli {

// "r1" (DeepSeek-V3 and R1), "v2-lite" (DeepSeek-V2-Lite), "tiny" (runs anywhere in no time): their true
// dimensions, with all their layers and experts. InvalidArgument names the ones there are.
absl::StatusOr<model::ModelConfig> NamedShape(const std::string& name);
std::vector<std::string> ShapeNames();

// The first n_dense layers dense and n_moe of experts behind them, n_experts in each; negative: the shape's
// own number. InvalidArgument: no layer at all, fewer experts than a token uses.
absl::StatusOr<model::ModelConfig> Resize(model::ModelConfig config, int64_t n_dense, int64_t n_moe,
                                          int64_t n_experts);

// What a tensor is to the rule that chooses its type.
enum class TensorRole { kEmbedding, kOutput, kDown, kOther };

// A name as llama.cpp's quantization tool knows it: "q4_k_m" and "q5_k_m" raise some layers' down projections
// and the output matrix to Q6_K; the other names are one type for all matrices but the output (Q6_K beside
// K types and Q4_0 or Q5_0).
class TypeScheme {
 public:
  static absl::StatusOr<TypeScheme> Find(const std::string& name);
  static std::vector<std::string> Names();

  // Of a matrix with rows of `cols` values in layer `layer` of `layers`. Rows that are no multiple of the
  // type's block get the next type that fits.
  gguf::TensorType TypeOf(TensorRole role, int64_t layer, int64_t layers, int64_t cols) const;
  uint64_t file_type() const { return file_type_; }  // general.file_type

 private:
  gguf::TensorType base_ = gguf::TensorType::kF32;
  gguf::TensorType output_ = gguf::TensorType::kF32;
  bool mixed_ = false;
  uint64_t file_type_ = 0;
};

}  // namespace tandem::cli
