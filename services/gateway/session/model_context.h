// The served model as the gateway knows it: its names, tokenizer, chat template and limits, made of the
// metadata that the engine hands over. No model file is needed here.
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
}
namespace tandem::tokenizer {
class ChatTemplate;
class Tokenizer;
}  // namespace tandem::tokenizer

namespace tandem::gateway {

struct ModelLimits {
  std::string fingerprint;
  std::string name;  // what the engine calls it
  uint32_t vocab_size = 0;
  uint32_t context_length = 0;
};

struct Prompt {
  std::vector<int32_t> tokens;
  bool starts_in_reasoning = false;
};

// Immutable and thread-safe.
class ModelContext {
 public:
  // `metadata`: a GGUF header. `id`: what the model is called at the API; empty: general.name in lower case
  // with dashes for blanks. InvalidArgument: the engine's numbers and the metadata do not agree.
  static absl::StatusOr<std::shared_ptr<const ModelContext>> Create(const std::string& metadata,
                                                                    const ModelLimits& limits,
                                                                    const std::string& id);
  ~ModelContext();

  const std::string& id() const { return id_; }
  // Is it meant by `name`? Empty, the id, or general.name, in any case of letters.
  bool Answers(std::string_view name) const;
  const ModelLimits& limits() const { return limits_; }
  int64_t created() const { return created_; }  // Unix seconds
  const tokenizer::Tokenizer& tokenizer() const { return *tokenizer_; }

  // Is there a chat template? If not, why.
  const absl::Status& chat_status() const { return chat_status_; }
  // `messages` in OpenAI's shape; `extra`: null or an object with more template variables.
  absl::StatusOr<Prompt> RenderChat(const nlohmann::ordered_json& messages,
                                    const nlohmann::ordered_json* extra) const;
  absl::StatusOr<std::string> RenderChatText(const nlohmann::ordered_json& messages,
                                             const nlohmann::ordered_json* extra) const;
  // A prompt that is taken as it is: BOS is added where the model wants one and the text has none; control
  // tokens that are spelled out count as such.
  Prompt EncodeText(std::string_view text) const;

  // Longer prompts may be cut behind so many tokens: they are refused whatever comes after.
  size_t MostTokens() const { return size_t{4} * limits_.context_length; }

  int32_t think_open_id() const { return think_open_; }    // -1: none
  int32_t think_close_id() const { return think_close_; }  // -1: none
  // Does the token show in the text? All but control tokens; of these only the marks of tool calls.
  bool Visible(int32_t token) const;

 private:
  ModelContext();

  std::string id_;
  std::string general_name_;
  ModelLimits limits_;
  int64_t created_ = 0;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer_;
  std::unique_ptr<tokenizer::ChatTemplate> chat_template_;
  absl::Status chat_status_;
  int32_t think_open_ = -1;
  int32_t think_close_ = -1;
};

}  // namespace tandem::gateway
