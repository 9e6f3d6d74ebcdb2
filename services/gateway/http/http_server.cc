#include "services/gateway/http/http_server.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <thread>

#include "services/gateway/http/connection.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/post.hpp>

namespace tandem::gateway {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

absl::StatusOr<tcp::endpoint> ParseAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  const auto bad = [&text](const std::string& why) {
    return absl::InvalidArgumentError("listen address \"" + text + "\": " + why +
                                      "; expected HOST:PORT, for instance 127.0.0.1:10002 or [::]:10002");
  };
  if (colon == std::string::npos) return bad("has no port");
  std::string host = text.substr(0, colon);
  const std::string port_text = text.substr(colon + 1);
  unsigned port = 0;
  const auto [end, result] = std::from_chars(port_text.data(), port_text.data() + port_text.size(), port);
  if (result != std::errc() || end != port_text.data() + port_text.size() || port > 65535) {
    return bad("the port is not a number from 0 to 65535");
  }
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  if (host == "localhost") host = "127.0.0.1";
  if (host.empty() || host == "*") host = "0.0.0.0";
  error_code error;
  const asio::ip::address address = asio::ip::make_address(host, error);
  if (error) return bad("the host is not an IP address");
  return tcp::endpoint(address, static_cast<uint16_t>(port));
}

std::string AddressText(const tcp::endpoint& endpoint) {
  const std::string host = endpoint.address().to_string();
  const std::string port = std::to_string(endpoint.port());
  return endpoint.address().is_v6() ? "[" + host + "]:" + port : host + ":" + port;
}

}  // namespace

std::string_view Request::Header(std::string_view lower_case_name) const {
  for (const auto& [name, value] : headers) {
    if (name == lower_case_name) return value;
  }
  return {};
}

std::string_view Request::Path() const {
  std::string_view path = target;
  for (const std::string_view scheme : {"http://", "https://"}) {  // the absolute form, as proxies send it
    if (path.starts_with(scheme)) {
      path.remove_prefix(scheme.size());
      const size_t slash = path.find_first_of("/?");
      path =
          slash == std::string_view::npos || path[slash] == '?' ? std::string_view("/") : path.substr(slash);
      break;
    }
  }
  return path.substr(0, path.find_first_of("?#"));
}

struct HttpServer::Impl {
  explicit Impl(const HttpServerOptions& options)
      : io(std::max(options.threads, 1)),
        acceptor(io),
        retry(io),
        work(asio::make_work_guard(io)),
        state(std::make_shared<ServerState>()) {
    state->options = options;
  }

  asio::io_context io;
  tcp::acceptor acceptor;
  asio::steady_timer retry;
  asio::executor_work_guard<asio::io_context::executor_type> work;
  std::shared_ptr<ServerState> state;
  std::vector<std::thread> threads;
  std::string address;
  int port = 0;
  std::atomic<bool> stopped{false};

  void Accept() {
    acceptor.async_accept(asio::make_strand(io.get_executor()),
                          [this](error_code error, Connection::Socket socket) {
                            if (stopped.load()) return;
                            if (error == asio::error::operation_aborted) return;
                            if (error) return RetryAccept();  // out of descriptors, mostly
                            Adopt(std::move(socket));
                            Accept();
                          });
  }

  void RetryAccept() {
    retry.expires_after(std::chrono::milliseconds(100));
    retry.async_wait([this](error_code error) {
      if (!error && !stopped.load()) Accept();
    });
  }

  void Adopt(Connection::Socket socket) {
    std::shared_ptr<Connection> connection;
    {
      std::lock_guard lock(state->mutex);
      if (state->connections.size() >= state->options.max_connections) return;  // closes the socket
      connection = std::make_shared<Connection>(std::move(socket), state);
      state->connections.emplace(connection.get(), connection);
    }
    connection->Start();
  }

  std::vector<std::shared_ptr<Connection>> Connections() {
    std::vector<std::shared_ptr<Connection>> list;
    std::lock_guard lock(state->mutex);
    for (const auto& [pointer, weak] : state->connections) {
      if (std::shared_ptr<Connection> connection = weak.lock()) list.push_back(std::move(connection));
    }
    return list;
  }

  size_t Count() {
    std::lock_guard lock(state->mutex);
    return state->connections.size();
  }

  void StopAccepting() {
    if (stopped.exchange(true)) return;
    state->draining.store(true);
    asio::post(io, [this] {
      error_code ignored;
      acceptor.close(ignored);
      retry.cancel();
    });
  }

  bool WaitEmpty(absl::Time deadline) {
    while (Count() > 0) {
      if (absl::Now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }

  void Shutdown(absl::Duration patience) {
    if (threads.empty()) return;
    StopAccepting();
    for (const auto& connection : Connections()) connection->PostDrain();
    if (!WaitEmpty(absl::Now() + patience)) {
      for (const auto& connection : Connections()) connection->PostClose();
      WaitEmpty(absl::Now() + absl::Seconds(5));
    }
    work.reset();
    io.stop();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
    error_code ignored;
    acceptor.close(ignored);  // where the io_context was stopped before it came to that
  }
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() { impl_->Shutdown(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpServerOptions& options,
                                                              Handler handler) {
  absl::StatusOr<tcp::endpoint> endpoint = ParseAddress(options.listen);
  if (!endpoint.ok()) return endpoint.status();
  auto impl = std::make_unique<Impl>(options);
  impl->state->handler = std::move(handler);
  error_code error;
  impl->acceptor.open(endpoint->protocol(), error);
  if (!error) impl->acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) impl->acceptor.bind(*endpoint, error);
  if (!error) impl->acceptor.listen(4096, error);
  if (error == asio::error::address_in_use) {
    return absl::AlreadyExistsError("HTTP address " + AddressText(*endpoint) +
                                    " is already in use; choose another with --listen");
  }
  if (error == asio::error::access_denied) {
    return absl::PermissionDeniedError("HTTP address " + AddressText(*endpoint) + ": " + error.message());
  }
  if (error) {
    return absl::InvalidArgumentError("cannot listen on " + AddressText(*endpoint) + ": " + error.message());
  }
  const tcp::endpoint bound = impl->acceptor.local_endpoint(error);
  impl->address = AddressText(bound);
  impl->port = bound.port();
  impl->Accept();
  for (int i = 0; i < std::max(options.threads, 1); ++i) {
    impl->threads.emplace_back([io = &impl->io] { io->run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const { return impl_->port; }
const std::string& HttpServer::address() const { return impl_->address; }
size_t HttpServer::connections() const { return impl_->Count(); }
void HttpServer::Shutdown(absl::Duration patience) { impl_->Shutdown(patience); }

}  // namespace tandem::gateway
