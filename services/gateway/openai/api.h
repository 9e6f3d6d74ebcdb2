// The REST interface: OpenAI's endpoints, llama-server's helpers, health and metrics.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "services/gateway/admission/admission.h"
#include "services/gateway/grpc/engine_pool.h"
#include "services/gateway/http/http_server.h"
#include "services/gateway/openai/request.h"
#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/session.h"
#include "services/gateway/session/work_queue.h"

namespace tandem::gateway {

struct ApiOptions {
  std::string api_key;  // empty: none is asked for
  RequestDefaults defaults;
  absl::Duration request_timeout = absl::InfiniteDuration();
  absl::Duration stream_head_after = absl::Seconds(5);  // see GatewayOptions
  absl::Duration stream_comment_after = absl::Seconds(10);
  bool cors = false;  // answer OPTIONS
};

// What the endpoints work on. All must outlive the Api and every request it has taken.
struct ApiParts {
  EnginePool* engines;
  Admission* admission;
  SessionEnvironment* sessions;
  GatewayMetrics* metrics;
  WorkQueue* work;
  std::function<std::string()> expose_metrics;
};

// Thread-safe.
class Api {
 public:
  Api(const ApiOptions& options, const ApiParts& parts);

  // A Handler: quick requests are answered here, the others go to the work queue.
  void Handle(Request request, Responder responder);

 private:
  using Worker = void (Api::*)(const Request&, Responder&, const std::shared_ptr<const ModelContext>&);
  struct Route;
  static const Route kRoutes[];

  bool Authorized(const Request& request) const;
  // For requests that need the model: on the work queue, once there is one.
  void Defer(Worker worker, Request request, Responder responder);

  void Landing(const Request& request, Responder responder);
  void Health(const Request& request, Responder responder);
  void Ready(const Request& request, Responder responder);
  void Metrics(const Request& request, Responder responder);
  void Models(const Request& request, Responder responder);

  void Chat(Request request, Responder responder);
  void Completions(Request request, Responder responder);
  void Generate(Request request, Responder responder, bool chat);
  void RunChat(const Request& request, Responder responder, Admission::Ticket ticket, absl::Time arrived);
  void RunCompletions(const Request& request, Responder responder, Admission::Ticket ticket,
                      absl::Time arrived);
  void Launch(bool chat, CommonRequest& common, std::vector<Prompt> prompts, std::vector<std::string> echoes,
              const std::shared_ptr<const ModelContext>& model, Responder& responder,
              Admission::Ticket ticket, absl::Time arrived, double tokenize_seconds);
  void RefuseGeneration(Responder& responder, const ApiError& error);
  // The room is given back before the answer goes out.
  void RefuseGeneration(Responder& responder, const ApiError& error, Admission::Ticket ticket);

  void Tokenize(const Request& request, Responder& responder,
                const std::shared_ptr<const ModelContext>& model);
  void Detokenize(const Request& request, Responder& responder,
                  const std::shared_ptr<const ModelContext>& model);
  void ApplyTemplate(const Request& request, Responder& responder,
                     const std::shared_ptr<const ModelContext>& model);

  const ApiOptions options_;
  const ApiParts parts_;
};

}  // namespace tandem::gateway
