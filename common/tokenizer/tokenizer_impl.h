// The inside of Tokenizer, for its own translation units.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/tokenizer/bpe.h"
#include "common/tokenizer/pretokenizer.h"
#include "common/tokenizer/special_matcher.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::tokenizer {

struct Tokenizer::Impl {
  // Whether BPE on the bytes of a token gives that one token. Found out when first asked.
  enum Whole : uint8_t { kWholeUnknown = 0, kWholeYes = 1, kWholeNo = 2 };

  absl::Status Build(VocabularySpec spec);
  absl::Status BuildTokens();
  absl::Status BuildMerges();
  absl::Status BuildSpecials();

  // Encodes text without special tokens.
  // May end early, with more than `most` tokens.
  void EncodePlain(std::string_view text, size_t most, std::vector<int32_t>* out) const;
  // One piece of the pre-tokenizer.
  void EncodePiece(std::string_view piece, BpeMerger* merger, std::vector<int32_t>* symbols,
                   std::vector<int32_t>* out) const;

  VocabularySpec spec;
  std::vector<std::string> bytes;  // of each token
  std::vector<TokenType> types;
  absl::flat_hash_map<std::string_view, int32_t> by_text;   // views into spec.tokens
  absl::flat_hash_map<std::string_view, int32_t> by_bytes;  // normal tokens; views into `bytes`
  int32_t byte_ids[256];
  std::unique_ptr<MergeTable> merges;
  std::unique_ptr<std::atomic<uint8_t>[]> whole;
  size_t longest_token = 0;   // bytes, of normal ones
  size_t longest_of_all = 1;  // likewise
  PreTokenizer pre_tokenizer = nullptr;
  SpecialMatcher user_defined;  // found in every text
  SpecialMatcher all_special;   // with the control tokens, for parse_special
  std::vector<int32_t> end_of_generation;
};

}  // namespace tandem::tokenizer
