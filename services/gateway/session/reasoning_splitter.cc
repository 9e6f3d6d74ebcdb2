#include "services/gateway/session/reasoning_splitter.h"

#include <algorithm>

namespace tandem::gateway {
namespace {

constexpr std::string_view kOpen = "<think>";
constexpr std::string_view kClose = "</think>";
constexpr std::string_view kSpace = " \t\r\n";

// Length of the longest end of `text` that is a beginning of `tag`, the whole tag excluded.
size_t TagBeginning(std::string_view text, std::string_view tag) {
  for (size_t length = std::min(tag.size() - 1, text.size()); length > 0; --length) {
    if (text.substr(text.size() - length) == tag.substr(0, length)) return length;
  }
  return 0;
}

}  // namespace

SplitText ReasoningSplitter::Push(std::string_view text) {
  SplitText out;
  held_.append(text);
  Step(out, /*at_end=*/false);
  return out;
}

SplitText ReasoningSplitter::Flush() {
  SplitText out;
  Step(out, /*at_end=*/true);
  return out;
}

void ReasoningSplitter::Step(SplitText& out, bool at_end) {
  if (state_ == State::kStart) {
    const std::string_view rest =
        std::string_view(held_).substr(std::min(held_.find_first_not_of(kSpace), held_.size()));
    if (rest.starts_with(kOpen)) {
      held_.erase(0, held_.size() - rest.size() + kOpen.size());
      state_ = State::kReasoning;
    } else if (!at_end && kOpen.starts_with(rest)) {
      return;  // nothing yet, white space, or the beginning of the tag
    } else {
      state_ = starts_in_reasoning_ ? State::kReasoning : State::kAnswer;
    }
  }
  if (state_ == State::kReasoning) {
    const size_t close = held_.find(kClose);
    const bool closed = close != std::string::npos;
    size_t end = closed ? close : held_.size();
    if (!closed && !at_end) end -= TagBeginning(held_, kClose);
    size_t begin = 0;
    if (!reasoning_begun_) begin = std::min(held_.find_first_not_of(kSpace), end);
    // White space at the end waits: it is given out when more reasoning follows.
    size_t trimmed = end;
    while (trimmed > begin && kSpace.find(held_[trimmed - 1]) != std::string_view::npos) --trimmed;
    if (trimmed > begin) {
      out.reasoning.append(held_, begin, trimmed - begin);
      reasoning_begun_ = true;
    }
    if (closed) {
      held_.erase(0, close + kClose.size());
      state_ = State::kAnswerStart;
    } else if (at_end) {
      held_.clear();
    } else {
      held_.erase(0, std::max(trimmed, begin));
    }
  }
  if (state_ == State::kAnswerStart) {
    held_.erase(0, std::min(held_.find_first_not_of(kSpace), held_.size()));
    if (!held_.empty()) state_ = State::kAnswer;
  }
  if (state_ == State::kAnswer) {
    out.content.append(held_);
    held_.clear();
  }
}

}  // namespace tandem::gateway
