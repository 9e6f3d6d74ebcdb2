#include "tests/integration/golden_data.h"

#include <fstream>
#include <regex>
#include <stdexcept>

#include "common/testing/process.h"

namespace tandem::integration {
namespace {

using testing::SourcePath;

constexpr char kEos[] = "<｜end▁of▁sentence｜>";

// ECMAScript has no (?<!\d): a text that begins with a blank and "[^0-9]" before the number say the same.
std::string WithoutLookbehind(std::string pattern) {
  const std::string lookbehind = "(?<!\\d)";
  if (const size_t at = pattern.find(lookbehind); at != std::string::npos) {
    pattern.replace(at, lookbehind.size(), "[^0-9]");
  }
  return pattern;
}

}  // namespace

std::vector<GoldenPrompt> GoldenPrompts() {
  std::ifstream in(SourcePath("tests/golden/demo/golden.json"));
  std::vector<GoldenPrompt> out;
  const Json golden = Json::parse(in);
  for (const Json& p : golden["prompts"]) {
    GoldenPrompt prompt;
    prompt.name = p["name"];
    prompt.messages = p["messages"];
    prompt.text = p["text"];
    prompt.prompt_tokens = p["tokens"].size();
    prompt.greedy_tokens = p["greedy"].size();
    prompt.greedy_text = p["greedy_text"];
    const size_t eos = prompt.greedy_text.rfind(kEos);
    prompt.complete = eos != std::string::npos && eos + sizeof(kEos) - 1 == prompt.greedy_text.size();
    if (prompt.complete) prompt.greedy_text.resize(eos);
    out.push_back(std::move(prompt));
  }
  return out;
}

bool EvaluationItem::Accepts(const std::string& answer) const {
  if (exact) return answer == expected;
  const bool anchored = expected.rfind("^", 0) == 0;
  return std::regex_search(anchored ? answer : " " + answer, std::regex(WithoutLookbehind(expected)));
}

std::vector<EvaluationItem> EvaluationItems(const std::vector<std::string>& ids) {
  std::vector<EvaluationItem> all, out;
  std::ifstream in(SourcePath("tools/demo_model/eval_public.jsonl"));
  for (std::string line; std::getline(in, line);) {
    const Json item = Json::parse(line);
    all.push_back({item["id"], item["messages"], item["expected"], item["match"] == "exact"});
  }
  for (const std::string& id : ids) {
    bool found = false;
    for (const EvaluationItem& item : all) {
      if (item.id == id) out.push_back(item);
      found = found || item.id == id;
    }
    if (!found) throw std::runtime_error("no evaluation item " + id);
  }
  return out;
}

}  // namespace tandem::integration
