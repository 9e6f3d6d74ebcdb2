// The gateway service: wires the rooms together, from start to a drained end.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/rpc/server.h"

namespace tandem::gateway {

struct GatewayOptions {
  std::vector<std::string> engines;           // addresses of attention engines, see EnginePool::Create
  std::string listen = "0.0.0.0:10002";       // HTTP
  std::string grpc_listen = "0.0.0.0:10003";  // empty: no gRPC
  std::string model_id;                       // empty: from the model's name
  std::string api_key;                        // empty: open to all
  bool cors = false;
  float default_temperature = 0.6f;
  float default_top_p = 0.95f;
  int max_requests = 256;  // sequences admitted at a time
  size_t max_body_bytes = 16 << 20;
  size_t max_header_bytes = 16 << 10;
  size_t max_output_bytes = 4 << 20;  // unsent bytes of one stream
  size_t max_connections = 16384;
  int http_threads = 2;
  int worker_threads = 2;
  absl::Duration idle_timeout = absl::Seconds(120);
  absl::Duration read_timeout = absl::Seconds(30);
  absl::Duration write_timeout = absl::Seconds(60);
  absl::Duration request_timeout = absl::InfiniteDuration();
  absl::Duration resume_timeout = absl::Seconds(30);
  // A long prompt takes minutes, and clients and proxies give up connections on which nothing comes: of a
  // stream the head (until then an error still gets a status code of its own), then comments in silence.
  absl::Duration stream_head_after = absl::Seconds(5);
  absl::Duration stream_comment_after = absl::Seconds(10);
  rpc::TlsOptions grpc_tls;    // of our gRPC server
  rpc::TlsOptions engine_tls;  // towards the engines
};

class Gateway {
 public:
  // Listens at once; /ready says when an engine serves. Errors name the address or option.
  static absl::StatusOr<std::unique_ptr<Gateway>> Start(const GatewayOptions& options);
  ~Gateway();

  int http_port() const;
  std::vector<std::string> grpc_addresses() const;
  bool ready() const;

  // Refuses new requests, lets those under way finish until the deadline, ends the rest with an error, closes
  // everything. True if nothing had to be cut off.
  bool Drain(absl::Duration patience);

 private:
  struct Impl;
  explicit Gateway(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::gateway
