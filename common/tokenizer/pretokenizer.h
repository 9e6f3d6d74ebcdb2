// Cuts text into the pieces that BPE merges within. Hand-written scanners for the regular expressions that
// the models were trained with (tokenizer.ggml.pre names the set); linear time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "common/tokenizer/unicode.h"

namespace tandem::tokenizer {

// Appends the end of each piece (an index into `chars`, ascending, the last one chars.size()) to `ends`.
// `chars` fewer than 2^32.
using PreTokenizer = void (*)(std::span<const ClassedChar> chars, std::vector<uint32_t>* ends);

// nullptr for an unknown name.
PreTokenizer FindPreTokenizer(std::string_view name);

}  // namespace tandem::tokenizer
