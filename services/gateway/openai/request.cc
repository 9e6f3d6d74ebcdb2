#include "services/gateway/openai/request.h"

#include <charconv>
#include <limits>

#include "absl/strings/str_cat.h"
#include "services/gateway/openai/fields.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxTokensField = std::numeric_limits<int32_t>::max();
constexpr size_t kMaxMessages = 16384;

std::string Indexed(std::string_view name, size_t index) {
  return absl::StrCat(std::string(name), "[", index, "]");
}

void ParseStop(Fields& fields, CommonRequest* out) {
  const Json* stop = fields.Find("stop");
  if (!fields.ok() || stop == nullptr) return;
  if (stop->is_string()) {
    out->stop.push_back(stop->get<std::string>());
  } else if (stop->is_array()) {
    if (stop->size() > kMaxStopStrings) {
      return fields.Fail("stop",
                         absl::StrCat("may hold up to ", kMaxStopStrings, " strings, not ", stop->size()),
                         "out_of_range");
    }
    for (size_t i = 0; i < stop->size(); ++i) {
      if (!(*stop)[i].is_string()) return fields.WrongType(Indexed("stop", i), (*stop)[i], "a string");
      out->stop.push_back((*stop)[i].get<std::string>());
    }
  } else {
    return fields.WrongType("stop", *stop, "a string or an array of strings");
  }
  for (size_t i = 0; i < out->stop.size(); ++i) {
    if (out->stop[i].empty()) {
      return fields.Fail(stop->is_string() ? "stop" : Indexed("stop", i), "must not be an empty string");
    }
    if (out->stop[i].size() > 4096) {
      return fields.Fail(stop->is_string() ? "stop" : Indexed("stop", i),
                         absl::StrCat("may have up to 4096 bytes, not ", out->stop[i].size()),
                         "out_of_range");
    }
  }
}

void ParseLogitBias(Fields& fields, CommonRequest* out) {
  const Json* bias = fields.Object("logit_bias");
  if (bias == nullptr) return;
  for (const auto& [key, value] : bias->items()) {
    int32_t token = -1;
    const auto [end, result] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (result != std::errc() || end != key.data() + key.size() || token < 0) {
      return fields.Fail("logit_bias", absl::StrCat("has the key \"", key, "\", which is no token id"));
    }
    if (!value.is_number()) return fields.WrongType("logit_bias." + key, value, "a number");
    const double amount = value.get<double>();
    if (!(amount >= -100 && amount <= 100)) {
      return fields.Fail("logit_bias." + key, absl::StrCat("must be from -100 to 100, not ", value.dump()),
                         "out_of_range");
    }
    out->sampling.logit_bias[token] = static_cast<float>(amount);
  }
}

void ParseSampling(Fields& fields, const RequestDefaults& defaults, Sampling* out, bool* has_seed) {
  out->temperature = static_cast<float>(fields.Number("temperature", 0, 2).value_or(defaults.temperature));
  const double top_p = fields.Number("top_p", 0, 1).value_or(defaults.top_p);
  out->top_p = top_p <= 0 ? 1e-6f : static_cast<float>(top_p);  // 0: the likeliest token alone
  out->top_k = static_cast<uint32_t>(
      std::max<int64_t>(fields.Int("top_k", -1, kMaxTokensField).value_or(0), 0));  // -1: off, as in vLLM
  // As float32 it must stay below 1, too.
  out->min_p = std::min(static_cast<float>(fields.Number("min_p", 0, 1, /*open_most=*/true).value_or(0)),
                        0x1.fffffep-1f);
  out->presence_penalty = static_cast<float>(fields.Number("presence_penalty", -2, 2).value_or(0));
  out->frequency_penalty = static_cast<float>(fields.Number("frequency_penalty", -2, 2).value_or(0));
  const double repetition = fields.Number("repetition_penalty", 0, 10).value_or(1);
  if (repetition <= 0) return fields.Fail("repetition_penalty", "must be greater than 0", "out_of_range");
  out->repetition_penalty = std::max(static_cast<float>(repetition), std::numeric_limits<float>::min());
  if (const Json* seed = fields.Find("seed"); seed != nullptr && fields.ok()) {
    if (!seed->is_number_integer()) return fields.WrongType("seed", *seed, "an integer");
    out->seed =
        seed->is_number_unsigned() ? seed->get<uint64_t>() : static_cast<uint64_t>(seed->get<int64_t>());
    *has_seed = true;
  }
}

