#include "services/gateway/http/connection.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <boost/beast/http/error.hpp>
#include <cctype>
#include <string>

namespace tandem::gateway {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr size_t kReadChunk = 64 << 10;
constexpr size_t kMaxPipelined = 64 << 10;  // bytes read ahead while an answer is under way
constexpr size_t kMaxLinger = 4 << 20;      // bytes of a refused body that are read and thrown away
constexpr absl::Duration kLingerTime = absl::Seconds(2);

std::string Lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::string_view View(boost::beast::string_view text) { return {text.data(), text.size()}; }

}  // namespace

Connection::Connection(Socket socket, std::shared_ptr<ServerState> state)
    : socket_(std::move(socket)), timer_(socket_.get_executor()), state_(std::move(state)) {}

Connection::~Connection() {
  if (exchange_ != nullptr) exchange_->Disconnected();
  std::lock_guard lock(state_->mutex);
  state_->connections.erase(this);
}

void Connection::Start() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    error_code ignored;
    self->socket_.non_blocking(true, ignored);
    self->socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
    self->Arm(self->state_->options.idle_timeout);
    self->Read();
  });
}

void Connection::PostFlush() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->exchange_ != nullptr && self->exchange_->Woken()) return self->Close();
    self->Flush();
  });
}

void Connection::PostDrain() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->close_after_answer_ = true;
    if (self->phase_ == Phase::kIdle) self->Close();
  });
}

void Connection::PostClose() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] { self->Close(); });
}

void Connection::Arm(absl::Duration timeout) {
  timer_.expires_after(absl::ToChronoNanoseconds(timeout));
  timer_.async_wait([self = shared_from_this()](error_code error) {
    if (!error && self->timer_.expiry() <= std::chrono::steady_clock::now()) self->OnTimer();
  });
}

void Connection::Disarm() { timer_.expires_at(std::chrono::steady_clock::time_point::max()); }

void Connection::OnTimer() {
  switch (phase_) {
    case Phase::kHead:
      Refuse(408, "the request's headers did not arrive in time");
      break;
    case Phase::kBody:
      Refuse(408, "the request's body did not arrive in time");
      break;
    case Phase::kAnswer:
      if (writing_) Close();  // the client does not read
      break;
    default:
      Close();
  }
}

// Waits for bytes without holding a buffer for them: an idle connection costs its own state only.
void Connection::Read() {
  if (reading_ || peer_closed_ || phase_ == Phase::kClosed) return;
  if (phase_ == Phase::kAnswer && input_.size() >= kMaxPipelined) return;
  reading_ = true;
  socket_.async_wait(Socket::wait_read,
                     [self = shared_from_this()](error_code error) { self->OnReadable(error); });
}

void Connection::OnReadable(error_code error) {
  reading_ = false;
  if (phase_ == Phase::kClosed) return;
  if (error) return Close();
  thread_local char chunk[kReadChunk];
  const size_t bytes = socket_.read_some(asio::buffer(chunk), error);
  if (error == asio::error::would_block || error == asio::error::try_again) return Read();
  if (error == asio::error::eof) return PeerClosed();
  if (error) return Close();
  if (phase_ == Phase::kLinger) {
    lingered_ += bytes;
    if (lingered_ > kMaxLinger) return Close();
    return Read();
  }
  input_.append(chunk, bytes);
  if (phase_ == Phase::kBody) Arm(state_->options.read_timeout);
  if (phase_ != Phase::kAnswer) Parse();
  Read();
}

// A client that closes its side before the answer is complete is taken as gone: a half-closed connection
// cannot be told from one whose client does not exist any more.
void Connection::PeerClosed() {
  peer_closed_ = true;
  if (phase_ != Phase::kAnswer || exchange_ == nullptr || !exchange_->finished()) return Close();
  close_after_answer_ = input_.empty();
}

void Connection::Parse() {
  if (phase_ == Phase::kIdle) {
    // Empty lines before a request line are let pass (RFC 9112, 2.2).
    size_t skip = 0;
    while (skip < input_.size() && (input_[skip] == '\r' || input_[skip] == '\n')) ++skip;
    input_.erase(0, skip);
    if (input_.empty()) return;
    phase_ = Phase::kHead;
    Arm(state_->options.read_timeout);
    parser_ = std::make_unique<Parser>();
    parser_->eager(true);
    parser_->header_limit(static_cast<std::uint32_t>(state_->options.max_header_bytes));
    parser_->body_limit(state_->options.max_body_bytes);
  }
  error_code error;
  const size_t consumed = parser_->put(asio::const_buffer(input_.data(), input_.size()), error);
  input_.erase(0, consumed);
  if (error == http::error::need_more) error = {};
  if (error) {
    if (error == http::error::header_limit) {
      return Refuse(431, "the request's headers are larger than " +
                             std::to_string(state_->options.max_header_bytes) + " bytes");
    }
    if (error == http::error::body_limit) {
      return Refuse(413, "the request's body is larger than " +
                             std::to_string(state_->options.max_body_bytes) + " bytes");
    }
    if (error == http::error::bad_version) return Refuse(505, "only HTTP/1.1 and HTTP/1.0 are spoken here");
    return Refuse(400, "malformed HTTP request: " + error.message());
  }
  if (phase_ == Phase::kHead && parser_->is_header_done() && !CheckHead()) return;
  if (parser_->is_done()) return Dispatch();
  // What the parser leaves is the beginning of one line (a chunk's size, trailers): those are short.
  if (input_.size() > std::max(state_->options.max_header_bytes, size_t{1024})) {
    Refuse(400, "malformed HTTP request: an endless line in a chunked body");
  }
}

