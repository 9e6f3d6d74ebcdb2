#include "common/tokenizer/pretokenizer.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "common/tokenizer/test_util.h"
#include "nlohmann/json.hpp"

namespace tandem::tokenizer {
namespace {

std::vector<std::string> Pieces(PreTokenizer function, const std::string& text) {
  std::vector<ClassedChar> chars;
  Classify(text, &chars);
  std::vector<uint32_t> ends;
  function(chars, &ends);
  std::vector<std::string> pieces;
  size_t i = 0;
  size_t pos = 0;
  for (const uint32_t end : ends) {
    size_t length = 0;
    for (; i < end; ++i) length += chars[i].byte_length();
    pieces.push_back(text.substr(pos, length));
    pos += length;
  }
  EXPECT_EQ(pos, text.size());
  return pieces;
}

// The golden pieces are those of the models' regular expressions under Python's regex module, over random
// strings of characters that the expressions tell apart.
TEST(PreTokenizer, GoldenPieces) {
  const char* other = std::getenv("TANDEM_PRETOKENIZER_GOLDEN");
  const auto golden = nlohmann::json::parse(
      ReadFile(other != nullptr ? other : SourcePath("common/tokenizer/testdata/pretokenizer_golden.json")));
  ASSERT_EQ(golden.size(), SupportedPreTokenizers().size());
  for (const auto& [name, rows] : golden.items()) {
    const PreTokenizer function = FindPreTokenizer(name);
    ASSERT_NE(function, nullptr) << name;
    ASSERT_GE(rows.size(), 250u);
    for (const auto& row : rows) {
      const auto expected = row.get<std::vector<std::string>>();
      std::string text;
      for (const std::string& piece : expected) text += piece;
      EXPECT_EQ(Pieces(function, text), expected) << name << ": " << nlohmann::json(text).dump();
    }
  }
}

TEST(PreTokenizer, BytesThatAreNotUtf8AreKeptTogether) {
  const PreTokenizer v3 = FindPreTokenizer("deepseek-v3");
  EXPECT_EQ(Pieces(v3, "\xFF\xFE\x80"), (std::vector<std::string>{"\xFF\xFE\x80"}));
  EXPECT_EQ(Pieces(v3, ""), std::vector<std::string>{});
  EXPECT_EQ(FindPreTokenizer("no such set"), nullptr);
}

}  // namespace
}  // namespace tandem::tokenizer
