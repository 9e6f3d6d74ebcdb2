// One answer of /v1/chat/completions as it streams: the text apart from the reasoning, token counts, timing.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/util/sse.h"

namespace tandem::cli {

struct ChatMessage {
  std::string role;
  std::string content;
};

struct ChatParameters {
  std::string model;
  double temperature = -1;  // below 0: not sent
  double top_p = -1;
  int64_t seed = -1;
  int64_t max_tokens = 0;  // 0: not sent
};

// The request's JSON: streamed, with usage.
std::string ChatRequest(const std::vector<ChatMessage>& messages, const ChatParameters& parameters);

// The message of an OpenAI-shaped error; the body itself, shortened, if it is none.
std::string ErrorMessage(const std::string& body);

class AnswerStream {
 public:
  enum class Part { kReasoning, kAnswer };
  using Clock = std::chrono::steady_clock;

  explicit AnswerStream(std::function<void(Part, const std::string& text)> on_text);

  void Feed(std::string_view piece);  // bytes of the event stream

  const std::string& answer() const { return answer_; }
  const std::string& finish_reason() const { return finish_reason_; }  // "stop", "length"; empty: cut off
  const std::string& error() const { return error_; }                  // empty: none
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t completion_tokens() const { return completion_tokens_; }

  // "128 tokens, 512.3 tokens/s; prompt 24 tokens, first token after 0.05 s". Speed: tokens after the first
  // by the time from the first to the last.
  std::string Speed() const;

 private:
  void OnEvent(const std::string& data);

  std::function<void(Part, const std::string&)> on_text_;
  SseReader reader_;
  std::string answer_;
  std::string finish_reason_;
  std::string error_;
  int64_t prompt_tokens_ = 0;
  int64_t completion_tokens_ = 0;
  Clock::time_point begin_;
  std::optional<Clock::time_point> first_, last_;
};

}  // namespace tandem::cli
