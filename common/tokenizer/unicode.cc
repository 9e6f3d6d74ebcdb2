#include "common/tokenizer/unicode.h"

#include <unicode/uchar.h>
#include <unicode/uscript.h>

#include <array>
#include <map>
#include <string>

#include "common/tokenizer/tokenizer.h"

namespace tandem::tokenizer {
namespace {

// Class bits in two stages: pages of 256 characters, equal pages stored once.
class ClassTable {
 public:
  ClassTable() {
    std::map<std::array<uint16_t, 256>, uint16_t> known;
    for (uint32_t page = 0; page < kPages; ++page) {
      std::array<uint16_t, 256> bits;
      for (uint32_t i = 0; i < 256; ++i) bits[i] = Compute(page * 256 + i);
      const auto [it, is_new] = known.emplace(bits, static_cast<uint16_t>(pages_.size()));
      if (is_new) pages_.push_back(bits);
      index_[page] = it->second;
    }
  }

  uint32_t Get(uint32_t c) const { return pages_[index_[c >> 8]][c & 0xFF]; }

 private:
  static constexpr uint32_t kPages = 0x1100;

  static uint16_t Compute(uint32_t c) {
    const uint32_t mask = U_GET_GC_MASK(static_cast<UChar32>(c));
    uint32_t bits = 0;
    if (mask & U_GC_L_MASK) bits |= kLetter;
    if (mask & U_GC_M_MASK) bits |= kMark;
    if (mask & U_GC_N_MASK) bits |= kNumber;
    if (mask & U_GC_P_MASK) bits |= kPunctuation;
    if (mask & U_GC_S_MASK) bits |= kSymbol;
    if (u_isUWhiteSpace(static_cast<UChar32>(c))) bits |= kSpace;
    if (mask & (U_GC_LU_MASK | U_GC_LT_MASK)) bits |= kUpper;
    if (mask & U_GC_LL_MASK) bits |= kLower;
    if (mask & (U_GC_L_MASK | U_GC_M_MASK | U_GC_N_MASK | U_GC_S_MASK | U_GC_P_MASK)) {
      UErrorCode error = U_ZERO_ERROR;
      if (uscript_getScript(static_cast<UChar32>(c), &error) == USCRIPT_HAN && U_SUCCESS(error)) bits |= kHan;
    }
    if (c == '\r' || c == '\n') bits |= kNewline;
    if ((c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF)) bits |= kCjkOrKana;
    return static_cast<uint16_t>(bits);
  }

  std::array<uint16_t, kPages> index_{};
  std::vector<std::array<uint16_t, 256>> pages_;
};

const ClassTable& Table() {
  static const ClassTable* const table = new ClassTable;
  return *table;
}

bool IsContinuation(unsigned char byte) { return (byte & 0xC0) == 0x80; }

}  // namespace

uint32_t DecodeUtf8(std::string_view bytes, size_t pos, size_t* length) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(pos);
  *length = 1;
  if (lead < 0x80) return lead;
  if (lead < 0xC2 || lead > 0xF4) return kInvalidCodePoint;
  const size_t need = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (pos + 1 >= bytes.size()) return kInvalidCodePoint;
  // The second byte's range keeps out overlong forms, surrogates and what lies beyond U+10FFFF.
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  const unsigned char second = at(pos + 1);
  if (second < low || second > high) return kInvalidCodePoint;
  uint32_t c = lead & (0xFFu >> (need + 1));
  c = c << 6 | (second & 0x3F);
  *length = 2;
  for (size_t i = 2; i < need; ++i) {
    if (pos + i >= bytes.size() || !IsContinuation(at(pos + i))) return kInvalidCodePoint;
    c = c << 6 | (at(pos + i) & 0x3F);
    *length = i + 1;
  }
  return c;
}

void AppendUtf8(uint32_t c, std::string* out) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out->push_back(static_cast<char>(0xC0 | c >> 6));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | c >> 12));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | c >> 18));
    out->push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

size_t IncompleteUtf8Suffix(std::string_view bytes) {
  for (size_t back = 1; back <= 3 && back <= bytes.size(); ++back) {
    const size_t pos = bytes.size() - back;
    const auto lead = static_cast<unsigned char>(bytes[pos]);
    if (IsContinuation(lead)) continue;
    if (lead < 0xC2 || lead > 0xF4) return 0;
    const size_t need = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    size_t length;
    const uint32_t c = DecodeUtf8(bytes, pos, &length);
    // Under way only if everything up to the end is a prefix of a well-formed sequence.
    return c == kInvalidCodePoint && length == back && back < need ? back : 0;
  }
  return 0;
}

uint32_t ClassOf(uint32_t code_point) { return Table().Get(code_point); }

void Classify(std::string_view text, std::vector<ClassedChar>* out) {
  const ClassTable& table = Table();
  out->reserve(out->size() + text.size());
  size_t i = 0;
  while (i < text.size()) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80) {
      out->emplace_back(byte, table.Get(byte));
      ++i;
      continue;
    }
    size_t length;
    const uint32_t c = DecodeUtf8(text, i, &length);
    if (c == kInvalidCodePoint) {
      out->emplace_back(0x110000 + byte, 0);
      ++i;
    } else {
      out->emplace_back(c, table.Get(c));
      i += length;
    }
  }
}

std::string SanitizeUtf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  size_t i = 0;
  while (i < bytes.size()) {
    size_t length;
    if (DecodeUtf8(bytes, i, &length) == kInvalidCodePoint) {
      AppendUtf8(0xFFFD, &out);
    } else {
      out.append(bytes, i, length);
    }
    i += length;
  }
  return out;
}

}  // namespace tandem::tokenizer
