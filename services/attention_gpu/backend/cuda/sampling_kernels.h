// The sampler's kernels and what they share with the host. Read by the host compiler and by nvcc; sampler.h
// is what backends use. Order, ties and broken logits are those of sampling/sampling.h.
//
// The order of tokens is that of 64-bit keys, the best first: the upper half falls as the logit grows (NaN
// counts as -inf), the lower half is the token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tandem::attention::cuda {

constexpr int kSamplingRows = 64;                         // in one launch
constexpr int kSamplingParts = 64;                        // blocks that share a row, at most
constexpr int kSamplingBins = 1024;                       // of logits' distances to the best one, 1/32 each
constexpr int kMostTopLogprobs = 20;                      // alternatives
constexpr int64_t kMostSamplingVocab = int64_t{1} << 19;  // more would overflow sums of 2^-44

enum SamplingFlags : uint32_t {
  kSamplingIdle = 1,      // nothing is wanted of this row
  kSamplingGreedy = 2,    // the best token, no draw
  kSamplingLogprobs = 4,  // with log-probabilities
};

// What is asked of one row.
struct alignas(16) SamplingRow {
  double inverse_temperature = 1;
  double top_p = 1;
  double min_p = 0;
  double uniform = 0;      // [0, 1): the draw
  int64_t first_edit = 0;  // in SamplingInput::edits: `biases` of them, then `penalties`
  int32_t biases = 0;      // sorted by token
  int32_t penalties = 0;   // one a token
  float presence = 0, frequency = 0, repetition = 1;
  int32_t top_k = 0;  // 0: off
  int32_t top_logprobs = 0;
  uint32_t flags = kSamplingIdle;
};

// A change of one logit.
struct SamplingEdit {
  int32_t token = 0;
  union {
    float bias = 0;
    int32_t count;  // how often it was generated
  };
};

struct RawLogit {  // before its edit; token -1: none
  int32_t token;
  float logit;
};

// Page-locked, written by the host; read over the bus once a launch.
struct alignas(16) SamplingInput {
  SamplingRow rows[kSamplingRows];
  const SamplingEdit* edits = nullptr;  // page-locked
  RawLogit* raw = nullptr;              // device memory, one for each edit
};

// Page-locked, written by the kernels.
struct SamplingResult {
  int32_t token = 0;
  float logprob = 0;
  int32_t top_tokens[kMostTopLogprobs] = {};
  float top_logprobs[kMostTopLogprobs] = {};
};

using SamplingKey = unsigned long long;

// Where the kernels find things; fixed from launch to launch. Device memory but for the first two.
struct SamplingState {
  const SamplingInput* input = nullptr;
  SamplingResult* results = nullptr;  // [kSamplingRows]
  SamplingInput* fetched = nullptr;   // the input, as it is when a launch begins
  SamplingKey* best = nullptr;        // [kSamplingRows, parts]
  float* raw_max = nullptr;           // [kSamplingRows, parts]: the largest logit before edits
  double* raw_sum = nullptr;          // [kSamplingRows, parts]: of exp(logit - that)
  SamplingKey* raw_top = nullptr;     // [kSamplingRows, parts, kMostTopLogprobs]
  uint32_t* bin_count = nullptr;      // [kSamplingRows, kSamplingBins]
  SamplingKey* bin_weight = nullptr;  // [kSamplingRows, kSamplingBins]: weights in units of 2^-44
  uint32_t* finished = nullptr;       // [kSamplingRows]: blocks; zero between launches
  int32_t* tokens = nullptr;          // [kSamplingRows]: the results' tokens
};

// logits: [rows, vocab], changed where rows have edits. rows <= kSamplingRows, vocab <= kMostSamplingVocab.
// Five launches whose grids depend on rows and vocab alone.
cudaError_t LaunchSampling(const SamplingState& s, float* logits, int64_t rows, int64_t vocab,
                           cudaStream_t stream);

// The best token of each row, whatever the input says: one launch.
cudaError_t LaunchGreedySampling(const SamplingState& s, const float* logits, int64_t rows, int64_t vocab,
                                 cudaStream_t stream);

}  // namespace tandem::attention::cuda
