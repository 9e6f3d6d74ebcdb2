// tandem-gateway: REST and gRPC in front of attention engines.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <string>

#include "common/rpc/lifecycle.h"
#include "common/telemetry/log.h"
#include "services/gateway/gateway.h"

namespace {

using tandem::gateway::Gateway;
using tandem::gateway::GatewayOptions;

constexpr int kUsageError = 2;

struct Seconds {
  double idle = 120, read = 30, write = 60, request = 0, resume = 30, drain = 30;
};

void AddFlags(CLI::App& app, GatewayOptions& o, Seconds& s) {
  const auto env = [](CLI::Option* option, const char* name) { return option->envname(name); };
  app.set_config("--config", "", "Read flags from this file (TOML or INI: name=value)")
      ->envname("TANDEM_CONFIG");
  env(app.add_option("--engine", o.engines,
                     "Address of an attention engine (host:port or unix:/path); may be repeated"),
      "TANDEM_ENGINE")
      ->required()
      ->delimiter(',');
  env(app.add_option("--listen", o.listen, "HTTP address; put a reverse proxy in front for TLS"),
      "TANDEM_LISTEN")
      ->capture_default_str();
  env(app.add_option("--grpc-listen", o.grpc_listen, "gRPC address; \"\" for none"), "TANDEM_GRPC_LISTEN")
      ->capture_default_str();
  env(app.add_option("--model-id", o.model_id, "The model's name at the API (default: from the model file)"),
      "TANDEM_MODEL_ID");
  env(app.add_option("--api-key", o.api_key, "Ask clients for this key (better given as TANDEM_API_KEY)"),
      "TANDEM_API_KEY");
  env(app.add_flag("--cors", o.cors, "Let web pages of any origin call the API"), "TANDEM_CORS");
  env(app.add_option("--default-temperature", o.default_temperature,
                     "Where a request gives none; 0.6 is DeepSeek's advice for R1"),
      "TANDEM_DEFAULT_TEMPERATURE")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  env(app.add_option("--default-top-p", o.default_top_p, "Where a request gives none"),
      "TANDEM_DEFAULT_TOP_P")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  env(app.add_option("--max-requests", o.max_requests, "Sequences admitted at a time; beyond: 429"),
      "TANDEM_MAX_REQUESTS")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  env(app.add_option("--max-body-bytes", o.max_body_bytes, "Largest request body; beyond: 413"),
      "TANDEM_MAX_BODY_BYTES")
      ->check(CLI::Range(size_t{1}, size_t{1} << 30))
      ->capture_default_str();
  env(app.add_option("--max-header-bytes", o.max_header_bytes, "Largest request head; beyond: 431"),
      "TANDEM_MAX_HEADER_BYTES")
      ->check(CLI::Range(size_t{256}, size_t{1} << 20))
      ->capture_default_str();
  env(app.add_option("--max-output-bytes", o.max_output_bytes,
                     "Unread bytes of a stream; a client that is further behind is cut off"),
      "TANDEM_MAX_OUTPUT_BYTES")
      ->check(CLI::Range(size_t{4096}, size_t{1} << 30))
      ->capture_default_str();
  env(app.add_option("--max-connections", o.max_connections, "HTTP connections at a time"),
      "TANDEM_MAX_CONNECTIONS")
      ->check(CLI::Range(size_t{1}, size_t{1} << 20))
      ->capture_default_str();
  env(app.add_option("--http-threads", o.http_threads, "Threads for HTTP connections"), "TANDEM_HTTP_THREADS")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  env(app.add_option("--worker-threads", o.worker_threads, "Threads for templates and tokenizing"),
      "TANDEM_WORKER_THREADS")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  const auto seconds = [&](const char* flag, const char* name, double& value, const char* what) {
    env(app.add_option(flag, value, what), name)->check(CLI::Range(0.0, 1e6))->capture_default_str();
  };
  seconds("--idle-timeout", "TANDEM_IDLE_TIMEOUT", s.idle, "Seconds a connection may be idle");
  seconds("--read-timeout", "TANDEM_READ_TIMEOUT", s.read,
          "Seconds for a request's head, and for its body to go on");
  seconds("--write-timeout", "TANDEM_WRITE_TIMEOUT", s.write, "Seconds a client may read nothing");
  seconds("--request-timeout", "TANDEM_REQUEST_TIMEOUT", s.request,
          "Seconds for a whole request; 0: no limit");
  seconds("--resume-timeout", "TANDEM_RESUME_TIMEOUT", s.resume,
          "Seconds that streams wait for a lost engine to come back");
  seconds("--drain-timeout", "TANDEM_DRAIN_TIMEOUT", s.drain, "Seconds for running requests at SIGTERM");
  env(app.add_option("--tls-cert", o.grpc_tls.certificate_file, "PEM certificate of the gRPC server"),
      "TANDEM_TLS_CERT");
  env(app.add_option("--tls-key", o.grpc_tls.key_file, "Its key"), "TANDEM_TLS_KEY");
  env(app.add_option("--tls-ca", o.grpc_tls.ca_file, "Ask gRPC clients for certificates of this CA"),
      "TANDEM_TLS_CA");
  env(app.add_option("--engine-tls-cert", o.engine_tls.certificate_file,
                     "Our PEM certificate towards engines"),
      "TANDEM_ENGINE_TLS_CERT");
  env(app.add_option("--engine-tls-key", o.engine_tls.key_file, "Its key"), "TANDEM_ENGINE_TLS_KEY");
  env(app.add_option("--engine-tls-ca", o.engine_tls.ca_file, "CA of the engines' certificates"),
      "TANDEM_ENGINE_TLS_CA");
}

}  // namespace

int main(int argc, char** argv) {
  GatewayOptions options;
  Seconds seconds;
  CLI::App app(
      "Tandem's gateway: OpenAI-compatible REST and gRPC in front of attention engines.\n"
      "Every flag can also be given as TANDEM_<FLAG> or in a file (--config).");
  AddFlags(app, options, seconds);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsageError;
  }
  options.idle_timeout = absl::Seconds(seconds.idle);
  options.read_timeout = absl::Seconds(seconds.read);
  options.write_timeout = absl::Seconds(seconds.write);
  options.resume_timeout = absl::Seconds(seconds.resume);
  if (seconds.request > 0) options.request_timeout = absl::Seconds(seconds.request);

  tandem::rpc::StopSignal stop;
  tandem::telemetry::InitLog("gateway");
  absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Start(options);
  if (!gateway.ok()) {
    std::fprintf(stderr, "tandem-gateway: %s\n", std::string(gateway.status().message()).c_str());
    return 1;
  }
  const int signal = stop.Wait();
  spdlog::info("signal {}: draining", signal);
  (*gateway)->Drain(absl::Seconds(seconds.drain));
  gateway->reset();
  spdlog::info("stopped");
  return 0;
}
