#include "common/tokenizer/chat_template.h"

#include <algorithm>
#include <bitset>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/tokenizer/jinja/template.h"
#include "common/tokenizer/special_matcher.h"
#include "common/tokenizer/tokenizer.h"
#include "common/tokenizer/unicode.h"
#include "nlohmann/json.hpp"

namespace tandem::tokenizer {
namespace {

using Json = nlohmann::ordered_json;

// For files without a template: system text first, then the turns between DeepSeek's marks, reasoning of
// earlier turns left out.
constexpr std::string_view kBuiltIn =
    "{{ bos_token }}"
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{{ '' if loop.last else '\\n\\n' }}{% "
    "endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'tool' %}{{ '<｜User｜>' ~ m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' ~ (m.content or '').split('</think>')[-1] ~ "
    "eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}";

// The private use area and the noncharacters: one that a conversation does not use marks its control tokens.
constexpr uint32_t kFirstMarker = 0xE000;
constexpr uint32_t kLastMarker = 0xF8FF;
constexpr size_t kMarkers = kLastMarker - kFirstMarker + 1;

// Ticks off the code points of the private use area that occur in `text`.
void NoteUsed(std::string_view text, std::bitset<kMarkers>* used) {
  for (size_t i = text.find_first_of("\xEE\xEF"); i != std::string_view::npos;
       i = text.find_first_of("\xEE\xEF", i + 1)) {
    size_t length;
    const uint32_t c = DecodeUtf8(text, i, &length);
    if (c >= kFirstMarker && c <= kLastMarker) used->set(c - kFirstMarker);
  }
}

constexpr int kMaxDepth = 200;

bool NoteUsed(const Json& json, int depth, std::bitset<kMarkers>* used) {
  if (depth > kMaxDepth) return false;
  if (json.is_string()) {
    NoteUsed(json.get_ref<const std::string&>(), used);
  } else if (json.is_structured()) {
    for (auto it = json.begin(); it != json.end(); ++it) {
      if (json.is_object()) NoteUsed(it.key(), used);
      if (!NoteUsed(it.value(), depth + 1, used)) return false;
    }
  }
  return true;
}

void RemoveAll(std::string_view what, std::string* text) {
  std::string out;
  size_t from = 0;
  for (size_t at = text->find(what); at != std::string::npos; at = text->find(what, from)) {
    out.append(*text, from, at - from);
    from = at + what.size();
  }
  out.append(*text, from);
  *text = std::move(out);
}

}  // namespace

struct ChatTemplate::Marks {
  SpecialMatcher control;              // what a template may spell and a message may not
  SpecialMatcher control_and_defined;  // for the words of users and tools: <think> as well

  // `text` with the marker inside of each token of `matcher`, and inside of what could become one at its end.
  static std::string Mark(const std::string& text, const SpecialMatcher& matcher, std::string_view marker) {
    std::string out;
    for (size_t i = 0; i < text.size();) {
      size_t length;
      DecodeUtf8(text, i, &length);
      bool partial = false;
      const bool found = matcher.MatchAt(text, i, &partial).id >= 0;
      out.append(text, i, length);
      if (found || partial) out.append(marker);
      i += length;
    }
    return out;
  }

