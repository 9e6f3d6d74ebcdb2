// HTTP/1.1 server of the gateway: asynchronous, a few threads, any number of connections. What it is built on
// shows only in http/*.cc.
//
// A connection serves one request after the other (pipelined requests wait their turn). Requests whose head
// or body is too large, malformed or too slow are answered here (431, 413, 400, 408) with
// Options::error_body.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tandem::gateway {

using HeaderList = std::vector<std::pair<std::string, std::string>>;

struct Request {
  std::string method;  // "GET"; as sent
  std::string target;  // "/v1/models?x=1"; as sent
  HeaderList headers;  // names in lower case
  std::string body;

  std::string_view Header(std::string_view lower_case_name) const;  // "" if absent
  std::string_view Path() const;                                    // the target without its query
};

class Exchange;

// The answer to one request. Movable; every call may come from any thread, one at a time. A responder that is
// dropped without an answer answers 500; one dropped in the middle of a stream cuts the connection, so that
// the client sees that the stream is not whole.
class Responder {
 public:
  explicit Responder(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}
  ~Responder();
  Responder(Responder&&) = default;
  Responder& operator=(Responder&&) = delete;

  // A whole answer. For HEAD the body is counted and not sent.
  void Respond(int status, std::string_view content_type, std::string_view body,
               const HeaderList& headers = {});

  // A stream: chunked, or until the connection's end for HTTP/1.0.
  void StartStream(int status, std::string_view content_type, const HeaderList& headers = {});
  // False once the client is gone, or its unread bytes would pass Options::max_output_bytes: it is then cut
  // off, and the disconnect callback runs.
  bool Write(std::string_view bytes);
  void Finish();

  // Runs at most once, on a server thread, if the connection ends before the answer does; at once if it
  // already has. Set it before the answer is finished; it is dropped with the end of the answer.
  void OnDisconnect(std::function<void()> callback);
  bool disconnected() const;
  size_t unsent_bytes() const;

 private:
  std::shared_ptr<Exchange> exchange_;
};

// Called on a server thread: must not block. The responder may be kept as long as it takes.
using Handler = std::function<void(Request, Responder)>;

struct HttpServerOptions {
  std::string listen = "0.0.0.0:10002";  // "host:port", "[::]:port"; port 0: a free one
  int threads = 2;
  size_t max_header_bytes = 16 << 10;
  size_t max_body_bytes = 16 << 20;
  size_t max_output_bytes = 4 << 20;                 // unsent bytes of one answer that is streamed
  size_t max_connections = 16384;                    // beyond: closed at once
  absl::Duration idle_timeout = absl::Seconds(120);  // between requests
  absl::Duration read_timeout = absl::Seconds(30);   // for the head; for the body without any progress
  absl::Duration write_timeout = absl::Seconds(60);  // without any progress
  HeaderList extra_headers;                          // of every answer
  std::string error_content_type = "application/json";
  // The body of an answer that the server gives by itself.
  std::function<std::string(int status, std::string_view message)> error_body;
};

class HttpServer {
 public:
  // AlreadyExists names the address that is in use; InvalidArgument an address that is none.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const HttpServerOptions& options, Handler handler);
  ~HttpServer();  // cuts what is left

  int port() const;
  const std::string& address() const;  // "0.0.0.0:10002", port filled in
  size_t connections() const;

  // Stops accepting, closes idle connections, lets running answers end until the deadline, cuts the rest.
  void Shutdown(absl::Duration patience);

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// "Bad Request" of 400.
std::string_view ReasonPhrase(int status);

}  // namespace tandem::gateway
