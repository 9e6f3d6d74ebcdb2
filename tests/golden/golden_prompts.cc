#include "tests/golden/golden_prompts.h"

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

namespace tandem::golden {

std::string SourceDir() {
  const char* dir = std::getenv("TANDEM_SOURCE_DIR");
  return dir != nullptr ? dir : ".";
}

std::vector<Prompt> Prompts() {
  std::ifstream in(SourceDir() + "/tests/golden/demo/golden.json");
  const auto json = nlohmann::json::parse(in);
  std::vector<Prompt> out;
  for (const auto& p : json["prompts"]) out.push_back({p["name"], p["tokens"], p["greedy"]});
  return out;
}

attention::StepBatch OneSequence(const std::vector<int32_t>& tokens, int32_t position,
                                 std::span<const int32_t> pages) {
  static const attention::SamplingParams greedy;
  static const std::unordered_map<int32_t, int32_t> no_counts;
  attention::StepBatch batch;
  batch.tokens = tokens;
  attention::StepSequence s;
  s.count = static_cast<int32_t>(tokens.size());
  s.position = position;
  s.pages = pages;
  s.sample = true;
  s.params = &greedy;
  s.counts = &no_counts;
  batch.sequences.push_back(s);
  return batch;
}

}  // namespace tandem::golden