  static Json MarkAll(const Json& json, const SpecialMatcher& matcher, std::string_view marker) {
    if (json.is_string()) return Mark(json.get_ref<const std::string&>(), matcher, marker);
    if (json.is_array()) {
      Json out = Json::array();
      for (const Json& item : json) out.push_back(MarkAll(item, matcher, marker));
      return out;
    }
    if (json.is_object()) {
      Json out = Json::object();
      for (auto it = json.begin(); it != json.end(); ++it) {
        out[Mark(it.key(), matcher, marker)] = MarkAll(it.value(), matcher, marker);
      }
      return out;
    }
    return json;
  }
};

ChatTemplate::ChatTemplate() = default;
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::FromSource(std::string source,
                                                                       const Tokenizer* tokenizer) {
  std::unique_ptr<ChatTemplate> made(new ChatTemplate);
  auto parsed = jinja::Template::Parse(source);
  if (!parsed.ok()) return Annotate(parsed.status(), "tokenizer.chat_template");
  made->template_ = *std::move(parsed);
  made->source_ = std::move(source);
  made->tokenizer_ = tokenizer;
  made->marks_ = std::make_unique<Marks>();
  for (const TokenType type : {TokenType::kControl, TokenType::kUnknown, TokenType::kUserDefined}) {
    for (const std::string_view token : tokenizer->TokensOfType(type)) {
      const int32_t id = tokenizer->FindToken(token);
      made->marks_->control_and_defined.Add(token, id);
      if (type != TokenType::kUserDefined) made->marks_->control.Add(token, id);
    }
  }
  return made;
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::FromGguf(const gguf::File& file,
                                                                     const Tokenizer* tokenizer) {
  if (file.Find("tokenizer.chat_template") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(std::string source, file.GetString("tokenizer.chat_template"));
    return FromSource(std::move(source), tokenizer);
  }
  for (const std::string_view token : {"<｜User｜>", "<｜Assistant｜>"}) {
    const int32_t id = tokenizer->FindToken(token);
    if (id >= 0 && tokenizer->IsControl(id)) continue;
    return absl::NotFoundError(
        absl::StrCat("tokenizer.chat_template is absent, and without the control token ", std::string(token),
                     " in the vocabulary there is no template to fall back to"));
  }
  TANDEM_ASSIGN_OR_RETURN(auto made, FromSource(std::string(kBuiltIn), tokenizer));
  made->built_in_ = true;
  return made;
}

absl::StatusOr<RenderedPrompt> ChatTemplate::Apply(const Json& messages, const ApplyOptions& options) const {
  if (!messages.is_array()) return absl::InvalidArgumentError("messages must be an array");
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!messages[i].is_object() || !messages[i].contains("role") || !messages[i]["role"].is_string()) {
      return absl::InvalidArgumentError(absl::StrCat("messages[", i, "] must be an object with a role"));
    }
  }
  if (options.extra != nullptr && !options.extra->is_object()) {
    return absl::InvalidArgumentError("the extra variables of the template must be an object");
  }
  std::bitset<kMarkers> used;
  NoteUsed(source_, &used);
  for (const Json* json : {&messages, options.tools, options.extra}) {
    if (json != nullptr && !NoteUsed(*json, 0, &used)) {
      return absl::InvalidArgumentError("messages or tools are nested too deeply");
    }
  }
  size_t free = 0;
  while (free < kMarkers && used[free]) ++free;
  if (free == kMarkers) {
    return absl::InvalidArgumentError(
        "the messages use every code point of the private use area U+E000..U+F8FF");
  }
  RenderedPrompt prompt;
  AppendUtf8(kFirstMarker + static_cast<uint32_t>(free), &prompt.marker);

  Json context = Json::object();
  Json marked = Json::array();
  for (const Json& message : messages) {
    // Templates cut the reasoning of earlier answers off at </think>, so it stays there and with the
    // operator.
    const std::string& role = message["role"].get_ref<const std::string&>();
    const bool outside = role != "assistant" && role != "system" && role != "developer";
    marked.push_back(
        Marks::MarkAll(message, outside ? marks_->control_and_defined : marks_->control, prompt.marker));
  }
  context["messages"] = std::move(marked);
  const auto marked_or_null = [&](const Json* json) {
    return json == nullptr ? Json(nullptr) : Marks::MarkAll(*json, marks_->control, prompt.marker);
  };
  context["tools"] = marked_or_null(options.tools);
  context["documents"] = nullptr;
  context["add_generation_prompt"] = options.add_generation_prompt;
  const std::pair<const char*, int32_t> tokens[] = {{"bos_token", tokenizer_->bos_id()},
                                                    {"eos_token", tokenizer_->eos_id()},
                                                    {"pad_token", tokenizer_->pad_id()}};
  for (const auto& [name, id] : tokens) {
    if (id >= 0) context[name] = std::string(tokenizer_->TokenText(id));
  }
  if (options.extra != nullptr) {
    for (auto it = options.extra->begin(); it != options.extra->end(); ++it) {
      context[it.key()] = Marks::MarkAll(it.value(), marks_->control, prompt.marker);
    }
  }
  jinja::RenderLimits limits;
  limits.generators_are_lists = true;
  auto rendered = template_->Render(context, limits);
  if (!rendered.ok()) return Annotate(rendered.status(), "chat template");
  prompt.marked_text = *std::move(rendered);
  prompt.text = prompt.marked_text;
  RemoveAll(prompt.marker, &prompt.text);
  std::string_view end = prompt.marked_text;
  while (!end.empty() && (end.back() == '\n' || end.back() == ' ')) end.remove_suffix(1);
  prompt.thinking = options.add_generation_prompt && end.ends_with("<think>");
  return prompt;
}

std::vector<int32_t> ChatTemplate::Tokenize(const RenderedPrompt& prompt, size_t most) const {
  return tokenizer_->Encode(
      prompt.marked_text,
      {.add_special = true, .parse_special = true, .marker = prompt.marker, .most = most});
}

}  // namespace tandem::tokenizer
