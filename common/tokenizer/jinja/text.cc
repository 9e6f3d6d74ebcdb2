#include "common/tokenizer/jinja/text.h"

#include <unicode/uchar.h>
#include <unicode/ustring.h>

#include <algorithm>
#include <cstdio>

#include "common/tokenizer/unicode.h"

namespace tandem::jinja {

using tokenizer::AppendUtf8;

uint32_t DecodeChar(std::string_view s, size_t pos, size_t* length) {
  const uint32_t c = tokenizer::DecodeUtf8(s, pos, length);
  if (c != tokenizer::kInvalidCodePoint) return c;
  *length = 1;
  return static_cast<unsigned char>(s[pos]);
}

size_t CharCount(std::string_view s) {
  return static_cast<size_t>(std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

std::vector<std::string> Chars(std::string_view s) {
  std::vector<std::string> out;
  for (size_t i = 0; i < s.size();) {
    size_t length;
    DecodeChar(s, i, &length);
    out.emplace_back(s.substr(i, length));
    i += length;
  }
  return out;
}

bool IsSpaceChar(uint32_t c) { return u_isUWhiteSpace(static_cast<UChar32>(c)) || (c >= 0x1C && c <= 0x1F); }

std::string_view Strip(std::string_view s, int sides, const std::string_view* chars) {
  std::vector<uint32_t> set;
  if (chars != nullptr) {
    for (size_t i = 0; i < chars->size();) {
      size_t length;
      set.push_back(DecodeChar(*chars, i, &length));
      i += length;
    }
    std::sort(set.begin(), set.end());
  }
  const auto goes = [&](uint32_t c) {
    return chars == nullptr ? IsSpaceChar(c) : std::binary_search(set.begin(), set.end(), c);
  };
  size_t begin = 0;
  size_t end = s.size();
  while ((sides & kLeft) != 0 && begin < end) {
    size_t length;
    if (!goes(DecodeChar(s, begin, &length))) break;
    begin += length;
  }
  while ((sides & kRight) != 0 && end > begin) {
    size_t last = end - 1;
    while (last > begin && end - last < 4 && (s[last] & 0xC0) == 0x80) --last;
    size_t length;
    if (!goes(DecodeChar(s, last, &length))) break;
    end = last;
  }
  return s.substr(begin, end - begin);
}

namespace {

// Full case mapping by ICU, without a language.
std::string MapCase(std::string_view s, bool upper) {
  std::string out;
  if (std::all_of(s.begin(), s.end(), [](char c) { return static_cast<signed char>(c) >= 0; })) {
    out.assign(s);
    for (char& c : out) {
      if (upper && c >= 'a' && c <= 'z') c = static_cast<char>(c - 32);
      if (!upper && c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    }
    return out;
  }
  std::u16string wide;
  for (size_t i = 0; i < s.size();) {
    size_t length;
    const uint32_t c = DecodeChar(s, i, &length);
    if (c >= 0x10000) {
      wide.push_back(static_cast<char16_t>(0xD800 + ((c - 0x10000) >> 10)));
      wide.push_back(static_cast<char16_t>(0xDC00 + ((c - 0x10000) & 0x3FF)));
    } else {
      wide.push_back(static_cast<char16_t>(c));
    }
    i += length;
  }
  if (wide.size() > (size_t{1} << 28)) return std::string(s);
  std::u16string mapped(wide.size() * 3 + 8, u'\0');  // no character maps to more than three
  UErrorCode error = U_ZERO_ERROR;
  const auto function = upper ? u_strToUpper : u_strToLower;
  const int32_t n = function(mapped.data(), static_cast<int32_t>(mapped.size()), wide.data(),
                             static_cast<int32_t>(wide.size()), "", &error);
  if (U_FAILURE(error)) return std::string(s);
  for (int32_t i = 0; i < n; ++i) {
    uint32_t c = mapped[i];
    if (c >= 0xD800 && c < 0xDC00 && i + 1 < n) {
      c = 0x10000 + ((c - 0xD800) << 10) + (mapped[i + 1] - 0xDC00);
      ++i;
    }
    AppendUtf8(c, &out);
  }
  return out;
}

// One character at the beginning of a word.
void AppendTitled(std::string_view character, std::string* out) {
  size_t length;
  const uint32_t c = DecodeChar(character, 0, &length);
  const auto title = static_cast<uint32_t>(u_totitle(static_cast<UChar32>(c)));
  if (title != c) {
    AppendUtf8(title, out);
    return;
  }
  // Either without case, or one that becomes several letters, the first of them large.
  const std::string upper = MapCase(character, true);
  size_t first;
  DecodeChar(upper, 0, &first);
  out->append(upper, 0, first);
  out->append(MapCase(std::string_view(upper).substr(first), false));
}

bool IsCased(uint32_t c) { return u_hasBinaryProperty(static_cast<UChar32>(c), UCHAR_CASED); }

}  // namespace

std::string Upper(std::string_view s) { return MapCase(s, true); }
std::string Lower(std::string_view s) { return MapCase(s, false); }

std::string Capitalize(std::string_view s) {
  if (s.empty()) return "";
  size_t length;
  DecodeChar(s, 0, &length);
  std::string out;
  AppendTitled(s.substr(0, length), &out);
  return out + Lower(s.substr(length));
}

std::string Title(std::string_view s) {
  std::string out;
  bool in_word = false;
  for (size_t i = 0; i < s.size();) {
    size_t length;
    const uint32_t c = DecodeChar(s, i, &length);
    if (in_word) {
      out += Lower(s.substr(i, length));
    } else {
      AppendTitled(s.substr(i, length), &out);
    }
    in_word = IsCased(c);
    i += length;
  }
  return out;
}

std::string TitleFilter(std::string_view s) {
  std::string out;
  bool at_start = true;
  for (size_t i = 0; i < s.size();) {
    size_t length;
    const uint32_t c = DecodeChar(s, i, &length);
    const bool cuts = c == '-' || c == '(' || c == '{' || c == '[' || c == '<' || IsSpaceChar(c);
    out += cuts       ? std::string(s.substr(i, length))
           : at_start ? Upper(s.substr(i, length))
                      : Lower(s.substr(i, length));
    at_start = cuts;
    i += length;
  }
  return out;
}

std::string Replace(std::string_view s, std::string_view from, std::string_view to, int64_t count) {
  std::string out;
  if (from.empty()) {
    // Between all characters, before the first and after the last.
    size_t i = 0;
    while (count != 0) {
      --count;
      out.append(to);
      if (i >= s.size()) return out;
      size_t length;
      DecodeChar(s, i, &length);
      out.append(s, i, length);
      i += length;
    }
    return out.append(s.substr(i));
  }
  size_t pos = 0;
  while (count != 0) {
    const size_t found = s.find(from, pos);
    if (found == std::string_view::npos) break;
    out.append(s, pos, found - pos);
    out.append(to);
    pos = found + from.size();
    --count;
  }
  return out.append(s.substr(pos));
}

std::vector<std::string> SplitAt(std::string_view s, const std::string_view* separator, int64_t limit,
                                 bool from_right) {
  std::vector<std::string> out;
  if (separator != nullptr) {
    while (limit != 0) {
      const size_t found = from_right ? s.rfind(*separator) : s.find(*separator);
      if (found == std::string_view::npos) break;
      const std::string_view after = s.substr(found + separator->size());
      out.emplace_back(from_right ? after : s.substr(0, found));
      s = from_right ? s.substr(0, found) : after;
      --limit;
    }
    out.emplace_back(s);
  } else {
    while (true) {
      s = Strip(s, from_right ? kRight : kLeft);
      if (s.empty()) break;
      if (limit == 0) {
        out.emplace_back(s);
        break;
      }
      // The word at this end.
      size_t cut = from_right ? s.size() : 0;
      while (from_right ? cut > 0 : cut < s.size()) {
        size_t length;
        if (from_right) {
          size_t last = cut - 1;
          while (last > 0 && cut - last < 4 && (s[last] & 0xC0) == 0x80) --last;
          if (IsSpaceChar(DecodeChar(s, last, &length))) break;
          cut = last;
        } else {
          if (IsSpaceChar(DecodeChar(s, cut, &length))) break;
          cut += length;
        }
      }
      out.emplace_back(from_right ? s.substr(cut) : s.substr(0, cut));
      s = from_right ? s.substr(0, cut) : s.substr(cut);
      --limit;
    }
  }
  if (from_right) std::reverse(out.begin(), out.end());
  return out;
}

std::vector<std::string> SplitLines(std::string_view s, bool keep_ends) {
  std::vector<std::string> out;
  size_t start = 0;
  for (size_t i = 0; i < s.size();) {
    size_t length;
    const uint32_t c = DecodeChar(s, i, &length);
    const bool ends =
        (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
    if (!ends) {
      i += length;
      continue;
    }
    size_t next = i + length;
    if (c == '\r' && next < s.size() && s[next] == '\n') ++next;
    out.emplace_back(s.substr(start, (keep_ends ? next : i) - start));
    i = start = next;
  }
  if (start < s.size()) out.emplace_back(s.substr(start));
  return out;
}

void AppendStringRepr(std::string_view s, std::string* out) {
  const bool has_single = s.find('\'') != std::string_view::npos;
  const char quote = has_single && s.find('"') == std::string_view::npos ? '"' : '\'';
  out->push_back(quote);
  char buffer[16];
  for (size_t i = 0; i < s.size();) {
    size_t length;
    const uint32_t c = DecodeChar(s, i, &length);
    if (c == static_cast<unsigned char>(quote) || c == '\\') {
      out->push_back('\\');
      out->push_back(static_cast<char>(c));
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out->append(c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t");
    } else {
      const uint32_t hidden = U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CS_MASK | U_GC_CO_MASK | U_GC_CN_MASK |
                              U_GC_ZL_MASK | U_GC_ZP_MASK | U_GC_ZS_MASK;
      if (c != ' ' && (U_GET_GC_MASK(static_cast<UChar32>(c)) & hidden) != 0) {
        std::snprintf(buffer, sizeof(buffer), c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
        out->append(buffer);
      } else {
        out->append(s.substr(i, length));
      }
    }
    i += length;
  }
  out->push_back(quote);
}

std::string EscapeHtml(std::string_view s) {
  std::string out;
  for (const char c : s) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out.push_back(c);
    }
  }
  return out;
}

}  // namespace tandem::jinja
