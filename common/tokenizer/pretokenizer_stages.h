// The pre-tokenizers of the models before DeepSeek-V3: a list of expressions, each applied to the pieces that
// the one before has left (matches and gaps alike).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/tokenizer/unicode.h"

namespace tandem::tokenizer {

// "deepseek-llm" (DeepSeek-V2, V2-Lite, V2.5) and "deepseek-coder"; the contract is that of PreTokenizer.
void DeepSeekLlm(std::span<const ClassedChar> chars, std::vector<uint32_t>* ends);
void DeepSeekCoder(std::span<const ClassedChar> chars, std::vector<uint32_t>* ends);

}  // namespace tandem::tokenizer
