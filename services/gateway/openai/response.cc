#include "services/gateway/openai/response.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "common/tokenizer/tokenizer.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

const char* FinishName(Finish finish) { return finish == Finish::kStop ? "stop" : "length"; }

std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

// JSON knows no infinity.
double Finite(float logprob) { return std::isfinite(logprob) ? std::max(logprob, -9999.0f) : -9999.0; }

Json Root(const AnswerHead& head, bool chunk) {
  Json root;
  root["id"] = head.id;
  root["object"] = !head.chat ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
  root["created"] = head.created;
  root["model"] = head.model;
  root["system_fingerprint"] = head.fingerprint;
  root["choices"] = Json::array();
  return root;
}

Json UsageJson(const UsageCounts& usage) {
  Json json;
  json["prompt_tokens"] = usage.prompt_tokens;
  json["completion_tokens"] = usage.completion_tokens;
  json["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  json["prompt_tokens_details"]["cached_tokens"] = usage.cached_tokens;
  json["completion_tokens_details"]["reasoning_tokens"] = usage.reasoning_tokens;
  return json;
}

std::string TokenText(const tokenizer::Tokenizer& tokenizer, int32_t token) {
  return tokenizer::SanitizeUtf8(tokenizer.TokenBytes(token));
}

Json ChatToken(const tokenizer::Tokenizer& tokenizer, int32_t token, float logprob) {
  Json json;
  json["token"] = TokenText(tokenizer, token);
  json["logprob"] = Finite(logprob);
  json["bytes"] = Json::array();
  for (const char c : tokenizer.TokenBytes(token)) json["bytes"].push_back(static_cast<unsigned char>(c));
  return json;
}

// The content's tokens, and in a list of their own (as in DeepSeek's API) those of reasoning.
Json ChatLogprobs(const tokenizer::Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens) {
  Json json;
  json["content"] = Json::array();
  for (const TokenInfo& info : tokens) {
    const char* list = info.reasoning ? "reasoning_content" : "content";
    Json token = ChatToken(tokenizer, info.token, info.logprob);
    token["top_logprobs"] = Json::array();
    for (const TokenLogprob& top : info.top) {
      token["top_logprobs"].push_back(ChatToken(tokenizer, top.token, top.logprob));
    }
    json[list].push_back(std::move(token));
  }
  json["refusal"] = nullptr;
  return json;
}

// Names of tokens are keys here: one that is no text by itself is spelled as OpenAI does, bytes:\xf0\x9f.
std::string TokenName(const tokenizer::Tokenizer& tokenizer, int32_t token) {
  const std::string_view bytes = tokenizer.TokenBytes(token);
  std::string text = tokenizer::SanitizeUtf8(bytes);
  if (text == bytes) return text;
  std::string name = "bytes:";
  constexpr char kDigits[] = "0123456789abcdef";
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    name += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return name;
}

Json TextLogprobs(const tokenizer::Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens) {
  Json json;
  for (const char* name : {"tokens", "token_logprobs", "top_logprobs", "text_offset"})
    json[name] = Json::array();
  for (const TokenInfo& info : tokens) {
    json["tokens"].push_back(TokenName(tokenizer, info.token));
    json["token_logprobs"].push_back(Finite(info.logprob));
    Json top = Json::object();
    for (const TokenLogprob& one : info.top) top[TokenName(tokenizer, one.token)] = Finite(one.logprob);
    // The token itself is always there, if it is not among the likeliest as one more.
    top[TokenName(tokenizer, info.token)] = Finite(info.logprob);
    json["top_logprobs"].push_back(std::move(top));
    json["text_offset"].push_back(info.text_offset);
  }
  return json;
}

std::string ChunkText(const AnswerHead& head, Json choice, bool usage) {
  Json root = Root(head, /*chunk=*/true);
  root["choices"].push_back(std::move(choice));
  if (usage) root["usage"] = nullptr;
  return Dump(root);
}

}  // namespace

std::string FormatAnswer(const AnswerHead& head, const std::vector<Choice>& choices, const UsageCounts& usage,
                         bool logprobs, const tokenizer::Tokenizer& tokenizer) {
  Json root = Root(head, /*chunk=*/false);
  for (size_t i = 0; i < choices.size(); ++i) {
    const Choice& from = choices[i];
    Json choice;
    choice["index"] = i;
    if (head.chat) {
      Json message;
      message["role"] = "assistant";
      message["content"] = from.content;
      if (!from.reasoning.empty()) message["reasoning_content"] = from.reasoning;
      message["refusal"] = nullptr;
      choice["message"] = std::move(message);
      choice["logprobs"] = logprobs ? ChatLogprobs(tokenizer, from.tokens) : Json(nullptr);
    } else {
      choice["text"] = from.content;
      choice["logprobs"] = logprobs ? TextLogprobs(tokenizer, from.tokens) : Json(nullptr);
    }
    choice["finish_reason"] = FinishName(from.finish);
    root["choices"].push_back(std::move(choice));
  }
  root["usage"] = UsageJson(usage);
  return Dump(root);
}

std::string FormatRoleChunk(const AnswerHead& head, int index, bool usage) {
  Json choice;
  choice["index"] = index;
  choice["delta"] = {{"role", "assistant"}, {"content", ""}};
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = nullptr;
  return ChunkText(head, std::move(choice), usage);
}

std::string FormatDeltaChunk(const AnswerHead& head, int index, const Delta& delta, bool logprobs, bool usage,
                             const tokenizer::Tokenizer& tokenizer) {
  Json choice;
  choice["index"] = index;
  if (head.chat) {
    Json part = Json::object();
    if (!delta.reasoning.empty()) part["reasoning_content"] = delta.reasoning;
    if (!delta.content.empty()) part["content"] = delta.content;
    choice["delta"] = std::move(part);
    choice["logprobs"] = logprobs ? ChatLogprobs(tokenizer, delta.tokens) : Json(nullptr);
  } else {
    choice["text"] = delta.content;
    choice["logprobs"] = logprobs ? TextLogprobs(tokenizer, delta.tokens) : Json(nullptr);
  }
  choice["finish_reason"] = nullptr;
  return ChunkText(head, std::move(choice), usage);
}

std::string FormatFinishChunk(const AnswerHead& head, int index, Finish finish, bool usage) {
  Json choice;
  choice["index"] = index;
  if (head.chat) {
    choice["delta"] = Json::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = FinishName(finish);
  return ChunkText(head, std::move(choice), usage);
}

std::string FormatUsageChunk(const AnswerHead& head, const UsageCounts& usage) {
  Json root = Root(head, /*chunk=*/true);
  root["usage"] = UsageJson(usage);
  return Dump(root);
}

std::string SseEvent(std::string_view json) {
  std::string event = "data: ";
  event.append(json).append("\n\n");
  return event;
}

}  // namespace tandem::gateway
