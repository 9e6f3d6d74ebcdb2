#include "common/tokenizer/pretokenizer_stages.h"

#include <algorithm>
#include <cstddef>
#include <iterator>

namespace tandem::tokenizer {
namespace {

using Chars = std::span<const ClassedChar>;

struct Range {
  uint32_t first;
  uint32_t last;
};

// The letters of the second expression of deepseek-llm: those of scripts with two cases.
constexpr Range kCasedLetters[] = {
    {0x41, 0x5A},       {0x61, 0x7A},       {0xB5, 0xB5},       {0xC0, 0xD6},       {0xD8, 0xF6},
    {0xF8, 0x1BA},      {0x1BC, 0x1BF},     {0x1C4, 0x293},     {0x295, 0x2AF},     {0x370, 0x373},
    {0x376, 0x376},     {0x377, 0x377},     {0x37B, 0x37D},     {0x37F, 0x37F},     {0x386, 0x386},
    {0x388, 0x38A},     {0x38C, 0x38C},     {0x38E, 0x3A1},     {0x3A3, 0x3F5},     {0x3F7, 0x481},
    {0x48A, 0x52F},     {0x531, 0x556},     {0x10A0, 0x10C5},   {0x13A0, 0x13F5},   {0x13F8, 0x13FD},
    {0x1C90, 0x1CBA},   {0x1CBD, 0x1CBF},   {0x1D00, 0x1D2B},   {0x1D6B, 0x1D77},   {0x1D79, 0x1D9A},
    {0x1E00, 0x1F15},   {0x1F18, 0x1F1D},   {0x1F20, 0x1F45},   {0x1F48, 0x1F4D},   {0x1F50, 0x1F57},
    {0x1F59, 0x1F59},   {0x1F5B, 0x1F5B},   {0x1F5D, 0x1F5D},   {0x1F5F, 0x1F7D},   {0x1F80, 0x1FB4},
    {0x1FB6, 0x1FBC},   {0x1FBE, 0x1FBE},   {0x1FC2, 0x1FC4},   {0x1FC6, 0x1FCC},   {0x1FD0, 0x1FD3},
    {0x1FD6, 0x1FDB},   {0x1FE0, 0x1FEC},   {0x1FF2, 0x1FF4},   {0x1FF6, 0x1FFC},   {0x2102, 0x2102},
    {0x2107, 0x2107},   {0x210A, 0x2113},   {0x2115, 0x2115},   {0x2119, 0x211D},   {0x2124, 0x2124},
    {0x2126, 0x2126},   {0x2128, 0x2128},   {0x212A, 0x212D},   {0x212F, 0x2134},   {0x2139, 0x2139},
    {0x213C, 0x213F},   {0x2145, 0x2149},   {0x214E, 0x214E},   {0x2183, 0x2183},   {0x2184, 0x2184},
    {0x2C00, 0x2C7B},   {0x2C7E, 0x2CE4},   {0x2CEB, 0x2CEE},   {0x2CF2, 0x2CF2},   {0x2CF3, 0x2CF3},
    {0xA640, 0xA66D},   {0xA680, 0xA69B},   {0xA722, 0xA76F},   {0xA771, 0xA787},   {0xA78B, 0xA78E},
    {0xAB70, 0xABBF},   {0xFB00, 0xFB06},   {0xFB13, 0xFB17},   {0xFF21, 0xFF3A},   {0xFF41, 0xFF5A},
    {0x10400, 0x1044F}, {0x104B0, 0x104D3}, {0x104D8, 0x104FB}, {0x10C80, 0x10CB2}, {0x10CC0, 0x10CF2},
    {0x118A0, 0x118DF}, {0x1E900, 0x1E943},
};

bool InRanges(std::span<const Range> ranges, uint32_t c) {
  const auto it = std::upper_bound(ranges.begin(), ranges.end(), c,
                                   [](uint32_t v, const Range& r) { return v < r.first; });
  return it != ranges.begin() && c <= std::prev(it)->last;
}

bool IsCasedLetter(ClassedChar c) { return InRanges(kCasedLetters, c.code_point()); }
bool IsAnyLetter(ClassedChar c) { return c.Is(kLetter); }
bool IsAnyPunctuation(ClassedChar c) { return c.Is(kPunctuation); }
bool IsNumber(ClassedChar c) { return c.Is(kNumber); }

// [!-/:-~！-／：-～‘-‟　-。]
bool IsWidePunctuation(ClassedChar c) {
  static constexpr Range kRanges[] = {{0x21, 0x2F},     {0x3A, 0x7E},     {0x2018, 0x201F},
                                      {0x3000, 0x3002}, {0xFF01, 0xFF0F}, {0xFF1A, 0xFF5E}};
  return InRanges(kRanges, c.code_point());
}

// [一-龥ࠀ-一가-퟿]
bool IsEastAsian(ClassedChar c) {
  static constexpr Range kRanges[] = {{0x800, 0x9FA5}, {0xAC00, 0xD7FF}};
  return InRanges(kRanges, c.code_point());
}

// One expression of a list.
struct Stage {
  enum Kind { kOneNewline, kRun, kSpacedRun, kTrailingSpace, kOne } kind;
  bool (*member)(ClassedChar) = nullptr;  // X in kRun: X+, kSpacedRun: \s?X+, kOne: X
};

void Split(Chars s, size_t begin, size_t end, std::span<const Stage> stages, std::vector<uint32_t>* ends) {
  if (begin == end) return;
  if (stages.empty()) {
    ends->push_back(static_cast<uint32_t>(end));
    return;
  }
  const Stage& stage = stages.front();
  const auto rest = stages.subspan(1);
  size_t trailing = end;  // where the spaces at the end of the stretch begin
  if (stage.kind == Stage::kTrailingSpace) {
    while (trailing > begin && s[trailing - 1].Is(kSpace)) --trailing;
  }
  const auto match = [&](size_t i) {
    size_t k = i;
    switch (stage.kind) {
      case Stage::kOneNewline:
        return s[i].Is(kNewline) ? i + 1 : i;
      case Stage::kOne:
        return stage.member(s[i]) ? i + 1 : i;
      case Stage::kTrailingSpace:
        return i == trailing ? end : i;
      case Stage::kSpacedRun:
        if (s[i].Is(kSpace) && i + 1 < end && stage.member(s[i + 1])) k = i + 1;
        [[fallthrough]];
      case Stage::kRun:
        while (k < end && stage.member(s[k])) ++k;
        return k;
    }
    return i;
  };
  size_t gap = begin;
  for (size_t i = begin; i < end;) {
    const size_t matched = match(i);
    if (matched == i) {
      ++i;
      continue;
    }
    Split(s, gap, i, rest, ends);
    Split(s, i, matched, rest, ends);
    i = gap = matched;
  }
  Split(s, gap, end, rest, ends);
}

}  // namespace

void DeepSeekLlm(Chars chars, std::vector<uint32_t>* ends) {
  static constexpr Stage kStages[] = {
      {Stage::kOneNewline},    {Stage::kSpacedRun, IsCasedLetter}, {Stage::kSpacedRun, IsWidePunctuation},
      {Stage::kTrailingSpace}, {Stage::kRun, IsEastAsian},         {Stage::kRun, IsNumber}};
  Split(chars, 0, chars.size(), kStages, ends);
}

void DeepSeekCoder(Chars chars, std::vector<uint32_t>* ends) {
  static constexpr Stage kStages[] = {{Stage::kOneNewline},
                                      {Stage::kSpacedRun, IsAnyLetter},
                                      {Stage::kSpacedRun, IsAnyPunctuation},
                                      {Stage::kRun, IsEastAsian},
                                      {Stage::kOne, IsNumber}};
  Split(chars, 0, chars.size(), kStages, ends);
}

}  // namespace tandem::tokenizer
