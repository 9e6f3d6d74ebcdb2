#include "common/tokenizer/pretokenizer.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/tokenizer/pretokenizer_stages.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::tokenizer {
namespace {

using Chars = std::span<const ClassedChar>;
using Ends = std::vector<uint32_t>;

bool IsAsciiLetter(uint32_t c) { return (c | 0x20) >= 'a' && (c | 0x20) <= 'z'; }

bool IsAsciiPunctuation(uint32_t c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

size_t RunEnd(Chars s, size_t i, size_t end, uint32_t classes) {
  while (i < end && s[i].Is(classes)) ++i;
  return i;
}

// The last alternatives of most sets, at a space s[i]: \s*[\r\n]+ | \s+(?!\S) | \s+
size_t SpaceEnd(Chars s, size_t i, size_t end) {
  const size_t run = RunEnd(s, i, end, kSpace);
  size_t after_newline = run;
  while (after_newline > i && !s[after_newline - 1].Is(kNewline)) --after_newline;
  if (after_newline > i) return after_newline;
  return run == end || run - i < 2 ? run : run - 1;
}

// The third expression of deepseek-v3, over a stretch without numbers:
// [ascii punctuation][A-Za-z]+ | [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+ | ?[\p{P}\p{S}]+[\r\n]* | spaces
void ScanDeepSeekV3(Chars s, size_t i, size_t end, Ends* ends) {
  size_t piece = i;  // begin of what no alternative has matched so far
  while (i < end) {
    const ClassedChar c = s[i];
    size_t match = i;
    if (IsAsciiPunctuation(c.code_point()) && i + 1 < end && IsAsciiLetter(s[i + 1].code_point())) {
      match = i + 2;
      while (match < end && IsAsciiLetter(s[match].code_point())) ++match;
    } else if (c.Is(kLetter | kMark)) {
      match = RunEnd(s, i, end, kLetter | kMark);
    } else if (!c.Is(kPunctuation | kSymbol | kNewline) && i + 1 < end && s[i + 1].Is(kLetter | kMark)) {
      match = RunEnd(s, i + 1, end, kLetter | kMark);
    } else if (c.Is(kPunctuation | kSymbol) ||
               (c.code_point() == ' ' && i + 1 < end && s[i + 1].Is(kPunctuation | kSymbol))) {
      match = RunEnd(s, RunEnd(s, i + 1, end, kPunctuation | kSymbol), end, kNewline);
    } else if (c.Is(kSpace)) {
      match = SpaceEnd(s, i, end);
    }
    if (match == i) {
      ++i;
      continue;
    }
    if (piece < i) ends->push_back(static_cast<uint32_t>(i));
    ends->push_back(static_cast<uint32_t>(match));
    i = piece = match;
  }
  if (piece < end) ends->push_back(static_cast<uint32_t>(end));
}

// \p{N}{1,3}, then [一-龥぀-ゟ゠-ヿ]+, then the above, each on the pieces of the one before.
void DeepSeekV3(Chars s, Ends* ends) {
  size_t i = 0;
  while (i < s.size()) {
    size_t end = i + 1;
    if (s[i].Is(kNumber)) {
      while (end < s.size() && end - i < 3 && s[end].Is(kNumber)) ++end;
      ends->push_back(static_cast<uint32_t>(end));
    } else {
      const bool cjk = s[i].Is(kCjkOrKana);
      while (end < s.size() && s[end].Is(kCjkOrKana) == cjk && !s[end].Is(kNumber)) ++end;
      ScanDeepSeekV3(s, i, end, ends);
    }
    i = end;
  }
}

// Length of an English contraction at s[i] ('s 't 're 've 'm 'll 'd), 0 if there is none. With `any_case`
// letters of both cases count, and U+017F, which folds to s.
size_t ContractionLength(Chars s, size_t i, bool any_case) {
  const auto at = [&](size_t k) -> uint32_t {
    if (k >= s.size()) return 0;
    const uint32_t c = s[k].code_point();
    if (!any_case) return c;
    if (c == 0x17F) return 's';
    return c >= 'A' && c <= 'Z' ? c | 0x20 : c;
  };
  if (at(i) != '\'') return 0;
  const uint32_t a = at(i + 1);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  const uint32_t b = at(i + 2);
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
void Gpt2(Chars s, Ends* ends) {
  size_t i = 0;
  while (i < s.size()) {
    size_t match = i + ContractionLength(s, i, /*any_case=*/false);
    if (match == i) {
      const size_t first = s[i].code_point() == ' ' && i + 1 < s.size() && !s[i + 1].Is(kSpace) ? i + 1 : i;
      if (s[first].Is(kLetter | kNumber)) {
        match = RunEnd(s, first, s.size(), s[first].Is(kLetter) ? kLetter : kNumber);
      } else if (!s[first].Is(kSpace)) {
        match = first;
        while (match < s.size() && !s[match].Is(kSpace | kLetter | kNumber)) ++match;
      } else {
        const size_t run = RunEnd(s, i, s.size(), kSpace);
        match = run == s.size() || run - i < 2 ? run : run - 1;
      }
    }
    ends->push_back(static_cast<uint32_t>(match));
    i = match;
  }
}

// Kimi-K2's words: with U = [Lu Lt Lm Lo M] and W = [Ll Lm Lo M], both without Han characters, U*W+ or,
// failing that, U+W*, from s[i]; i if neither matches.
size_t KimiWordEnd(Chars s, size_t i, bool lower_ending) {
  const auto in_u = [&](size_t k) { return s[k].Is(kLetter | kMark) && !s[k].Is(kLower | kHan); };
  const auto in_w = [&](size_t k) { return s[k].Is(kLetter | kMark) && !s[k].Is(kUpper | kHan); };
  size_t upper = i;
  while (upper < s.size() && in_u(upper)) ++upper;
  size_t end = upper;
  while (end < s.size() && in_w(end)) ++end;
  if (!lower_ending) return upper > i ? end : i;
  if (end > upper) return end;
  // U* took all: give back up to the last character that W takes too.
  while (upper > i && !in_w(upper - 1)) --upper;
  return upper;
}

// [\p{Han}]+ | [^\r\n\p{L}\p{N}]?U*W+contraction? | [^\r\n\p{L}\p{N}]?U+W*contraction? | \p{N}{1,3}
// | ?[^\s\p{L}\p{N}]+[\r\n]* | spaces
void KimiK2(Chars s, Ends* ends) {
  const auto word = [&](size_t i) {
    const bool prefix = !s[i].Is(kNewline | kLetter | kNumber) && i + 1 < s.size();
    for (const bool lower_ending : {true, false}) {
      for (const size_t first : {prefix ? i + 1 : i, i}) {
        const size_t end = KimiWordEnd(s, first, lower_ending);
        if (end > first) return end + ContractionLength(s, end, /*any_case=*/true);
      }
    }
    return i;
  };
  size_t i = 0;
  while (i < s.size()) {
    size_t match = RunEnd(s, i, s.size(), kHan);
    if (match == i) match = word(i);
    if (match == i && s[i].Is(kNumber)) {
      while (match < s.size() && match - i < 3 && s[match].Is(kNumber)) ++match;
    }
    if (match == i) {
      const bool spaced =
          s[i].code_point() == ' ' && i + 1 < s.size() && !s[i + 1].Is(kSpace | kLetter | kNumber);
      if (spaced || !s[i].Is(kSpace)) {
        match = i + 1;
        while (match < s.size() && !s[match].Is(kSpace | kLetter | kNumber)) ++match;
        match = RunEnd(s, match, s.size(), kNewline);
      } else {
        match = SpaceEnd(s, i, s.size());
      }
    }
    ends->push_back(static_cast<uint32_t>(match));
    i = match;
  }
}

struct Named {
  std::string_view name;
  PreTokenizer function;
};

constexpr Named kPreTokenizers[] = {
    {"deepseek-v3", DeepSeekV3},
    {"deepseek-llm", DeepSeekLlm},
    {"deepseek-coder", DeepSeekCoder},
    {"kimi-k2", KimiK2},
    {"gpt-2", Gpt2},
};

}  // namespace

PreTokenizer FindPreTokenizer(std::string_view name) {
  for (const Named& known : kPreTokenizers) {
    if (known.name == name) return known.function;
  }
  return nullptr;
}

std::vector<std::string_view> SupportedPreTokenizers() {
  std::vector<std::string_view> names;
  for (const Named& known : kPreTokenizers) names.push_back(known.name);
  return names;
}

}  // namespace tandem::tokenizer
