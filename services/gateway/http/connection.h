// One connection of the HTTP server. Internal to http/.
#pragma once

#include <utility>  // Asio 1.74's awaitable.hpp uses std::exchange without including it

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "services/gateway/http/http_server.h"

namespace tandem::gateway {

class Connection;

// What all connections of a server share.
struct ServerState {
  HttpServerOptions options;
  Handler handler;
  std::atomic<bool> draining{false};

  std::mutex mutex;
  std::unordered_map<Connection*, std::weak_ptr<Connection>> connections;  // guarded by mutex
};

// State of one answer, shared by its Responder (any thread) and its connection (the strand).
class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(std::weak_ptr<Connection> connection, std::shared_ptr<const ServerState> state, bool head,
           bool http10, bool keep_alive);

  // For Responder.
  void Respond(int status, std::string_view content_type, std::string_view body, const HeaderList& headers);
  void StartStream(int status, std::string_view content_type, const HeaderList& headers);
  bool Write(std::string_view bytes);
  void Finish();
  void Drop();
  void OnDisconnect(std::function<void()> callback);
  bool disconnected() const;
  size_t unsent_bytes() const;

  // For the connection. Woken: a wake-up has arrived; true if the connection must be cut. TakeOutput: the
  // bytes to be sent; `finished` when there will be no more.
  bool Woken();
  std::string TakeOutput(bool* finished);
  void Sent(size_t bytes);
  void Disconnected();
  bool finished() const;
  bool keep_alive() const;

 private:
  enum class State { kOpen, kStreaming, kFinished, kGone };

  std::string Head(int status, std::string_view content_type, const HeaderList& headers,
                   std::optional<size_t> content_length);
  void Wake();

  const std::weak_ptr<Connection> connection_;
  const std::shared_ptr<const ServerState> state_;
  const bool head_;
  const bool http10_;

  mutable std::mutex mutex_;
  State phase_ = State::kOpen;
  bool keep_alive_;
  bool overflowed_ = false;  // or dropped in the middle of a stream
  bool wake_posted_ = false;
  std::string output_;
  size_t in_flight_ = 0;
  std::function<void()> on_disconnect_;
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Executor = boost::asio::strand<boost::asio::io_context::executor_type>;
  using Socket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, Executor>;

  Connection(Socket socket, std::shared_ptr<ServerState> state);
  ~Connection();

  void Start();
  // From any thread: look for output of the current exchange.
  void PostFlush();
  // From any thread: close if idle, else after the answer under way.
  void PostDrain();
  void PostClose();

 private:
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  enum class Phase { kIdle, kHead, kBody, kAnswer, kLinger, kClosed };

  void Read();
  void OnReadable(boost::system::error_code error);
  void PeerClosed();
  void Parse();
  bool CheckHead();
  void Dispatch();
  void Refuse(int status, std::string_view message);
  void Flush();
  void OnWritten(boost::system::error_code error, size_t bytes);
  void AnswerDone();
  void Linger();
  void Close();
  void Arm(absl::Duration timeout);
  void Disarm();
  void OnTimer();

  Socket socket_;
  boost::asio::steady_timer timer_;
  const std::shared_ptr<ServerState> state_;
  std::string input_;  // read and not parsed yet
  std::unique_ptr<Parser> parser_;
  std::shared_ptr<Exchange> exchange_;
  Phase phase_ = Phase::kIdle;
  bool reading_ = false;
  bool writing_ = false;
  bool peer_closed_ = false;
  bool close_after_answer_ = false;
  bool linger_after_answer_ = false;  // the peer may still be sending what was refused
  bool answer_finished_ = false;      // all of its bytes were taken from the exchange
  size_t lingered_ = 0;
  std::string raw_output_;  // outside of an exchange: "100 Continue"
  std::string writing_bytes_;
  size_t written_ = 0;             // of writing_bytes_
  size_t exchange_in_flight_ = 0;  // of writing_bytes_, from the exchange
};

}  // namespace tandem::gateway
