// Tells a model's reasoning (the text inside <think>...</think>) from its answer, in a stream of text.
#pragma once

#include <string>
#include <string_view>

namespace tandem::gateway {

struct SplitText {
  std::string reasoning;
  std::string content;
};

// One stream each; not thread-safe.
//
// The reasoning is what stands between <think> and </think>, if the prompt ended inside <think> or the text
// begins with it (white space before it is let pass); both at once are one. A <think> later on is text like
// any other. The reasoning comes without white space at its ends, the answer after it without white space at
// its beginning; an answer without reasoning comes as it is. Without </think> all is reasoning.
class ReasoningSplitter {
 public:
  explicit ReasoningSplitter(bool starts_in_reasoning) : starts_in_reasoning_(starts_in_reasoning) {}

  SplitText Push(std::string_view text);
  SplitText Flush();

  bool in_reasoning() const {
    return state_ == State::kReasoning || (state_ == State::kStart && starts_in_reasoning_);
  }
  // Text of the answer has begun, or would begin if what comes next is no tag.
  bool in_answer() const {
    return state_ == State::kAnswer || (state_ == State::kStart && !starts_in_reasoning_);
  }

 private:
  enum class State { kStart, kReasoning, kAnswerStart, kAnswer };
  void Step(SplitText& out, bool at_end);

  const bool starts_in_reasoning_;
  State state_ = State::kStart;
  bool reasoning_begun_ = false;  // something other than white space was given out
  std::string held_;
};

}  // namespace tandem::gateway