bool Connection::CheckHead() {
  phase_ = Phase::kBody;
  const auto& message = parser_->get();
  if (message.version() >= 11 && message.count(http::field::host) != 1) {
    Refuse(400, "an HTTP/1.1 request needs one Host header");
    return false;
  }
  if (message.count(http::field::transfer_encoding) != 0 && !parser_->chunked()) {
    Refuse(501, "the only transfer encoding that is understood is chunked");
    return false;
  }
  if (const auto expect = message.find(http::field::expect); expect != message.end()) {
    if (Lower(View(expect->value())) != "100-continue") {
      Refuse(417, "the only expectation that is understood is 100-continue");
      return false;
    }
    if (!parser_->is_done() && message.version() >= 11) {
      raw_output_ += "HTTP/1.1 100 Continue\r\n\r\n";
      Flush();
    }
  }
  return true;
}

void Connection::Dispatch() {
  auto& message = parser_->get();
  Request request;
  request.method.assign(message.method_string().data(), message.method_string().size());
  request.target.assign(message.target().data(), message.target().size());
  for (const auto& field : message) {
    request.headers.emplace_back(Lower(View(field.name_string())), std::string(View(field.value())));
  }
  request.body = std::move(message.body());
  const bool http10 = message.version() < 11;
  const bool keep_alive = message.keep_alive() && !close_after_answer_;
  parser_.reset();
  phase_ = Phase::kAnswer;
  answer_finished_ = false;
  Disarm();
  exchange_ =
      std::make_shared<Exchange>(weak_from_this(), state_, request.method == "HEAD", http10, keep_alive);
  state_->handler(std::move(request), Responder(exchange_));
  if (peer_closed_ && !exchange_->finished()) Close();
}

void Connection::Refuse(int status, std::string_view message) {
  parser_.reset();
  input_ = std::string();
  phase_ = Phase::kAnswer;
  answer_finished_ = false;
  close_after_answer_ = linger_after_answer_ = true;
  exchange_ = std::make_shared<Exchange>(weak_from_this(), state_, false, false, /*keep_alive=*/false);
  std::string body;
  if (state_->options.error_body) body = state_->options.error_body(status, message);
  Responder(exchange_).Respond(status, state_->options.error_content_type, body);
}

void Connection::Flush() {
  if (writing_ || phase_ == Phase::kClosed) return;
  if (written_ == writing_bytes_.size()) {
    writing_bytes_.clear();
    writing_bytes_.swap(raw_output_);
    written_ = 0;
    if (phase_ == Phase::kAnswer && exchange_ != nullptr && !answer_finished_) {
      const std::string bytes = exchange_->TakeOutput(&answer_finished_);
      exchange_in_flight_ = bytes.size();
      writing_bytes_.append(bytes);
    }
    if (writing_bytes_.empty()) {
      if (phase_ == Phase::kAnswer && answer_finished_) AnswerDone();
      return;
    }
  }
  writing_ = true;
  if (phase_ == Phase::kAnswer) Arm(state_->options.write_timeout);
  socket_.async_write_some(
      asio::buffer(writing_bytes_.data() + written_, writing_bytes_.size() - written_),
      [self = shared_from_this()](error_code error, size_t bytes) { self->OnWritten(error, bytes); });
}

void Connection::OnWritten(error_code error, size_t bytes) {
  writing_ = false;
  if (phase_ == Phase::kClosed) return;
  if (error) return Close();
  written_ += bytes;
  if (phase_ == Phase::kAnswer) {
    Disarm();
    if (written_ == writing_bytes_.size() && exchange_ != nullptr) {
      exchange_->Sent(exchange_in_flight_);
      exchange_in_flight_ = 0;
    }
  }
  Flush();
}

void Connection::AnswerDone() {
  const bool keep_alive = exchange_->keep_alive() && !close_after_answer_;
  exchange_.reset();
  writing_bytes_ = std::string();
  written_ = 0;
  if (!keep_alive) return linger_after_answer_ ? Linger() : Close();
  phase_ = Phase::kIdle;
  if (input_.empty()) {
    input_ = std::string();
    if (peer_closed_ || state_->draining.load(std::memory_order_relaxed)) return Close();
  }
  Arm(state_->options.idle_timeout);
  // The next pipelined request; posted, so that a long pipeline does not nest.
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->phase_ == Phase::kIdle && !self->input_.empty()) self->Parse();
    if (self->peer_closed_ && self->phase_ != Phase::kAnswer) return self->Close();
    self->Read();
  });
}

// Closing a socket with unread input resets the connection, and the answer may be lost on its way.
void Connection::Linger() {
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  phase_ = Phase::kLinger;
  if (peer_closed_) return Close();
  Arm(kLingerTime);
  Read();
}

void Connection::Close() {
  if (phase_ == Phase::kClosed) return;
  phase_ = Phase::kClosed;
  error_code ignored;
  timer_.cancel();
  socket_.shutdown(asio::ip::tcp::socket::shutdown_both, ignored);
  socket_.close(ignored);
  parser_.reset();
  if (const std::shared_ptr<Exchange> exchange = std::move(exchange_)) exchange->Disconnected();
}

}  // namespace tandem::gateway
