// The endpoints that need the model: they run on the work queue.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/tokenizer/tokenizer.h"
#include "services/gateway/openai/api.h"
#include "services/gateway/openai/fields.h"
#include "services/gateway/openai/generation_job.h"
#include "services/gateway/openai/json_body.h"
#include "services/gateway/session/limits.h"
#include "services/gateway/session/request_log.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

void Send(Responder& responder, const ApiError& error) {
  HeaderList headers;
  if (error.retry_after > 0) headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  responder.Respond(error.status, "application/json", error.ToJson(), headers);
}

void SendJson(Responder& responder, const Json& json) {
  responder.Respond(200, "application/json", json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

std::optional<ApiError> ParseBody(const Request& request, Json* body) {
  absl::StatusOr<Json> parsed = ParseJsonBody(request.body);
  if (!parsed.ok()) return BadRequest(Message(parsed.status()), "", "invalid_json");
  *body = std::move(*parsed);
  return std::nullopt;
}

std::optional<ApiError> CheckModel(const ModelContext& model, const std::string& asked) {
  if (model.Answers(asked)) return std::nullopt;
  ApiError error = FromHttpStatus(
      404, absl::StrCat("the model '", asked, "' does not exist; served is '", model.id(), "'"));
  error.param = "model";
  error.code = "model_not_found";
  return error;
}

// The first choice of each prompt has the request's seed, as if it were asked for alone; the others' are far
// from it and from the neighbours' (the finalizer of splitmix64).
uint64_t SeedOfChoice(uint64_t seed, int choice) {
  uint64_t z = seed + static_cast<uint64_t>(choice) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

}  // namespace

void Api::Chat(Request request, Responder responder) {
  Generate(std::move(request), std::move(responder), /*chat=*/true);
}

void Api::Completions(Request request, Responder responder) {
  Generate(std::move(request), std::move(responder), /*chat=*/false);
}

void Api::RefuseGeneration(Responder& responder, const ApiError& error) {
  const bool busy = error.status == 429 || error.status == 503;
  parts_.metrics->requests(busy                 ? Outcome::kRefused
                           : error.status < 500 ? Outcome::kInvalid
                                                : Outcome::kError)
      .Add();
  Send(responder, error);
}

void Api::RefuseGeneration(Responder& responder, const ApiError& error, Admission::Ticket ticket) {
  { const Admission::Ticket given_back = std::move(ticket); }
  RefuseGeneration(responder, error);
}

void Api::Generate(Request request, Responder responder, bool chat) {
  absl::StatusOr<Admission::Ticket> ticket = parts_.admission->Enter();
  if (!ticket.ok()) return RefuseGeneration(responder, FromStatus(ticket.status()));
  struct Held {
    Request request;
    Responder responder;
    Admission::Ticket ticket;
    absl::Time arrived;
  };
  auto held =
      std::make_shared<Held>(Held{std::move(request), std::move(responder), std::move(*ticket), absl::Now()});
  auto task = [this, held, chat] {
    const auto run = chat ? &Api::RunChat : &Api::RunCompletions;
    (this->*run)(held->request, std::move(held->responder), std::move(held->ticket), held->arrived);
  };
  if (!parts_.work->TryPush(held->request.body.size(), std::move(task))) {
    RefuseGeneration(held->responder, FromHttpStatus(429, "too many requests are waiting"));
  }
}

void Api::RunChat(const Request& request, Responder responder, Admission::Ticket ticket, absl::Time arrived) {
  const std::shared_ptr<const ModelContext> model = parts_.engines->model();
  Json body;
  std::optional<ApiError> error = ParseBody(request, &body);
  ChatRequest chat;
  if (!error.has_value()) error = ParseChatRequest(body, options_.defaults, &chat);
  if (!error.has_value()) error = CheckModel(*model, chat.model);
  if (error.has_value()) return RefuseGeneration(responder, *error, std::move(ticket));

  const absl::Time start = absl::Now();
  absl::StatusOr<Prompt> prompt =
      model->RenderChat(chat.messages, chat.template_kwargs.is_null() ? nullptr : &chat.template_kwargs);
  if (!prompt.ok()) {
    return RefuseGeneration(responder, BadRequest(Message(prompt.status()), "messages"), std::move(ticket));
  }
  const double tokenize_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  std::vector<Prompt> prompts;
  prompts.push_back(std::move(*prompt));
  Launch(/*chat=*/true, chat, std::move(prompts), {}, model, responder, std::move(ticket), arrived,
         tokenize_seconds);
}

void Api::RunCompletions(const Request& request, Responder responder, Admission::Ticket ticket,
                         absl::Time arrived) {
  const std::shared_ptr<const ModelContext> model = parts_.engines->model();
  Json body;
  std::optional<ApiError> error = ParseBody(request, &body);
  CompletionRequest completion;
  if (!error.has_value()) error = ParseCompletionRequest(body, options_.defaults, &completion);
  if (!error.has_value()) error = CheckModel(*model, completion.model);
  if (error.has_value()) return RefuseGeneration(responder, *error, std::move(ticket));

  const absl::Time start = absl::Now();
  std::vector<Prompt> prompts;
  std::vector<std::string> echoes;
  for (auto& given : completion.prompts) {
    if (auto* text = std::get_if<std::string>(&given)) {
      prompts.push_back(model->EncodeText(*text));
      if (completion.echo) echoes.push_back(*text);
    } else {
      auto& tokens = std::get<CompletionRequest::Tokens>(given);
      if (completion.echo) echoes.push_back(tokenizer::SanitizeUtf8(model->tokenizer().Decode(tokens)));
      prompts.push_back(Prompt{std::move(tokens), false});
    }
  }
  const double tokenize_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  Launch(/*chat=*/false, completion, std::move(prompts), std::move(echoes), model, responder,
         std::move(ticket), arrived, tokenize_seconds);
}

void Api::Launch(bool chat, CommonRequest& common, std::vector<Prompt> prompts,
                 std::vector<std::string> echoes, const std::shared_ptr<const ModelContext>& model,
                 Responder& responder, Admission::Ticket ticket, absl::Time arrived,
                 double tokenize_seconds) {
  for (const auto& [token, bias] : common.sampling.logit_bias) {
    if (static_cast<uint32_t>(token) >= model->limits().vocab_size) {
      return RefuseGeneration(
          responder,
          BadRequest(absl::StrCat("'logit_bias' names the token ", token, "; the vocabulary's ids are 0 to ",
                                  model->limits().vocab_size - 1),
                     "logit_bias", "out_of_range"),
          std::move(ticket));
    }
  }
  JobSpec job;
  job.head.chat = chat;
  job.head.id = MakeId(chat ? "chatcmpl-" : "cmpl-");
  job.head.created = absl::ToUnixSeconds(arrived);
  job.head.model = model->id();
  job.head.fingerprint = "tandem-" + model->limits().fingerprint;
  job.stream = common.stream;
  job.include_usage = common.include_usage;
  job.logprobs = common.logprobs;
  job.choices_a_prompt = common.n;
  job.head_after = options_.stream_head_after;
  job.comment_after = options_.stream_comment_after;
  job.arrived = arrived;
  job.tokenize_seconds = tokenize_seconds;
  if (!common.has_seed) common.sampling.seed = RandomSeed();
  const char* param = chat ? "messages" : "prompt";
  for (size_t p = 0; p < prompts.size(); ++p) {
    const absl::StatusOr<uint32_t> new_tokens = NewTokensFor(*model, prompts[p].tokens, common.max_tokens);
    if (!new_tokens.ok()) {
      ApiError error = FromStatus(new_tokens.status());
      error.param = param;
      return RefuseGeneration(responder, error, std::move(ticket));
    }
    job.prompt_tokens += prompts[p].tokens.size();
    for (int i = 0; i < common.n; ++i) {
      GenerationSpec spec;
      spec.request_id = job.head.id;
      spec.prompt_tokens = i + 1 < common.n ? prompts[p].tokens : std::move(prompts[p].tokens);
      spec.max_new_tokens = *new_tokens;
      spec.sampling = common.sampling;
      if (i > 0) spec.sampling.seed = SeedOfChoice(common.sampling.seed, i);
      spec.stop = common.stop;
      spec.ignore_eos = common.ignore_eos;
      spec.logprobs = common.logprobs;
      spec.top_logprobs = common.top_logprobs;
      spec.split_reasoning = chat;
      spec.starts_in_reasoning = prompts[p].starts_in_reasoning;
      spec.deadline = arrived + options_.request_timeout;
      spec.arrived = arrived;
      job.sequences.push_back(std::move(spec));
      if (!echoes.empty()) job.echoes.push_back(echoes[p]);
    }
  }
  const int more = static_cast<int>(job.sequences.size()) - 1;
  if (more > 0) {
    if (const absl::Status grown = ticket.Grow(more); !grown.ok()) {
      return RefuseGeneration(responder, FromStatus(grown), std::move(ticket));
    }
  }
  GenerationJob::Start(std::move(job), parts_.sessions, parts_.metrics, model, std::move(responder),
                       std::move(ticket));
}

void Api::Tokenize(const Request& request, Responder& responder,
                   const std::shared_ptr<const ModelContext>& model) {
  Json body;
  std::optional<ApiError> error = ParseBody(request, &body);
  if (error.has_value()) return Send(responder, *error);
  Fields fields(body, "", &error);
  const std::optional<std::string> content = fields.String("content");
  if (!content.has_value()) fields.Fail("content", "is missing", "missing_field");
  tokenizer::EncodeOptions options;
  options.add_special = fields.Bool("add_special").value_or(false);
  options.parse_special = fields.Bool("parse_special").value_or(true);
  if (error.has_value()) return Send(responder, *error);
  SendJson(responder, {{"tokens", model->tokenizer().Encode(*content, options)}});
}

void Api::Detokenize(const Request& request, Responder& responder,
                     const std::shared_ptr<const ModelContext>& model) {
  Json body;
  std::optional<ApiError> error = ParseBody(request, &body);
  if (error.has_value()) return Send(responder, *error);
  Fields fields(body, "", &error);
  const Json* list = fields.Array("tokens");
  if (list == nullptr) fields.Fail("tokens", "is missing", "missing_field");
  std::vector<int32_t> tokens;
  const int64_t vocabulary = model->tokenizer().vocab_size();
  for (size_t i = 0; list != nullptr && i < list->size() && !error.has_value(); ++i) {
    const Json& token = (*list)[i];
    const std::string name = absl::StrCat("tokens[", i, "]");
    if (!token.is_number_integer()) {
      fields.WrongType(name, token, "a token id");
    } else if (token < 0 || token >= vocabulary) {
      fields.Fail(name, absl::StrCat("must be from 0 to ", vocabulary - 1, ", not ", token.dump()),
                  "out_of_range");
    } else {
      tokens.push_back(token.get<int32_t>());
    }
  }
  if (error.has_value()) return Send(responder, *error);
  SendJson(responder, {{"content", tokenizer::SanitizeUtf8(model->tokenizer().Decode(tokens))}});
}

void Api::ApplyTemplate(const Request& request, Responder& responder,
                        const std::shared_ptr<const ModelContext>& model) {
  Json body, messages, kwargs;
  std::optional<ApiError> error = ParseBody(request, &body);
  if (!error.has_value()) error = ParseMessages(body, &messages);
  if (!error.has_value()) error = ParseTemplateKwargs(body, &kwargs);
  if (error.has_value()) return Send(responder, *error);
  const absl::StatusOr<std::string> prompt =
      model->RenderChatText(messages, kwargs.is_null() ? nullptr : &kwargs);
  if (!prompt.ok()) return Send(responder, BadRequest(Message(prompt.status()), "messages"));
  SendJson(responder, {{"prompt", *prompt}});
}

}  // namespace tandem::gateway
