// How the step asks for the routed experts of a layer, whoever computes them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

// One MoE layer of a step. Device memory, written by what is on the stream before.
struct RoutedCall {
  int64_t layer = 0;               // block number
  int64_t index = 0;               // of the MoE layers, from 0
  int64_t n = 0;                   // tokens
  const float* normed = nullptr;   // [n, hidden] activations
  const int32_t* ids = nullptr;    // [n, k]
  const float* weights = nullptr;  // [n, k]
  float* x = nullptr;              // [n, hidden]
  // Expert deferral (experts/deferral.h): so many experts of each token t with defers[t] != 0 are not added
  // by this call's Add but by that of the next MoE layer; 0: nobody defers in this step. The same in all
  // calls of a step.
  int32_t defer = 0;
  const int32_t* defers = nullptr;  // [n], if defer > 0
  bool last = false;                // MoE layer of the step, of which nothing is deferred
  RowFactors factors;               // of `normed`, where TakesFactors
  // Where TakesFactors: the norm of x that Add makes when all is added; until Add returns. Null: none.
  const NormFormParams* next = nullptr;
  // Where TakesFactors: the routing is still to be made, by Ask, into `ids` and `weights`. Null: it is there.
  const RouteParams* route = nullptr;
};

// Ask, other work of the layer, then Add; all on one stream.
class RoutedExperts {
 public:
  virtual ~RoutedExperts() = default;
  // Whether calls may have `factors`, `next` and `route`.
  virtual bool TakesFactors() const { return false; }
  virtual absl::Status Ask(const RoutedCall& call, cudaStream_t stream) = 0;
  // x += what the layer before has deferred, then x += the experts' weighted sum.
  virtual absl::Status Add(const RoutedCall& call, cudaStream_t stream) = 0;
};

}  // namespace tandem::attention::cuda
