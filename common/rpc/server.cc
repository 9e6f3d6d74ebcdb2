#include "common/rpc/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/support/server_interceptor.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/rpc/address.h"

namespace tandem::rpc {
namespace {

// Process-wide switches of gRPC: every server built after this has health and reflection.
void EnablePlugins() {
  static const bool done = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)done;
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> TcpCredentials(const TlsOptions& tls) {
  if (tls.certificate_file.empty()) {
    if (!tls.key_file.empty() || !tls.ca_file.empty()) {
      return absl::InvalidArgumentError("TLS: a key or a CA is given, but no certificate");
    }
    return grpc::InsecureServerCredentials();
  }
  if (tls.key_file.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("TLS: certificate ", tls.certificate_file, " is given without its key"));
  }
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  TANDEM_ASSIGN_OR_RETURN(pair.cert_chain, ReadPem(tls.certificate_file, "certificate"));
  TANDEM_ASSIGN_OR_RETURN(pair.private_key, ReadPem(tls.key_file, "key"));
  grpc::SslServerCredentialsOptions options(tls.ca_file.empty()
                                                ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  if (!tls.ca_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(options.pem_root_certs, ReadPem(tls.ca_file, "CA"));
  }
  options.pem_key_cert_pairs.push_back(std::move(pair));
  return grpc::SslServerCredentials(options);
}

void SetLimits(grpc::ServerBuilder& builder, int64_t max_message_bytes) {
  const int limit =
      static_cast<int>(std::clamp<int64_t>(max_message_bytes, 1, std::numeric_limits<int>::max()));
  builder.SetMaxReceiveMessageSize(limit);
  builder.SetMaxSendMessageSize(limit);
  // With port sharing two servers could be started at one port without noticing.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Dead peers are noticed after 40 s; clients may ping as often as ours do, with or without calls.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
}

// Socket files are made for the owner alone, from their first moment on.
class PrivateFiles {
 public:
  PrivateFiles() : old_(umask(0177)) {}
  ~PrivateFiles() { umask(old_); }

 private:
  mode_t old_;
};

// How many calls are running. What a health watcher has open for ever is not counted.
class RunningCalls {
 public:
  void Begin() {
    const std::lock_guard lock(mutex_);
    ++running_;
  }
  void End() {
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) changed_.notify_all();
  }
  // Returns true when none is running, false after StopWaiting.
  bool WaitForNone() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return running_ == 0 || !waiting_; });
    return waiting_;
  }
  void StopWaiting() {
    const std::lock_guard lock(mutex_);
    waiting_ = false;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t running_ = 0;
  bool waiting_ = true;
};

class CountedCall final : public grpc::experimental::Interceptor {
 public:
  explicit CountedCall(RunningCalls& calls) : calls_(calls) { calls_.Begin(); }
  ~CountedCall() override { calls_.End(); }
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override { methods->Proceed(); }

 private:
  RunningCalls& calls_;
};

class CallCounter final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit CallCounter(RunningCalls& calls) : calls_(calls) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override {
    if (std::strcmp(info->method(), "/grpc.health.v1.Health/Watch") == 0) return nullptr;
    return new CountedCall(calls_);
  }

 private:
  RunningCalls& calls_;
};

struct Listener {
  std::string address;
  std::optional<std::string> unix_path;
  HostPort tcp;
  int bound_port = 0;  // gRPC: 0 if it failed, 1 for a Unix socket
};

absl::StatusOr<std::vector<Listener>> CheckListeners(const std::vector<std::string>& listen) {
  if (listen.empty()) return absl::InvalidArgumentError("no address to listen at");
  std::vector<Listener> out;
  for (const std::string& address : listen) {
    Listener listener;
    listener.address = address;
    listener.unix_path = UnixPath(address);
    if (listener.unix_path.has_value()) {
      TANDEM_RETURN_IF_ERROR(PrepareUnixPath(*listener.unix_path));
    } else {
      TANDEM_ASSIGN_OR_RETURN(listener.tcp, ParseHostPort(address));
      TANDEM_RETURN_IF_ERROR(ProbeListen(address));
    }
    out.push_back(std::move(listener));
  }
  return out;
}

}  // namespace

