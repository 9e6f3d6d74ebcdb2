// A gRPC server as every Tandem service runs one: TCP and Unix socket listeners, optional (mutual) TLS,
// health, reflection, message limits, keepalive, graceful stop.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace grpc {
class Service;
}

namespace tandem::rpc {

struct TlsOptions {
  std::string certificate_file;  // PEM; empty: no TLS
  std::string key_file;
  std::string ca_file;  // server: asks clients for certificates of this CA; client: trusts it
};

// "127.0.0.1:10010", "[::]:10010", "unix:/run/tandem/expert0.sock". A port of 0 picks a free one.
struct ServerOptions {
  std::vector<std::string> listen;
  TlsOptions tls;  // for TCP listeners; Unix sockets are never encrypted
  int64_t max_message_bytes = 256 << 20;
  // Services whose health can be asked by name, "tandem.v1.Engine"; that of the empty name always can.
  std::vector<std::string> health_names;
};

class Server {
 public:
  // Services must outlive the server. AlreadyExists names the address that is in use; a stale Unix socket
  // file (nobody listens) is replaced.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       const std::vector<grpc::Service*>& services);
  ~Server();  // stops at once

  // The addresses that clients can use, ports filled in.
  const std::vector<std::string>& addresses() const;
  // grpc.health.v1, of all names: NOT_SERVING until set.
  void SetServing(bool serving);
  // No new calls; running ones may finish until the deadline, then they are cancelled.
  void Shutdown(absl::Duration patience);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::rpc
