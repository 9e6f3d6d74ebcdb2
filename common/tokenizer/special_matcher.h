// Finds the special tokens in a text: leftmost first, of those that begin at one place the longest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace tandem::tokenizer {

// A trie over bytes. Built once, then read-only. The spellings are bounded (kMaxSpelling), so a search is
// linear in the text.
class SpecialMatcher {
 public:
  static constexpr size_t kMaxSpelling = 256;  // bytes of a special token

  struct Match {
    size_t begin = 0;
    size_t end = 0;  // end == begin: none
    int32_t id = -1;
  };

  SpecialMatcher() : nodes_(1) {}
  // `spelling` is neither empty nor longer than kMaxSpelling.
  void Add(std::string_view spelling, int32_t id);
  // The first match at or after `from`.
  Match Find(std::string_view text, size_t from) const;
  // The longest token that begins at `pos`. `*partial` (may be null): the text ends within a longer or a
  // first one.
  Match MatchAt(std::string_view text, size_t pos, bool* partial) const;

 private:
  struct Node {
    int32_t id = -1;
    int32_t child = -1;    // first child
    int32_t sibling = -1;  // next child of the same parent
    unsigned char byte = 0;
  };
  int32_t Child(int32_t node, unsigned char byte) const;

  std::vector<Node> nodes_;
  std::array<int32_t, 256> roots_ = [] {
    std::array<int32_t, 256> a{};
    a.fill(-1);
    return a;
  }();
};

}  // namespace tandem::tokenizer