void ParseCommon(Fields& fields, const RequestDefaults& defaults, std::optional<ApiError>* error,
                 CommonRequest* out) {
  out->model = fields.String("model").value_or("");
  out->stream = fields.Bool("stream").value_or(false);
  if (const Json* options = fields.Object("stream_options"); options != nullptr) {
    if (!out->stream) return fields.Fail("stream_options", "is only allowed when 'stream' is true");
    Fields sub(*options, "stream_options", error);
    out->include_usage = sub.Bool("include_usage").value_or(false);
  }
  out->n = static_cast<int>(fields.Int("n", 1, kMaxChoices).value_or(1));
  ParseSampling(fields, defaults, &out->sampling, &out->has_seed);
  ParseStop(fields, out);
  ParseLogitBias(fields, out);
  out->ignore_eos = fields.Bool("ignore_eos").value_or(false);
}

void RefuseResponseFormat(Fields& fields, std::optional<ApiError>* error) {
  const Json* format = fields.Object("response_format");
  if (format == nullptr) return;
  Fields sub(*format, "response_format", error);
  const std::optional<std::string> type = sub.String("type");
  if (!sub.ok()) return;
  if (!type.has_value()) return sub.Fail("type", "is missing", "missing_field");
  if (*type == "text") return;
  sub.Fail("type", absl::StrCat("\"", *type, "\" is not supported by this server; only \"text\" is"),
           "unsupported");
}

void RefuseTools(Fields& fields) {
  for (const char* name : {"tools", "functions"}) {
    const Json* tools = fields.Array(name);
    if (tools != nullptr && !tools->empty()) {
      return fields.Fail(name, "is not supported by this server; describe the tools in the system message",
                         "unsupported");
    }
  }
  const Json* choice = fields.Find("tool_choice");
  if (choice != nullptr && (!choice->is_string() || (*choice != "none" && *choice != "auto"))) {
    fields.Fail("tool_choice", "can only be \"none\" or \"auto\" here, since tools are not supported",
                "unsupported");
  }
}

void ParseContent(Fields& message, const std::string& role, Json* out) {
  const Json* content = message.Find("content");
  if (content == nullptr) {
    if (role != "assistant") return message.Fail("content", "is missing", "missing_field");
    // Templates know "no content" beside tool calls only.
    const Json* calls = message.Find("tool_calls");
    (*out)["content"] = calls != nullptr && calls->is_array() && !calls->empty() ? Json(nullptr) : Json("");
    return;
  }
  if (content->is_string()) {
    (*out)["content"] = *content;
    return;
  }
  if (!content->is_array()) return message.WrongType("content", *content, "a string or an array of parts");
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    const Json& part = (*content)[i];
    const std::string name = Indexed("content", i);
    if (!part.is_object()) return message.WrongType(name, part, "an object");
    const auto type = part.find("type");
    if (type == part.end()) return message.Fail(name + ".type", "is missing", "missing_field");
    if (!type->is_string()) return message.WrongType(name + ".type", *type, "a string");
    if (*type != "text") {
      return message.Fail(name + ".type",
                          absl::StrCat("\"", type->get<std::string>(),
                                       "\" is not supported: this model takes parts of type \"text\" only"),
                          "unsupported");
    }
    const auto value = part.find("text");
    if (value == part.end()) return message.Fail(name + ".text", "is missing", "missing_field");
    if (!value->is_string()) return message.WrongType(name + ".text", *value, "a string");
    text += value->get_ref<const std::string&>();
  }
  (*out)["content"] = std::move(text);
}

