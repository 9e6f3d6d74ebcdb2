// Answers in OpenAI's shapes, as JSON text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "services/gateway/session/generation.h"
#include "services/gateway/session/model_context.h"

namespace tandem::gateway {

// What every object of one answer carries.
struct AnswerHead {
  bool chat = true;  // or a text completion
  std::string id;
  int64_t created = 0;
  std::string model;
  std::string fingerprint;
};

struct UsageCounts {
  uint64_t prompt_tokens = 0;
  uint64_t cached_tokens = 0;
  uint64_t completion_tokens = 0;
  uint64_t reasoning_tokens = 0;
};

// One choice of an answer that is not streamed.
struct Choice {
  std::string reasoning;
  std::string content;  // for a text completion: all of its text, the echo included
  std::vector<TokenInfo> tokens;
  Finish finish = Finish::kStop;
};

std::string FormatAnswer(const AnswerHead& head, const std::vector<Choice>& choices, const UsageCounts& usage,
                         bool logprobs, const tokenizer::Tokenizer& tokenizer);

// Chunks of a stream. The first of a chat's choice says the role. `usage`: does every chunk carry
// "usage": null?
std::string FormatRoleChunk(const AnswerHead& head, int index, bool usage);
std::string FormatDeltaChunk(const AnswerHead& head, int index, const Delta& delta, bool logprobs, bool usage,
                             const tokenizer::Tokenizer& tokenizer);
std::string FormatFinishChunk(const AnswerHead& head, int index, Finish finish, bool usage);
std::string FormatUsageChunk(const AnswerHead& head, const UsageCounts& usage);

// "data: ...\n\n"
std::string SseEvent(std::string_view json);
inline constexpr std::string_view kSseDone = "data: [DONE]\n\n";

}  // namespace tandem::gateway
