// The prompts of tests/golden/demo, and steps of a single sequence to run them with.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "services/attention_gpu/backend/backend.h"

namespace tandem::golden {

// The root of the sources: TANDEM_SOURCE_DIR, which ctest sets, else where the program was started.
std::string SourceDir();

struct Prompt {
  std::string name;
  std::vector<int32_t> tokens;
  std::vector<int32_t> greedy;  // the continuation that transformers computed
};
std::vector<Prompt> Prompts();

// A step of `tokens` of one sequence from `position` on, greedily sampled after the last. `pages` must
// outlive it.
attention::StepBatch OneSequence(const std::vector<int32_t>& tokens, int32_t position,
                                 std::span<const int32_t> pages);

}  // namespace tandem::golden
