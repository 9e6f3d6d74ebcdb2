// The tensors of a synthetic model: names, types, shapes, sizes of values, and which share their bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/synth/shapes.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"

namespace tandem::cli {

enum class SynthContent { kRandom, kOnes, kZeros };

struct SynthTensor {
  std::string name;
  gguf::TensorType type = gguf::TensorType::kF32;
  std::vector<int64_t> ne;  // ne[0] is contiguous
  SynthContent content = SynthContent::kRandom;
  double rms = 0;           // of random values
  int64_t alias_of = -1;    // index of the tensor, further up, whose bytes these are
  uint64_t nbytes() const;  // of the tensor, its own or not
};

struct SynthPlan {
  model::ModelConfig config;
  std::vector<SynthTensor> tensors;
  uint64_t bytes = 0;        // in the file, without the header
  uint64_t alias_bytes = 0;  // that tensors have beyond those
};

// `alias_layers` K > 0: the experts of all MoE layers are those of K; of each type that down projections have
// there are as many of the K as is its share of the layers, but one at least. 0: every layer has its own.
// `mla`: attn_k_b and attn_v_b; otherwise attn_kv_b. InvalidArgument: K above the number of MoE layers, rows
// that no type fits.
absl::StatusOr<SynthPlan> PlanSynth(const model::ModelConfig& config, const TypeScheme& types, bool mla,
                                    int64_t alias_layers);

// For each of `types`, in order, the index of the one whose bytes it has: itself, or one before it of the
// same type. With `distinct` == 0, or above their number, all are themselves.
std::vector<size_t> AliasSources(const std::vector<gguf::TensorType>& types, int64_t distinct);

}  // namespace tandem::cli