void ParseToolCalls(Fields& message, Json* out) {
  const Json* calls = message.Array("tool_calls");
  if (calls == nullptr || calls->empty()) return;
  for (size_t i = 0; i < calls->size(); ++i) {
    const Json& call = (*calls)[i];
    const std::string name = Indexed("tool_calls", i);
    if (!call.is_object()) return message.WrongType(name, call, "an object");
    const auto function = call.find("function");
    if (function == call.end()) return message.Fail(name + ".function", "is missing", "missing_field");
    if (!function->is_object()) return message.WrongType(name + ".function", *function, "an object");
    for (const char* field : {"name", "arguments"}) {
      const auto value = function->find(field);
      const std::string path = name + ".function." + field;
      if (value == function->end()) return message.Fail(path, "is missing", "missing_field");
      if (!value->is_string()) return message.WrongType(path, *value, "a string");
    }
  }
  (*out)["tool_calls"] = *calls;
}

}  // namespace

std::optional<ApiError> ParseMessages(const Json& body, Json* out) {
  std::optional<ApiError> error;
  Fields fields(body, "", &error);
  const Json* messages = fields.Array("messages");
  if (error.has_value()) return error;
  if (messages == nullptr) return BadRequest("'messages' is missing", "messages", "missing_field");
  if (messages->empty()) return BadRequest("'messages' is empty; expected at least one message", "messages");
  if (messages->size() > kMaxMessages) {
    return BadRequest(
        absl::StrCat("'messages' has ", messages->size(), " entries; at most ", kMaxMessages, " are taken"),
        "messages", "out_of_range");
  }
  *out = Json::array();
  for (size_t i = 0; i < messages->size() && !error.has_value(); ++i) {
    const std::string path = Indexed("messages", i);
    if (!(*messages)[i].is_object()) {
      fields.WrongType(path, (*messages)[i], "an object");
      break;
    }
    Fields message((*messages)[i], path, &error);
    std::optional<std::string> role = message.String("role");
    if (error.has_value()) break;
    if (!role.has_value()) {
      message.Fail("role", "is missing", "missing_field");
      break;
    }
    if (*role == "developer") role = "system";
    if (*role != "system" && *role != "user" && *role != "assistant" && *role != "tool") {
      message.Fail("role",
                   absl::StrCat("must be system, developer, user, assistant or tool, not \"", *role, "\""));
      break;
    }
    Json clean = Json::object();
    clean["role"] = *role;
    ParseContent(message, *role, &clean);
    if (*role == "assistant") ParseToolCalls(message, &clean);
    for (const char* name : {"name", "tool_call_id"}) {
      if (std::optional<std::string> value = message.String(name)) clean[name] = std::move(*value);
    }
    out->push_back(std::move(clean));
  }
  return error;
}

std::optional<ApiError> ParseTemplateKwargs(const Json& body, Json* out) {
  std::optional<ApiError> error;
  Fields fields(body, "", &error);
  const Json* kwargs = fields.Object("chat_template_kwargs");
  *out = kwargs == nullptr ? Json(nullptr) : *kwargs;
  return error;
}

std::optional<ApiError> ParseChatRequest(const Json& body, const RequestDefaults& defaults,
                                         ChatRequest* out) {
  std::optional<ApiError> error;
  Fields fields(body, "", &error);
  ParseCommon(fields, defaults, &error, out);
  RefuseResponseFormat(fields, &error);
  RefuseTools(fields);
  const std::optional<int64_t> max_tokens = fields.Int("max_tokens", 1, kMaxTokensField);
  const std::optional<int64_t> max_completion = fields.Int("max_completion_tokens", 1, kMaxTokensField);
  if (max_completion.has_value() || max_tokens.has_value()) {
    out->max_tokens = static_cast<uint32_t>(max_completion.has_value() ? *max_completion : *max_tokens);
  }
  out->logprobs = fields.Bool("logprobs").value_or(false);
  if (const std::optional<int64_t> top = fields.Int("top_logprobs", 0, 20)) {
    if (*top > 0 && !out->logprobs) fields.Fail("top_logprobs", "needs 'logprobs' to be true");
    out->top_logprobs = static_cast<uint32_t>(*top);
  }
  if (error.has_value()) return error;
  if ((error = ParseMessages(body, &out->messages)).has_value()) return error;
  return ParseTemplateKwargs(body, &out->template_kwargs);
}

