// What a step reads of a model, by the place it is read from. From a file's header, or from a named shape.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "cli/synth/plan.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"

namespace tandem::cli {

// Bytes of weights as they lie in the file, all layers; parameters alike.
struct ModelBytes {
  model::ModelConfig config;
  uint64_t embedding = 0;     // read row by row
  uint64_t every_step = 0;    // attention, dense layers, routers, norms, output head: read whole in each step
  uint64_t shared = 0;        // shared experts: as well, beside the routed ones
  uint64_t routed = 0;        // routed experts
  uint64_t parameters = 0;    // all
  uint64_t dense_values = 0;  // weights that every token is multiplied with: every_step and shared

  uint64_t dense_bytes() const { return embedding + every_step + shared; }
  // Of one routed expert; the mean of the layers, whose types may differ. 0 without experts.
  double ExpertBytes() const;
  // Multiply-adds of one token with its routed experts, all layers.
  double RoutedMacs() const;
};

// Errors of the file's reader, and those of a file that cannot be served.
absl::StatusOr<ModelBytes> BytesOfFile(const gguf::File& file);
ModelBytes BytesOfPlan(const SynthPlan& plan);

}  // namespace tandem::cli
