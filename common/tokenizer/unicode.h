// UTF-8 and the character properties that pre-tokenizers ask for (general categories of the ICU in use).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::tokenizer {

inline constexpr uint32_t kInvalidCodePoint = 0xFFFFFFFF;

// The code point at bytes[pos] (pos < size) and its length in `*length`. Ill-formed: kInvalidCodePoint, and
// the length of the longest prefix of a well-formed sequence found there, at least 1 (Unicode 15, table 3-8).
uint32_t DecodeUtf8(std::string_view bytes, size_t pos, size_t* length);

void AppendUtf8(uint32_t code_point, std::string* out);

// Bytes at the end of `bytes` (0 to 3) that begin a character but do not finish it.
size_t IncompleteUtf8Suffix(std::string_view bytes);

// Bits of a character's class.
enum CharClass : uint32_t {
  kLetter = 1u << 0,       // \p{L}
  kMark = 1u << 1,         // \p{M}
  kNumber = 1u << 2,       // \p{N}
  kPunctuation = 1u << 3,  // \p{P}
  kSymbol = 1u << 4,       // \p{S}
  kSpace = 1u << 5,        // \s: White_Space
  kUpper = 1u << 6,        // Lu, Lt
  kLower = 1u << 7,        // Ll
  kHan = 1u << 8,          // script Han
  kNewline = 1u << 9,      // \r, \n
  kCjkOrKana = 1u << 10,   // U+4E00..U+9FA5, U+3040..U+30FF
};

// A code point (21 bits) under its class bits (11 bits). A byte that is not UTF-8 is 0x110000 + byte, without
// class.
class ClassedChar {
 public:
  ClassedChar() = default;
  ClassedChar(uint32_t code_point, uint32_t char_class) : value_(code_point | char_class << 21) {}

  uint32_t code_point() const { return value_ & 0x1FFFFF; }
  bool Is(uint32_t classes) const { return (value_ >> 21 & classes) != 0; }
  uint32_t byte_length() const {
    const uint32_t c = code_point();
    return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : c < 0x110000 ? 4 : 1;
  }

 private:
  uint32_t value_ = 0;
};

// The class bits of a code point below 0x110000.
uint32_t ClassOf(uint32_t code_point);

// `text` as classed characters, appended to `out`.
void Classify(std::string_view text, std::vector<ClassedChar>* out);

}  // namespace tandem::tokenizer
