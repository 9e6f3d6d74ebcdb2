// The routed experts' products for many tokens: tokens sorted by expert, then gate, up and down of some
// experts at a time. Parameters and launchers as in kernels.h; read by the host compiler and by nvcc.
//
// Numerics: weights and activations are rounded to float16 (rows of activations scaled by a power of two
// first), summed in float32 on tensor cores; SiLU(gate) * up in float32. A token's result does not depend on
// what other tokens are in the call. Sums in memory take the rounded product with its factors, and subnormal
// ones are zero (PTX's red.add.f32).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tandem::attention::cuda {

constexpr int kMostGrouped = 16;  // experts in a launch

// Pairs (token, expert) sorted by expert, those of an expert by token. A pair is a place in [0, n * k).
struct SortPairsParams {
  const int32_t* ids = nullptr;    // [n, k]; what is outside [0, experts) is no pair
  const float* weights = nullptr;  // [n, k]
  int64_t n = 0;
  int32_t k = 0;
  int32_t experts = 0;
  int32_t* counts = nullptr;      // [experts]: pairs of each
  int32_t* pair_token = nullptr;  // [n * k]: first those of expert 0
  float* pair_weight = nullptr;   // [n * k]
};
cudaError_t LaunchSortPairs(const SortPairsParams& p, cudaStream_t stream);

// out[i] = ids[i], or -1 where the bit of that expert is not in `keep`, or there is none.
constexpr int kMostSet = 1024;  // experts that a set can name
struct KeepExpertsParams {
  const int32_t* ids = nullptr;  // [pairs]
  int64_t pairs = 0;
  uint32_t keep[kMostSet / 32] = {};
  int32_t* out = nullptr;  // [pairs]
};
cudaError_t LaunchKeepExperts(const KeepExpertsParams& p, cudaStream_t stream);

// A stack of matrices in device memory, rows as row_layout.h says.
struct GroupedWeights {
  int32_t type = 0;  // a GGUF id of row_layout.h but F32
  int64_t row_bytes = 0;
  const uint8_t* data[kMostGrouped] = {};  // of each expert, aligned to 16 bytes
};

// middle[i, :] = SiLU(gate_e x) * (up_e x) for pair first_pair + i, i in [0, the sum of count).
struct GateUpParams {
  GroupedWeights gate, up;              // [inner, hidden]
  const uint16_t* h = nullptr;          // [tokens, hidden] float16; x = h * h_scale
  const float* h_scale = nullptr;       // [tokens]
  const int32_t* pair_token = nullptr;  // of pair first_pair
  float* middle = nullptr;              // [pairs, inner]
  int32_t hidden = 0;                   // a multiple of 32
  int32_t inner = 0;                    // likewise
  int32_t experts = 0;
  int32_t begin[kMostGrouped] = {};  // of each expert's pairs, relative to first_pair
  int32_t count[kMostGrouped] = {};
  int32_t tile = 0;  // pairs of a block, 64, 128 or 256; 0: as is best. The bits are the same
};
cudaError_t LaunchGateUp(const GateUpParams& p, cudaStream_t stream);

// x[token of pair i, :] += weight_i * (down middle_i) for the pairs of one expert, each of another token.
struct DownParams {
  int32_t type = 0;
  int64_t row_bytes = 0;
  const uint8_t* data = nullptr;  // [hidden, inner]
  const uint16_t* h = nullptr;    // [count, inner] float16
  const float* h_scale = nullptr;
  const int32_t* pair_token = nullptr;  // [count]
  const float* pair_weight = nullptr;
  float* x = nullptr;  // [tokens, hidden]
  int32_t hidden = 0;
  int32_t inner = 0;
  int32_t count = 0;
  int32_t tile = 0;  // as in GateUpParams
  // What is in front of this launch on the stream is another LaunchDown: the products may begin before it has
  // ended, and only the sums wait for it. All that is read but x was complete before the first of such a row.
  bool after_another = false;
};
cudaError_t LaunchDown(const DownParams& p, cudaStream_t stream);

// Must be called once for the current device before the products: asks for their shared memory.
cudaError_t PrepareGroupedProducts();

}  // namespace tandem::attention::cuda
