// Choosing the next token from logits. Pure functions: the same logits, parameters, position and counts give
// the same token, whatever else runs beside.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace tandem::attention {

struct SamplingParams {
  float temperature = 0;  // 0: greedy
  float top_p = 1;        // (0, 1]
  uint32_t top_k = 0;     // 0: off
  float min_p = 0;        // [0, 1): relative to the likeliest token
  uint64_t seed = 0;
  float presence_penalty = 0;                         // [-2, 2]
  float frequency_penalty = 0;                        // [-2, 2]
  float repetition_penalty = 1;                       // > 0
  std::vector<std::pair<int32_t, float>> logit_bias;  // token, [-100, 100]
  uint32_t top_logprobs = 0;                          // [0, 20]
  bool logprobs = false;
};

// InvalidArgument names the parameter and its range.
absl::Status Validate(const SamplingParams& params, int64_t vocab_size);

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;  // natural, of the model's distribution before temperature and truncation
};

struct SampledToken {
  int32_t token = 0;
  float logprob = 0;              // if asked for
  std::vector<TokenLogprob> top;  // best first
};

// A uniform double in [0, 1) from a counter-based generator (Philox 4x32-10, Salmon et al. 2011) with key =
// seed and counter = position.
double UniformAt(uint64_t seed, uint64_t position);

// `logits`: [vocab], overwritten. `position`: of the token to be chosen. `counts`: how often each token was
// generated in this sequence, for the penalties. Order: bias and penalties, temperature, top_k, top_p, min_p.
// Ties go to the lower id. Logits that are NaN count as -inf. Where the best logit is infinite, the first of
// that value is taken.
SampledToken Sample(std::span<float> logits, const SamplingParams& params, uint64_t position,
                    const std::unordered_map<int32_t, int32_t>& counts);

}  // namespace tandem::attention
