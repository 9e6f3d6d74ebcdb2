// The prompts and greedy continuations that transformers computed (tests/golden/demo, see its README), and
// the evaluation items of the demo model.
#pragma once

#include <string>
#include <vector>

#include "tests/integration/rest_client.h"

namespace tandem::integration {

struct GoldenPrompt {
  std::string name;
  Json messages;         // empty for a bare text
  std::string text;      // the rendered prompt
  size_t prompt_tokens;  // BOS included
  size_t greedy_tokens;  // EOS included
  std::string greedy_text;
  bool complete;  // ends with EOS, which greedy_text here does not hold
};
std::vector<GoldenPrompt> GoldenPrompts();

struct EvaluationItem {
  std::string id;
  Json messages;
  std::string expected;
  bool exact = false;

  bool Accepts(const std::string& answer) const;
};
// Throws if one is not there.
std::vector<EvaluationItem> EvaluationItems(const std::vector<std::string>& ids);

}  // namespace tandem::integration
