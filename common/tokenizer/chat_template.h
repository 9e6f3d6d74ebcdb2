// Chat messages to prompt: the Jinja template of the model file, applied as Hugging Face transformers applies
// it.
//
// Control tokens come from the template alone. Before rendering, a code point that occurs nowhere in the
// messages is put inside every control token that is spelled out in them; special tokens are looked for in
// the rendered text with these marks, and the marks are then removed. So `<｜User｜>` typed by a user is
// plain text.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace tandem::gguf {
class File;
}  // namespace tandem::gguf

namespace tandem::jinja {
class Template;
}  // namespace tandem::jinja

namespace tandem::tokenizer {

class Tokenizer;

struct ApplyOptions {
  bool add_generation_prompt = true;
  const nlohmann::ordered_json* tools = nullptr;  // OpenAI's tools array; null = `tools` is none
  const nlohmann::ordered_json* extra = nullptr;  // an object: more variables (enable_thinking, ...)
};

struct RenderedPrompt {
  std::string text;       // the prompt, for people and for /apply-template
  bool thinking = false;  // it ends with an open <think>: what the model says first is reasoning

  // For ChatTemplate::Tokenize.
  std::string marked_text;
  std::string marker;
};

// Immutable and thread-safe.
class ChatTemplate {
 public:
  // tokenizer.chat_template of `file`; a template in DeepSeek-R1's form if the file has none but knows the
  // control tokens <｜User｜> and <｜Assistant｜>; else NotFound. A template that does not parse:
  // InvalidArgument with the line. `tokenizer` must outlive the template.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> FromGguf(const gguf::File& file,
                                                                const Tokenizer* tokenizer);
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> FromSource(std::string source,
                                                                  const Tokenizer* tokenizer);

  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // `messages`: an array of objects with `role` and `content` (a string, or null beside tool_calls), in
  // OpenAI's shape. InvalidArgument: the messages do not fit the template (its own words where it raises an
  // exception).
  absl::StatusOr<RenderedPrompt> Apply(const nlohmann::ordered_json& messages,
                                       const ApplyOptions& options) const;

  // The tokens of a rendered prompt, with BOS exactly once where the model wants one.
  std::vector<int32_t> Tokenize(const RenderedPrompt& prompt, size_t most = SIZE_MAX) const;

  const std::string& source() const { return source_; }
  bool built_in() const { return built_in_; }  // not from the file

 private:
  ChatTemplate();

  std::string source_;
  bool built_in_ = false;
  const Tokenizer* tokenizer_ = nullptr;
  std::unique_ptr<jinja::Template> template_;
  struct Marks;
  std::unique_ptr<Marks> marks_;
};

}  // namespace tandem::tokenizer
