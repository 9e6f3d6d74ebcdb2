// tandem-gateway: REST and gRPC in front of attention engines.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <string>

#include "common/flags/sources.h"
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
  app.add_option(
         "--engine", o.engines,
         "Address of an attention engine (host:port or unix:/path), may be repeated; a DNS name stands "
         "for an engine at each of its addresses")
      ->required()
      ->delimiter(',');
  app.add_option("--listen", o.listen, "HTTP address; put a reverse proxy in front for TLS")
      ->capture_default_str();
  app.add_option("--grpc-listen", o.grpc_listen, "gRPC address; \"\" for none")->capture_default_str();
  app.add_option("--model-id", o.model_id, "The model's name at the API (default: from the model file)");
  app.add_option("--api-key", o.api_key, "Ask clients for this key (better given as TANDEM_API_KEY)");
  app.add_flag("--cors", o.cors, "Let web pages of any origin call the API");
  app.add_option("--default-temperature", o.default_temperature,
                 "Where a request gives none; 0.6 is DeepSeek's advice for R1")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  app.add_option("--default-top-p", o.default_top_p, "Where a request gives none")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--max-requests", o.max_requests, "Sequences admitted at a time; beyond: 429")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--max-body-bytes", o.max_body_bytes, "Largest request body; beyond: 413")
      ->check(CLI::Range(size_t{1}, size_t{1} << 30))
      ->capture_default_str();
  app.add_option("--max-header-bytes", o.max_header_bytes, "Largest request head; beyond: 431")
      ->check(CLI::Range(size_t{256}, size_t{1} << 20))
      ->capture_default_str();
  app.add_option("--max-output-bytes", o.max_output_bytes,
                 "Unread bytes of a stream; a client that is further behind is cut off")
      ->check(CLI::Range(size_t{4096}, size_t{1} << 30))
      ->capture_default_str();
  app.add_option("--max-connections", o.max_connections, "HTTP connections at a time")
      ->check(CLI::Range(size_t{1}, size_t{1} << 20))
      ->capture_default_str();
  app.add_option("--http-threads", o.http_threads, "Threads for HTTP connections")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--worker-threads", o.worker_threads, "Threads for templates and tokenizing")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  const auto seconds = [&](const char* flag, double& value, const char* what) {
    app.add_option(flag, value, what)->check(CLI::Range(0.0, 1e6))->capture_default_str();
  };
  seconds("--idle-timeout", s.idle, "Seconds a connection may be idle");
  seconds("--read-timeout", s.read, "Seconds for a request's head, and for its body to go on");
  seconds("--write-timeout", s.write, "Seconds a client may read nothing");
  seconds("--request-timeout", s.request, "Seconds for a whole request; 0: no limit");
  seconds("--resume-timeout", s.resume, "Seconds that streams wait for a lost engine to come back");
  seconds("--drain-timeout", s.drain, "Seconds for running requests at SIGTERM");
  app.add_option("--tls-cert", o.grpc_tls.certificate_file, "PEM certificate of the gRPC server");
  app.add_option("--tls-key", o.grpc_tls.key_file, "Its key");
  app.add_option("--tls-ca", o.grpc_tls.ca_file, "Ask gRPC clients for certificates of this CA");
  app.add_option("--engine-tls-cert", o.engine_tls.certificate_file, "Our PEM certificate towards engines");
  app.add_option("--engine-tls-key", o.engine_tls.key_file, "Its key");
  app.add_option("--engine-tls-ca", o.engine_tls.ca_file, "CA of the engines' certificates");
  tandem::flags::AddEnvironmentAndFile(app);
}

}  // namespace

int main(int argc, char** argv) {
  tandem::rpc::PrepareProcess();
  GatewayOptions options;
  Seconds seconds;
  CLI::App app(
      "Tandem's gateway: OpenAI-compatible REST and gRPC in front of attention engines.\n"
      "Every flag can also be given as TANDEM_<FLAG> in the environment and, where it is not there either, "
      "in the\n"
      "file of --config.");
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