struct Server::Impl {
  RunningCalls running;  // outlives the server
  std::unique_ptr<grpc::Server> server;
  std::vector<std::string> addresses;
  std::vector<std::string> health_names;
  std::mutex mutex;
  bool stopped = false;

  void SetServing(bool serving) {
    auto* const health = server->GetHealthCheckService();
    if (health == nullptr) return;
    for (const std::string& name : health_names) health->SetServingStatus(name, serving);
    health->SetServingStatus(serving);
  }

  void Stop(absl::Duration patience) {
    {
      const std::lock_guard lock(mutex);
      if (stopped) return;
      stopped = true;
    }
    SetServing(false);
    // Without calls there is nothing to be patient for: gRPC by itself would wait until every idle client has
    // answered its farewell, which C++ clients do only every five seconds.
    const bool patient = patience > absl::ZeroDuration();
    std::thread hurry([this, patient] {
      if (!patient || !running.WaitForNone()) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the last answers are on their way
      if (running.WaitForNone()) grpc_server_cancel_all_calls(server->c_server());
    });
    // The clock has no infinite time.
    const auto wait =
        absl::ToChronoNanoseconds(std::clamp(patience, absl::ZeroDuration(), absl::Hours(10000)));
    server->Shutdown(std::chrono::system_clock::now() +
                     std::chrono::duration_cast<std::chrono::system_clock::duration>(wait));
    server->Wait();
    running.StopWaiting();
    hurry.join();
  }
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { impl_->Stop(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      const std::vector<grpc::Service*>& services) {
  KeepGrpc();
  EnablePlugins();
  TANDEM_ASSIGN_OR_RETURN(auto tcp_credentials, TcpCredentials(options.tls));
  TANDEM_ASSIGN_OR_RETURN(std::vector<Listener> listeners, CheckListeners(options.listen));
  grpc::ServerBuilder builder;
  SetLimits(builder, options.max_message_bytes);
  for (Listener& listener : listeners) {
    const bool tcp = !listener.unix_path.has_value();
    builder.AddListeningPort(tcp ? listener.tcp.ToString() : absl::StrCat("unix:", *listener.unix_path),
                             tcp ? tcp_credentials : grpc::InsecureServerCredentials(), &listener.bound_port);
  }
  for (grpc::Service* service : services) builder.RegisterService(service);
  auto impl = std::make_unique<Impl>();
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(std::make_unique<CallCounter>(impl->running));
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  {
    const PrivateFiles owner_only;
    impl->server = builder.BuildAndStart();
  }
  if (impl->server == nullptr) {
    for (const Listener& listener : listeners) {
      if (listener.bound_port != 0) continue;
      if (!listener.unix_path.has_value()) TANDEM_RETURN_IF_ERROR(ProbeListen(listener.address));
      if (!listener.unix_path.has_value() && !options.tls.certificate_file.empty()) {
        return absl::InvalidArgumentError(absl::StrCat("TLS: certificate ", options.tls.certificate_file,
                                                       " and key ", options.tls.key_file,
                                                       " do not load or do not belong together"));
      }
      return absl::UnavailableError(absl::StrCat("cannot listen at ", listener.address));
    }
    return absl::InternalError("the gRPC server does not start");
  }
  impl->health_names = options.health_names;
  impl->SetServing(false);
  for (const Listener& listener : listeners) {
    if (listener.unix_path.has_value()) {
      impl->addresses.push_back(absl::StrCat("unix:", *listener.unix_path));
      continue;
    }
    HostPort client = listener.tcp;
    if (client.IsWildcard()) client.host = "localhost";
    client.port = listener.bound_port;
    impl->addresses.push_back(client.ToString());
  }
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

const std::vector<std::string>& Server::addresses() const { return impl_->addresses; }

void Server::SetServing(bool serving) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->stopped) return;
  impl_->SetServing(serving);
}

void Server::Shutdown(absl::Duration patience) { impl_->Stop(patience); }

}  // namespace tandem::rpc
