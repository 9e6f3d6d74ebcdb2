// A vocabulary of a wanted size that byte-level BPE can work with: all bytes, invented words, DeepSeek's
// special tokens. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

struct SynthVocabulary {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;  // as tokenizer.ggml.token_type
  std::vector<std::string> merges;
  int64_t bos_id = 0;
  int64_t eos_id = 1;
  int64_t pad_id = 2;
};

// Of exactly `size` tokens, in the order of DeepSeek-V3's: BOS, EOS, pad, the 256 bytes, merged words,
// special tokens; from 129280 tokens on, the special ones have V3's own ids (<think> 128798). InvalidArgument
// names the smallest size.
absl::StatusOr<SynthVocabulary> MakeVocabulary(int64_t size);

// A chat template in Jinja for these tokens.
std::string SynthChatTemplate();

}  // namespace tandem::cli
