#include "services/gateway/gateway.h"

#include <grpcpp/impl/codegen/service_type.h>
#include <sys/resource.h>

#include <algorithm>
#include <utility>

#include "common/base/status_macros.h"
#include "common/telemetry/log.h"
#include "common/telemetry/metrics.h"
#include "services/gateway/admission/admission.h"
#include "services/gateway/grpc/engine_pool.h"
#include "services/gateway/grpc/generation_service.h"
#include "services/gateway/http/http_server.h"
#include "services/gateway/openai/api.h"
#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/session.h"
#include "services/gateway/session/work_queue.h"

namespace tandem::gateway {
namespace {

constexpr size_t kWorkQueueCapacity = 4096;
constexpr absl::Duration kLastWords = absl::Seconds(2);  // for answers on their way when all is decided

// Some descriptors are kept for engines, gRPC and the log: with none left, a lost engine could not come back.
size_t ConnectionsThatFit(size_t wanted) {
  rlimit files;
  if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur == RLIM_INFINITY) return wanted;
  const size_t limit = files.rlim_cur, kept = std::min(std::max<size_t>(64, limit / 8), limit / 2);
  if (wanted <= limit - kept) return wanted;
  spdlog::warn("{} connections at a time instead of {}: the limit of open files is {} (ulimit -n)",
               limit - kept, wanted, limit);
  return limit - kept;
}

HttpServerOptions HttpOptions(const GatewayOptions& options) {
  HttpServerOptions http;
  http.listen = options.listen;
  http.threads = options.http_threads;
  http.max_header_bytes = options.max_header_bytes;
  http.max_body_bytes = options.max_body_bytes;
  http.max_output_bytes = options.max_output_bytes;
  http.max_connections = options.max_connections;
  http.idle_timeout = options.idle_timeout;
  http.read_timeout = options.read_timeout;
  http.write_timeout = options.write_timeout;
  if (options.cors) http.extra_headers.emplace_back("Access-Control-Allow-Origin", "*");
  http.error_body = [](int status, std::string_view message) {
    return FromHttpStatus(status, message).ToJson();
  };
  return http;
}

}  // namespace

// In the order of construction; what stands below uses what stands above.
struct Gateway::Impl {
  telemetry::Metrics registry{"gateway"};
  GatewayMetrics metrics{registry};
  std::unique_ptr<EnginePool> engines;
  std::unique_ptr<Admission> admission;
  std::unique_ptr<SessionEnvironment> sessions;
  std::unique_ptr<WorkQueue> work;
  std::unique_ptr<Api> api;
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<grpc::Service> service;
  std::unique_ptr<rpc::Server> grpc;
  bool drained = false;

  bool Drain(absl::Duration patience);
};

Gateway::Gateway(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Start(const GatewayOptions& options) {
  auto impl = std::make_unique<Impl>();
  EnginePoolOptions pool;
  pool.engine.tls = options.engine_tls;
  pool.engine.model_id = options.model_id;
  TANDEM_ASSIGN_OR_RETURN(impl->engines, EnginePool::Create(options.engines, pool));
  impl->admission =
      std::make_unique<Admission>(impl->engines.get(), options.max_requests, options.resume_timeout);
  impl->sessions =
      std::make_unique<SessionEnvironment>(impl->engines.get(), &impl->metrics, options.resume_timeout);
  impl->work = std::make_unique<WorkQueue>(options.worker_threads, kWorkQueueCapacity);

  ApiOptions api_options;
  api_options.api_key = options.api_key;
  api_options.defaults = {options.default_temperature, options.default_top_p};
  api_options.request_timeout = options.request_timeout;
  api_options.stream_head_after = options.stream_head_after;
  api_options.stream_comment_after = options.stream_comment_after;
  api_options.cors = options.cors;
  ApiParts parts{impl->engines.get(),  impl->admission.get(),
                 impl->sessions.get(), &impl->metrics,
                 impl->work.get(),     [registry = &impl->registry] { return registry->Expose(); }};
  impl->api = std::make_unique<Api>(api_options, parts);
  HttpServerOptions http = HttpOptions(options);
  http.max_connections = ConnectionsThatFit(http.max_connections);
  TANDEM_ASSIGN_OR_RETURN(impl->http,
                          HttpServer::Start(http, [api = impl->api.get()](Request q, Responder r) {
                            api->Handle(std::move(q), std::move(r));
                          }));

  if (!options.grpc_listen.empty()) {
    GenerationServiceOptions service;
    service.api_key = options.api_key;
    service.temperature = options.default_temperature;
    service.top_p = options.default_top_p;
    service.request_timeout = options.request_timeout;
    service.max_output_bytes = options.max_output_bytes;
    impl->service = MakeGenerationService(service, {impl->engines.get(), impl->admission.get(),
                                                    impl->sessions.get(), &impl->metrics, impl->work.get()});
    rpc::ServerOptions server;
    server.listen = {options.grpc_listen};
    server.tls = options.grpc_tls;
    server.max_message_bytes = static_cast<int64_t>(options.max_body_bytes);
    server.health_names = {GenerationServiceName()};
    TANDEM_ASSIGN_OR_RETURN(impl->grpc, rpc::Server::Start(server, {impl->service.get()}));
    impl->grpc->SetServing(true);
  }
  spdlog::info("HTTP on {}{}", impl->http->address(),
               impl->grpc == nullptr ? "" : ", gRPC on " + impl->grpc->addresses().front());
  return std::unique_ptr<Gateway>(new Gateway(std::move(impl)));
}

bool Gateway::Impl::Drain(absl::Duration patience) {
  if (drained) return true;
  drained = true;
  admission->Drain();  // /ready says 503 from now on; the listeners stay open, so that it can be asked
  if (grpc != nullptr) grpc->SetServing(false);
  const bool whole = admission->WaitEmpty(patience);
  if (!whole) {
    spdlog::warn("{} sequences did not end in time and are cut off", admission->in_flight());
    sessions->CancelAll(absl::UnavailableError("the server is shutting down"));
    admission->WaitEmpty(kLastWords);
  }
  if (http != nullptr) http->Shutdown(kLastWords);
  if (grpc != nullptr) grpc->Shutdown(kLastWords);
  // Those that came in behind our back have no client any more.
  sessions->CancelAll(absl::CancelledError("the server is shutting down"));
  work.reset();
  sessions->CancelAll(absl::CancelledError("the server is shutting down"));
  if (!sessions->WaitIdle(absl::Seconds(10))) spdlog::error("{} sequences hang", sessions->alive());
  return whole;
}

Gateway::~Gateway() {
  if (impl_->sessions != nullptr && impl_->work != nullptr) impl_->Drain(absl::ZeroDuration());
}

int Gateway::http_port() const { return impl_->http->port(); }
std::vector<std::string> Gateway::grpc_addresses() const {
  return impl_->grpc == nullptr ? std::vector<std::string>() : impl_->grpc->addresses();
}
bool Gateway::ready() const { return impl_->admission->Ready().ok(); }
bool Gateway::Drain(absl::Duration patience) { return impl_->Drain(patience); }

}  // namespace tandem::gateway