namespace {

void ParseTokens(Fields& fields, const std::string& name, const Json& list, CompletionRequest* out) {
  CompletionRequest::Tokens tokens;
  tokens.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_number_integer()) return fields.WrongType(Indexed(name, i), list[i], "a token id");
    const bool too_large =
        list[i].is_number_unsigned() && list[i].get<uint64_t>() > uint64_t{kMaxTokensField};
    if (too_large || list[i].get<int64_t>() < 0) {
      return fields.Fail(Indexed(name, i), absl::StrCat("is no token id: ", list[i].dump()), "out_of_range");
    }
    tokens.push_back(list[i].get<int32_t>());
  }
  out->prompts.emplace_back(std::move(tokens));
}

void ParsePrompt(Fields& fields, CompletionRequest* out) {
  const Json* prompt = fields.Find("prompt");
  if (!fields.ok()) return;
  if (prompt == nullptr) return fields.Fail("prompt", "is missing", "missing_field");
  if (prompt->is_string()) {
    out->prompts.emplace_back(prompt->get<std::string>());
    return;
  }
  constexpr std::string_view kExpected = "a string, an array of strings, or an array of token ids";
  if (!prompt->is_array()) return fields.WrongType("prompt", *prompt, kExpected);
  if (prompt->empty()) return fields.Fail("prompt", "is empty");
  if (prompt->front().is_number()) return ParseTokens(fields, "prompt", *prompt, out);
  if (prompt->size() > kMaxChoices) {
    return fields.Fail("prompt",
                       absl::StrCat("may hold up to ", kMaxChoices, " prompts, not ", prompt->size()),
                       "out_of_range");
  }
  for (size_t i = 0; i < prompt->size() && fields.ok(); ++i) {
    const Json& one = (*prompt)[i];
    if (one.is_string()) {
      out->prompts.emplace_back(one.get<std::string>());
    } else if (one.is_array()) {
      ParseTokens(fields, Indexed("prompt", i), one, out);
    } else {
      fields.WrongType(Indexed("prompt", i), one, "a string or an array of token ids");
    }
  }
}

}  // namespace

std::optional<ApiError> ParseCompletionRequest(const Json& body, const RequestDefaults& defaults,
                                               CompletionRequest* out) {
  std::optional<ApiError> error;
  Fields fields(body, "", &error);
  ParseCommon(fields, defaults, &error, out);
  RefuseResponseFormat(fields, &error);
  out->max_tokens = static_cast<uint32_t>(fields.Int("max_tokens", 1, kMaxTokensField).value_or(16));
  out->echo = fields.Bool("echo").value_or(false);
  if (const std::optional<int64_t> logprobs = fields.Int("logprobs", 0, 20)) {
    out->logprobs = true;
    out->top_logprobs = static_cast<uint32_t>(*logprobs);
    if (out->echo) fields.Fail("logprobs", "cannot be had together with 'echo'", "unsupported");
  }
  if (std::optional<std::string> suffix = fields.String("suffix"); suffix.has_value() && !suffix->empty()) {
    fields.Fail("suffix", "is not supported: this model does not fill in the middle", "unsupported");
  }
  if (const std::optional<int64_t> best_of = fields.Int("best_of", 1, kMaxChoices); best_of.has_value()) {
    if (*best_of != out->n) fields.Fail("best_of", "is not supported beyond 'n'", "unsupported");
  }
  ParsePrompt(fields, out);
  if (fields.ok() && out->prompts.size() * static_cast<size_t>(out->n) > size_t{kMaxChoices}) {
    fields.Fail("n",
                absl::StrCat("times the number of prompts may be up to ", kMaxChoices, ", not ",
                             out->prompts.size() * static_cast<size_t>(out->n)),
                "out_of_range");
  }
  return error;
}

}  // namespace tandem::gateway
