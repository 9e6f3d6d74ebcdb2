// The bodies of POST /v1/chat/completions and /v1/completions, checked, in terms of this gateway.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "services/gateway/openai/api_error.h"
#include "services/gateway/session/generation.h"

namespace tandem::gateway {

struct RequestDefaults {
  float temperature = 0.6f;  // what DeepSeek recommends for R1
  float top_p = 0.95f;
};

inline constexpr int kMaxChoices = 32;  // prompts x n of one request
inline constexpr size_t kMaxStopStrings = 16;

// What both endpoints share.
struct CommonRequest {
  std::string model;  // empty: the one that is served
  bool stream = false;
  bool include_usage = false;  // stream_options.include_usage
  int n = 1;
  Sampling sampling;  // seed: see has_seed
  bool has_seed = false;
  std::optional<uint32_t> max_tokens;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool logprobs = false;
  uint32_t top_logprobs = 0;
};

struct ChatRequest : CommonRequest {
  nlohmann::ordered_json messages;         // role and content (a string, or null), tool_calls, ...
  nlohmann::ordered_json template_kwargs;  // null or an object
};

struct CompletionRequest : CommonRequest {
  using Tokens = std::vector<int32_t>;
  std::vector<std::variant<std::string, Tokens>> prompts;  // at least one
  bool echo = false;
};

// Each takes a parsed body (an object) and fills `out`, or says what is wrong with it. Unknown fields are let
// pass.
std::optional<ApiError> ParseChatRequest(const nlohmann::ordered_json& body, const RequestDefaults& defaults,
                                         ChatRequest* out);
std::optional<ApiError> ParseCompletionRequest(const nlohmann::ordered_json& body,
                                               const RequestDefaults& defaults, CompletionRequest* out);

// `messages` alone, as /apply-template takes it: checked, content parts joined, "developer" turned into
// "system".
std::optional<ApiError> ParseMessages(const nlohmann::ordered_json& body, nlohmann::ordered_json* out);
// `chat_template_kwargs`: null or an object.
std::optional<ApiError> ParseTemplateKwargs(const nlohmann::ordered_json& body, nlohmann::ordered_json* out);

}  // namespace tandem::gateway
