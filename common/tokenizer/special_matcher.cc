#include "common/tokenizer/special_matcher.h"

namespace tandem::tokenizer {

int32_t SpecialMatcher::Child(int32_t node, unsigned char byte) const {
  if (node == 0) return roots_[byte];
  int32_t child = nodes_[node].child;
  while (child >= 0 && nodes_[child].byte != byte) child = nodes_[child].sibling;
  return child;
}

void SpecialMatcher::Add(std::string_view spelling, int32_t id) {
  int32_t node = 0;
  for (const char ch : spelling) {
    const auto byte = static_cast<unsigned char>(ch);
    int32_t child = Child(node, byte);
    if (child < 0) {
      child = static_cast<int32_t>(nodes_.size());
      nodes_.push_back(Node{.id = -1, .child = -1, .sibling = nodes_[node].child, .byte = byte});
      nodes_[node].child = child;
      if (node == 0) roots_[byte] = child;
    }
    node = child;
  }
  if (nodes_[node].id < 0) nodes_[node].id = id;
}

SpecialMatcher::Match SpecialMatcher::MatchAt(std::string_view text, size_t pos, bool* partial) const {
  Match best{pos, pos, -1};
  int32_t node = 0;
  size_t i = pos;
  for (; i < text.size(); ++i) {
    node = Child(node, static_cast<unsigned char>(text[i]));
    if (node < 0) break;
    if (nodes_[node].id >= 0) best = Match{pos, i + 1, nodes_[node].id};
  }
  if (partial != nullptr) *partial = i == text.size() && i > pos && node >= 0 && nodes_[node].child >= 0;
  return best;
}

SpecialMatcher::Match SpecialMatcher::Find(std::string_view text, size_t from) const {
  for (size_t i = from; i < text.size(); ++i) {
    if (roots_[static_cast<unsigned char>(text[i])] < 0) continue;
    const Match match = MatchAt(text, i, nullptr);
    if (match.id >= 0) return match;
  }
  return Match{text.size(), text.size(), -1};
}

}  // namespace tandem::tokenizer
