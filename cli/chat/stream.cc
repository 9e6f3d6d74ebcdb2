#include "cli/chat/stream.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/util/format.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

// The string at `key`, "" if it is absent or something else.
std::string TextAt(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string();
}

int64_t CountAt(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number_integer() ? it->get<int64_t>() : 0;
}

}  // namespace

std::string ChatRequest(const std::vector<ChatMessage>& messages, const ChatParameters& parameters) {
  json list = json::array();
  for (const ChatMessage& message : messages) {
    list.push_back({{"role", message.role}, {"content", message.content}});
  }
  json request = {{"messages", list}, {"stream", true}, {"stream_options", {{"include_usage", true}}}};
  if (!parameters.model.empty()) request["model"] = parameters.model;
  if (parameters.temperature >= 0) request["temperature"] = parameters.temperature;
  if (parameters.top_p >= 0) request["top_p"] = parameters.top_p;
  if (parameters.seed >= 0) request["seed"] = parameters.seed;
  if (parameters.max_tokens > 0) request["max_tokens"] = parameters.max_tokens;
  // What a terminal sends need not be UTF-8; broken bytes become U+FFFD.
  return request.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string ErrorMessage(const std::string& body) {
  const json reply = json::parse(body, nullptr, false);
  if (reply.is_object()) {
    const auto error = reply.find("error");
    if (error != reply.end() && error->is_object()) {
      if (const std::string message = TextAt(*error, "message"); !message.empty()) return Printable(message);
    }
    if (error != reply.end() && error->is_string()) return Printable(error->get<std::string>());
  }
  return body.empty() ? "no message" : Printable(body.substr(0, 300));
}

AnswerStream::AnswerStream(std::function<void(Part, const std::string&)> on_text)
    : on_text_(std::move(on_text)),
      reader_([this](const std::string& data) { OnEvent(data); }),
      begin_(Clock::now()) {}

void AnswerStream::Feed(std::string_view piece) { reader_.Feed(piece); }

void AnswerStream::OnEvent(const std::string& data) {
  if (data == "[DONE]") return;
  const json event = json::parse(data, nullptr, false);
  if (!event.is_object()) {
    error_ = "the server sent an event that is no JSON object: " + Printable(data.substr(0, 100));
    return;
  }
  if (event.contains("error")) {
    error_ = ErrorMessage(data);
    return;
  }
  if (const auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
    prompt_tokens_ = CountAt(*usage, "prompt_tokens");
    completion_tokens_ = CountAt(*usage, "completion_tokens");
  }
  const auto choices = event.find("choices");
  if (choices == event.end() || !choices->is_array() || choices->empty() || !choices->front().is_object())
    return;
  const json& choice = choices->front();
  if (const std::string reason = TextAt(choice, "finish_reason"); !reason.empty()) finish_reason_ = reason;
  const auto delta = choice.find("delta");
  if (delta == choice.end() || !delta->is_object()) return;
  for (const auto& [part, key] :
       {std::pair{Part::kReasoning, "reasoning_content"}, {Part::kAnswer, "content"}}) {
    const std::string text = TextAt(*delta, key);
    if (text.empty()) continue;
    last_ = Clock::now();
    if (!first_) first_ = last_;
    if (part == Part::kAnswer) answer_ += text;
    on_text_(part, text);
  }
}

std::string AnswerStream::Speed() const {
  if (!first_ || completion_tokens_ == 0) return "no tokens";
  const std::chrono::duration<double> waited = *first_ - begin_;
  const std::chrono::duration<double> streamed = *last_ - *first_;
  char text[160];
  if (completion_tokens_ > 1 && streamed.count() > 0) {
    std::snprintf(text, sizeof text,
                  "%lld tokens, %.1f tokens/s; prompt %lld tokens, first text after %.2f s",
                  static_cast<long long>(completion_tokens_),
                  static_cast<double>(completion_tokens_ - 1) / streamed.count(),
                  static_cast<long long>(prompt_tokens_), waited.count());
  } else {
    std::snprintf(text, sizeof text, "%lld tokens; prompt %lld tokens, first text after %.2f s",
                  static_cast<long long>(completion_tokens_), static_cast<long long>(prompt_tokens_),
                  waited.count());
  }
  return text;
}

}  // namespace tandem::cli
