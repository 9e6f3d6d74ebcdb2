#include "services/gateway/session/model_context.h"

#include <ctime>
#include <nlohmann/json.hpp>
#include <span>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/tokenizer/chat_template.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::gateway {
namespace {

std::string IdOf(const std::string& name) {
  std::string id = absl::AsciiStrToLower(absl::StripAsciiWhitespace(name));
  for (char& c : id) {
    if (c == ' ' || c == '/' || c == '\t') c = '-';
  }
  return id;
}

}  // namespace

ModelContext::ModelContext() = default;
ModelContext::~ModelContext() = default;

absl::StatusOr<std::shared_ptr<const ModelContext>> ModelContext::Create(const std::string& metadata,
                                                                         const ModelLimits& limits,
                                                                         const std::string& id) {
  const auto bytes = std::span(reinterpret_cast<const uint8_t*>(metadata.data()), metadata.size());
  TANDEM_ASSIGN_OR_RETURN(const std::unique_ptr<gguf::File> file,
                          gguf::File::ParseHeader(bytes, "the engine's metadata"));
  std::shared_ptr<ModelContext> model(new ModelContext());
  model->limits_ = limits;
  model->created_ = time(nullptr);
  TANDEM_ASSIGN_OR_RETURN(model->tokenizer_, tokenizer::Tokenizer::FromGguf(*file));
  if (limits.context_length < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("the engine reports a context of ", limits.context_length, " tokens"));
  }
  if (model->tokenizer_->vocab_size() > static_cast<int64_t>(limits.vocab_size)) {
    return absl::InvalidArgumentError(absl::StrCat("the tokenizer has ", model->tokenizer_->vocab_size(),
                                                   " tokens, the engine's vocabulary ", limits.vocab_size));
  }
  absl::StatusOr<std::unique_ptr<tokenizer::ChatTemplate>> chat =
      tokenizer::ChatTemplate::FromGguf(*file, model->tokenizer_.get());
  if (chat.ok()) {
    model->chat_template_ = std::move(*chat);
  } else {
    model->chat_status_ = absl::FailedPreconditionError(
        absl::StrCat("this model cannot chat: ", chat.status().message(), "; use /v1/completions"));
  }
  if (absl::StatusOr<std::string> name = file->GetString("general.name"); name.ok()) {
    model->general_name_ = *name;
  } else {
    model->general_name_ = limits.name;
  }
  model->id_ = !id.empty() ? id : IdOf(model->general_name_);
  if (model->id_.empty()) model->id_ = "default";
  model->think_open_ = model->tokenizer_->FindToken("<think>");
  model->think_close_ = model->tokenizer_->FindToken("</think>");
  return std::shared_ptr<const ModelContext>(std::move(model));
}

bool ModelContext::Answers(std::string_view name) const {
  const absl::string_view asked(name.data(), name.size());
  return name.empty() || absl::EqualsIgnoreCase(asked, id_) || absl::EqualsIgnoreCase(asked, general_name_) ||
         absl::EqualsIgnoreCase(asked, IdOf(general_name_));
}

absl::StatusOr<Prompt> ModelContext::RenderChat(const nlohmann::ordered_json& messages,
                                                const nlohmann::ordered_json* extra) const {
  if (!chat_status_.ok()) return chat_status_;
  tokenizer::ApplyOptions options;
  options.extra = extra;
  TANDEM_ASSIGN_OR_RETURN(const tokenizer::RenderedPrompt rendered, chat_template_->Apply(messages, options));
  return Prompt{chat_template_->Tokenize(rendered, MostTokens()), rendered.thinking};
}

absl::StatusOr<std::string> ModelContext::RenderChatText(const nlohmann::ordered_json& messages,
                                                         const nlohmann::ordered_json* extra) const {
  if (!chat_status_.ok()) return chat_status_;
  tokenizer::ApplyOptions options;
  options.extra = extra;
  TANDEM_ASSIGN_OR_RETURN(tokenizer::RenderedPrompt rendered, chat_template_->Apply(messages, options));
  return std::move(rendered.text);
}

Prompt ModelContext::EncodeText(std::string_view text) const {
  tokenizer::EncodeOptions options;
  options.add_special = true;
  options.parse_special = true;
  options.most = MostTokens();
  return Prompt{tokenizer_->Encode(text, options), false};
}

bool ModelContext::Visible(int32_t token) const {
  if (!tokenizer_->IsControl(token)) return true;
  if (token == think_open_ || token == think_close_) return true;
  return tokenizer_->TokenText(token).find("tool") != std::string_view::npos;
}

}  // namespace tandem::gateway
