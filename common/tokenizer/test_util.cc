#include "common/tokenizer/test_util.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "common/tokenizer/unicode.h"
#include "nlohmann/json.hpp"

namespace tandem::tokenizer {

std::string SourcePath(const std::string& relative) {
  const char* root = std::getenv("TANDEM_SOURCE_DIR");
  return std::string(root == nullptr ? "." : root) + "/" + relative;
}

std::optional<std::string> SharedPath(const std::string& relative) {
  const char* shared = std::getenv("TANDEM_SHARED");
  const std::string path =
      (shared != nullptr ? std::string(shared) : SourcePath("../shared")) + "/" + relative;
  if (!std::filesystem::exists(path)) return std::nullopt;
  return path;
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream out;
  out << in.rdbuf();
  return out.str();
}

absl::StatusOr<VocabularySpec> SpecFromTokenizerJson(const std::string& path) {
  const auto json = nlohmann::json::parse(ReadFile(path), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return absl::InvalidArgumentError(path + " is not JSON");
  VocabularySpec spec;
  const auto put = [&](const std::string& token, size_t id, int32_t type) {
    if (id >= spec.tokens.size()) {
      spec.tokens.resize(id + 1);
      spec.token_types.resize(id + 1, 5);
    }
    spec.tokens[id] = token;
    spec.token_types[id] = type;
  };
  for (const auto& [token, id] : json["model"]["vocab"].items()) put(token, id.get<size_t>(), 1);
  for (const auto& added : json["added_tokens"]) {
    const auto token = added["content"].get<std::string>();
    put(token, added["id"].get<size_t>(), token == "<think>" || token == "</think>" ? 4 : 3);
  }
  for (size_t i = 0; i < spec.tokens.size(); ++i) {
    if (spec.tokens[i].empty()) spec.tokens[i] = "[PAD" + std::to_string(i) + "]";
  }
  for (const auto& merge : json["model"]["merges"]) spec.merges.push_back(merge.get<std::string>());
  spec.bos_id = 0;
  spec.eos_id = 1;
  spec.pad_id = 2;
  spec.add_bos = true;
  return spec;
}

VocabularySpec TinySpec() {
  VocabularySpec spec;
  const auto add = [&](std::string token, int32_t type) {
    spec.tokens.push_back(std::move(token));
    spec.token_types.push_back(type);
  };
  add("<｜begin▁of▁sentence｜>", 3);
  add("<｜end▁of▁sentence｜>", 3);
  add("<｜▁pad▁｜>", 3);
  uint32_t next = 256;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    std::string token;
    AppendUtf8(itself ? b : next++, &token);
    add(std::move(token), 1);
  }
  for (const char* merge :
       {"h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ"}) {
    spec.merges.emplace_back(merge);
    std::string joined = merge;
    joined.erase(joined.find(' '), 1);
    add(std::move(joined), 1);
  }
  for (const char* control : {"<｜User｜>", "<｜Assistant｜>", "<|im_end|>", "<|EOT|>"}) add(control, 3);
  add("<think>", 4);
  add("</think>", 4);
  spec.bos_id = 0;
  spec.eos_id = 1;
  spec.pad_id = 2;
  spec.add_bos = true;
  return spec;
}

}  // namespace tandem::tokenizer
