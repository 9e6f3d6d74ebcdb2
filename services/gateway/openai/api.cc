#include "services/gateway/openai/api.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "services/gateway/admission/api_key.h"
#include "services/gateway/web/landing_page.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kJson = "application/json";

void Send(Responder& responder, const ApiError& error, HeaderList headers = {}) {
  if (error.retry_after > 0) headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  responder.Respond(error.status, kJson, error.ToJson(), headers);
}

void SendJson(Responder& responder, int status, const Json& json) {
  responder.Respond(status, kJson, json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

// "%41" is "A"; anything malformed stays as it is.
std::string PercentDecode(std::string_view text) {
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
  };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) >= 0 && digit(text[i + 2]) >= 0) {
      out += static_cast<char>(digit(text[i + 1]) * 16 + digit(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace

struct Api::Route {
  std::string_view path;
  bool prefix;  // anything may follow
  std::string_view method;
  bool open;  // no key needed
  void (Api::*quick)(const Request&, Responder);
  void (Api::*slow)(Request, Responder);
  Worker worker;
};

constexpr Api::Route Api::kRoutes[] = {
    {"/", false, "GET", true, &Api::Landing, nullptr, nullptr},
    {"/health", false, "GET", true, &Api::Health, nullptr, nullptr},
    {"/ready", false, "GET", true, &Api::Ready, nullptr, nullptr},
    {"/metrics", false, "GET", true, &Api::Metrics, nullptr, nullptr},
    {"/v1/models", false, "GET", false, &Api::Models, nullptr, nullptr},
    {"/v1/models/", true, "GET", false, &Api::Models, nullptr, nullptr},
    {"/v1/chat/completions", false, "POST", false, nullptr, &Api::Chat, nullptr},
    {"/v1/completions", false, "POST", false, nullptr, &Api::Completions, nullptr},
    {"/tokenize", false, "POST", false, nullptr, nullptr, &Api::Tokenize},
    {"/detokenize", false, "POST", false, nullptr, nullptr, &Api::Detokenize},
    {"/apply-template", false, "POST", false, nullptr, nullptr, &Api::ApplyTemplate},
};

Api::Api(const ApiOptions& options, const ApiParts& parts) : options_(options), parts_(parts) {}

bool Api::Authorized(const Request& request) const {
  return BearerMatches(request.Header("authorization"), options_.api_key);
}

void Api::Handle(Request request, Responder responder) {
  const std::string_view path = request.Path();
  const bool options = request.method == "OPTIONS";
  std::vector<std::string> allowed;
  for (const Route& route : kRoutes) {
    const bool matches =
        route.prefix ? path.starts_with(route.path) && path.size() > route.path.size() : path == route.path;
    if (!matches) continue;
    const bool head = request.method == "HEAD" && route.method == "GET";
    if (request.method != route.method && !head) {
      allowed.emplace_back(route.method);
      if (route.method == "GET") allowed.emplace_back("HEAD");
      continue;
    }
    if (!route.open && !Authorized(request)) {
      return Send(responder,
                  FromHttpStatus(401, request.Header("authorization").empty()
                                          ? "an API key is needed: Authorization: Bearer KEY"
                                          : "the API key is wrong"),
                  {{"WWW-Authenticate", "Bearer"}});
    }
    if (route.quick != nullptr) return (this->*route.quick)(request, std::move(responder));
    if (route.slow != nullptr) return (this->*route.slow)(std::move(request), std::move(responder));
    return Defer(route.worker, std::move(request), std::move(responder));
  }
  if (options && (options_.cors || !allowed.empty())) {
    allowed.emplace_back("OPTIONS");
    HeaderList headers = {{"Allow", absl::StrJoin(allowed, ", ")}};
    if (options_.cors) {
      headers.emplace_back("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS");
      const std::string_view asked = request.Header("access-control-request-headers");
      headers.emplace_back("Access-Control-Allow-Headers", asked.empty() ? "*" : std::string(asked));
      headers.emplace_back("Access-Control-Max-Age", "86400");
    }
    return responder.Respond(204, "", "", headers);
  }
  if (!allowed.empty()) {
    return Send(
        responder,
        FromHttpStatus(405, absl::StrCat("the method ", request.method, " is not allowed for ",
                                         std::string(path), "; allowed: ", absl::StrJoin(allowed, ", "))),
        {{"Allow", absl::StrJoin(allowed, ", ")}});
  }
  Send(responder,
       FromHttpStatus(404, absl::StrCat("there is nothing at ", request.method, " ", std::string(path))));
}

void Api::Landing(const Request&, Responder responder) {
  const std::shared_ptr<const ModelContext> model = parts_.engines->model();
  const absl::Status ready = parts_.admission->Ready();
  responder.Respond(200, "text/html; charset=utf-8",
                    LandingPage(model == nullptr ? "" : model->id(),
                                ready.ok() ? "ready" : "not ready: " + std::string(ready.message())));
}

void Api::Health(const Request&, Responder responder) { SendJson(responder, 200, {{"status", "ok"}}); }

void Api::Ready(const Request&, Responder responder) {
  const absl::Status ready = parts_.admission->Ready();
  if (!ready.ok()) return Send(responder, FromStatus(ready));
  SendJson(responder, 200, {{"status", "ready"}, {"model", parts_.engines->model()->id()}});
}

void Api::Metrics(const Request&, Responder responder) {
  parts_.metrics->ready.Set(parts_.admission->Ready().ok() ? 1 : 0);
  responder.Respond(200, "text/plain; version=0.0.4; charset=utf-8", parts_.expose_metrics());
}

void Api::Models(const Request& request, Responder responder) {
  const std::shared_ptr<const ModelContext> model = parts_.engines->model();
  const std::string_view path = request.Path();
  constexpr std::string_view kPrefix = "/v1/models/";
  const bool one = path.starts_with(kPrefix);
  if (model == nullptr) {
    return Send(responder, FromHttpStatus(503, std::string(parts_.engines->status().message())));
  }
  Json entry = {{"id", model->id()},
                {"object", "model"},
                {"created", model->created()},
                {"owned_by", "tandem"},
                {"max_model_len", model->limits().context_length}};
  if (!one) return SendJson(responder, 200, {{"object", "list"}, {"data", Json::array({std::move(entry)})}});
  const std::string asked = PercentDecode(path.substr(kPrefix.size()));
  if (asked.empty() || !model->Answers(asked)) {
    ApiError error = FromHttpStatus(
        404, absl::StrCat("the model '", asked, "' does not exist; served is '", model->id(), "'"));
    error.param = "model";
    error.code = "model_not_found";
    return Send(responder, error);
  }
  SendJson(responder, 200, entry);
}

void Api::Defer(Worker worker, Request request, Responder responder) {
  std::shared_ptr<const ModelContext> model = parts_.engines->model();
  if (model == nullptr) {
    return Send(responder, FromHttpStatus(503, std::string(parts_.engines->status().message())));
  }
  auto shared = std::make_shared<Responder>(std::move(responder));
  const size_t bytes = request.body.size();
  auto task = [this, worker, shared, model = std::move(model), request = std::move(request)] {
    (this->*worker)(request, *shared, model);
  };
  if (!parts_.work->TryPush(bytes, std::move(task))) {
    Send(*shared, FromHttpStatus(429, "too many requests are waiting"));
  }
}

}  // namespace tandem::gateway
