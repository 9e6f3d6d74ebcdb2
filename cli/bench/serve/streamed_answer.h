// One streamed answer as it comes: its text, its times, and whether it is what was asked for.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/util/sse.h"

namespace tandem::cli {

struct ExpectedAnswer {
  bool chat = false;
  int64_t max_tokens = 0;
  bool exact = false;         // it must go on to max_tokens (ignore_eos)
  int64_t prompt_tokens = 0;  // that were sent; a server may put one (BOS) before; 0: not known
};

// What is wrong with an answer. `kind` has few values and serves to count: "malformed stream", "error event",
// "cut off", "wrong usage", "wrong end".
struct Fault {
  std::string kind;
  std::string detail;
};

// Not thread-safe.
class StreamedAnswer {
 public:
  using Clock = std::chrono::steady_clock;

  explicit StreamedAnswer(const ExpectedAnswer& expected);
  StreamedAnswer(const StreamedAnswer&) = delete;

  // Bytes of the event stream, cut anywhere, and when they came.
  void Feed(std::string_view piece, Clock::time_point now);
  // After the last byte; `whole`: the response ended as HTTP wants it. nullopt: the answer is as it must be.
  std::optional<Fault> Finish(bool whole);

  // Reasoning and answer in the order in which they came.
  const std::string& text() const { return text_; }
  // Of the first and the last piece of text (of the end, where there was no text).
  std::optional<Clock::time_point> first() const { return first_; }
  std::optional<Clock::time_point> last() const { return last_; }
  // Seconds between pieces of text; a server sends one a token, mostly.
  const std::vector<float>& gaps() const { return gaps_; }
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t cached_tokens() const { return cached_tokens_; }
  int64_t completion_tokens() const { return completion_tokens_; }

 private:
  void OnEvent(const std::string& data);
  void Fail(std::string kind, std::string detail);
  void Moment();
  void CheckCounts();

  const ExpectedAnswer expected_;
  SseReader reader_;
  Clock::time_point now_;
  std::optional<Fault> fault_;  // the first one
  std::optional<Clock::time_point> first_, last_;
  std::vector<float> gaps_;
  std::string text_;
  std::string id_;
  std::string finish_;
  int64_t pieces_ = 0;
  bool done_ = false;
  bool usage_ = false;
  int64_t prompt_tokens_ = 0;
  int64_t cached_tokens_ = 0;
  int64_t completion_tokens_ = 0;
};

}  // namespace tandem::cli
