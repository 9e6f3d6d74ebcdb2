#include "services/gateway/grpc/generation_params.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "services/gateway/openai/request.h"
#include "services/gateway/session/limits.h"
#include "services/gateway/session/request_log.h"
#include "tandem/v1/generation.pb.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

absl::Status InRange(const char* name, float value, float least, float most, bool open_most = false) {
  if (std::isfinite(value) && value >= least && (open_most ? value < most : value <= most)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("'", name, "' must be from ", least, " to ",
                                                 open_most ? "less than " : "", most, ", not ", value));
}

absl::StatusOr<Prompt> PromptOf(const v1::GenerationRequest& request, const ModelContext& model) {
  if (request.prompt_case() == v1::GenerationRequest::kText) return model.EncodeText(request.text());
  if (request.prompt_case() != v1::GenerationRequest::kChat) {
    return absl::InvalidArgumentError("'chat' or 'text' must be given");
  }
  Json body;
  body["messages"] = Json::array();
  for (const v1::ChatMessage& message : request.chat().messages()) {
    body["messages"].push_back({{"role", message.role()}, {"content", message.content()}});
  }
  Json messages;
  if (const std::optional<ApiError> error = ParseMessages(body, &messages); error.has_value()) {
    return absl::InvalidArgumentError("chat." + error->message);
  }
  absl::StatusOr<Prompt> prompt = model.RenderChat(messages, nullptr);
  if (!prompt.ok()) return absl::InvalidArgumentError(prompt.status().message());
  return prompt;
}

}  // namespace

absl::StatusOr<GenerationSpec> SpecOf(const v1::GenerationRequest& request, const ModelContext& model,
                                      const GenerationServiceOptions& options) {
  if (!model.Answers(request.model())) {
    return absl::NotFoundError(
        absl::StrCat("the model '", request.model(), "' does not exist; served is '", model.id(), "'"));
  }
  GenerationSpec spec;
  Sampling& sampling = spec.sampling;
  sampling.temperature = request.has_temperature() ? request.temperature() : options.temperature;
  sampling.top_p = request.has_top_p() ? request.top_p() : options.top_p;
  sampling.top_k = request.top_k();
  sampling.min_p = request.min_p();
  sampling.seed = request.has_seed() ? request.seed() : RandomSeed();
  sampling.presence_penalty = request.presence_penalty();
  sampling.frequency_penalty = request.frequency_penalty();
  TANDEM_RETURN_IF_ERROR(InRange("temperature", sampling.temperature, 0, 2));
  TANDEM_RETURN_IF_ERROR(InRange("top_p", sampling.top_p, 0, 1));
  TANDEM_RETURN_IF_ERROR(InRange("min_p", sampling.min_p, 0, 1, /*open_most=*/true));
  TANDEM_RETURN_IF_ERROR(InRange("presence_penalty", sampling.presence_penalty, -2, 2));
  TANDEM_RETURN_IF_ERROR(InRange("frequency_penalty", sampling.frequency_penalty, -2, 2));
  if (sampling.top_p == 0) sampling.top_p = 1e-6f;
  if (request.has_max_tokens() && (request.max_tokens() == 0 || request.max_tokens() > INT32_MAX)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'max_tokens' must be from 1 to ", INT32_MAX, ", not ", request.max_tokens()));
  }
  if (request.stop_size() > static_cast<int>(kMaxStopStrings)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'stop' may hold up to ", kMaxStopStrings, " strings, not ", request.stop_size()));
  }
  for (const std::string& stop : request.stop()) {
    if (stop.empty()) return absl::InvalidArgumentError("'stop' must not hold an empty string");
    spec.stop.push_back(stop);
  }
  TANDEM_ASSIGN_OR_RETURN(Prompt prompt, PromptOf(request, model));
  std::optional<uint32_t> asked;
  if (request.has_max_tokens()) asked = request.max_tokens();
  TANDEM_ASSIGN_OR_RETURN(spec.max_new_tokens, NewTokensFor(model, prompt.tokens, asked));
  spec.prompt_tokens = std::move(prompt.tokens);
  spec.starts_in_reasoning = prompt.starts_in_reasoning;
  spec.split_reasoning = request.prompt_case() == v1::GenerationRequest::kChat;
  return spec;
}

}  // namespace tandem::gateway
