#include "cli/util/format.h"

#include <cstdio>

namespace tandem::cli {
namespace {

std::string Scaled(uint64_t number, const char* const* units, int count) {
  double value = static_cast<double>(number);
  int unit = 0;
  while (value >= 999.95 && unit + 1 < count) {
    value /= 1000;
    ++unit;
  }
  char text[64];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f%s" : "%.1f%s", value, units[unit]);
  return text;
}

// Length of the well-formed UTF-8 sequence at the beginning of `s` (`n` bytes); 0 if there is none.
int Utf8Length(const unsigned char* s, size_t n) {
  const unsigned char c = s[0];
  const int length = c < 0x80                ? 1
                     : c >= 0xC2 && c < 0xE0 ? 2
                     : c >= 0xE0 && c < 0xF0 ? 3
                     : c >= 0xF0 && c < 0xF5 ? 4
                                             : 0;
  if (length == 0 || static_cast<size_t>(length) > n) return 0;
  for (int i = 1; i < length; ++i) {
    if ((s[i] & 0xC0) != 0x80) return 0;
  }
  if ((c == 0xE0 && s[1] < 0xA0) || (c == 0xED && s[1] >= 0xA0) || (c == 0xF0 && s[1] < 0x90) ||
      (c == 0xF4 && s[1] >= 0x90)) {
    return 0;
  }
  return length;
}

}  // namespace

std::string FormatBytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {" B", " kB", " MB", " GB", " TB", " PB", " EB"};
  return Scaled(bytes, kUnits, 7);
}

std::string FormatCount(uint64_t count) {
  static constexpr const char* kUnits[] = {"", " K", " M", " B", " T"};
  return Scaled(count, kUnits, 5);
}

std::string Grouped(uint64_t number) {
  const std::string digits = std::to_string(number);
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string Printable(const std::string& text) {
  std::string out;
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  for (size_t i = 0; i < text.size();) {
    const int length = Utf8Length(bytes + i, text.size() - i);
    // C1 control characters (U+0080 to U+009F) are control characters too.
    const bool control = (length == 1 && (bytes[i] < 0x20 || bytes[i] == 0x7F)) ||
                         (length == 2 && bytes[i] == 0xC2 && bytes[i + 1] < 0xA0);
    if (length == 0 || control) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\x%02X", bytes[i]);
      out += bytes[i] == '\n' ? "\\n" : bytes[i] == '\t' ? "\\t" : escape;
      ++i;
      continue;
    }
    out.append(text, i, length);
    i += length;
  }
  return out;
}

}  // namespace tandem::cli
