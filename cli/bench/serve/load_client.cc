#include "cli/bench/serve/load_client.h"

#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/beast.h"
#include "common/base/status_macros.h"

namespace tandem::cli {

// Beast 1.74 takes "none" for zero where an answer has a Content-Length.
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

struct LoadClient::State {
  State(asio::io_context& io, const Options& options) : io(io), options(options) {}
  asio::io_context& io;
  const Options options;
  tcp::resolver::results_type addresses;
  int64_t opened = 0;
  std::vector<std::shared_ptr<Connection>> idle;
  std::unordered_set<Connection*> active;  // each keeps itself alive by its pending operation
};

class LoadClient::Connection : public std::enable_shared_from_this<Connection> {
 public:
  explicit Connection(std::shared_ptr<State> state) : state_(std::move(state)), stream_(state_->io) {}

  void Start(std::string wire, std::shared_ptr<CallListener> listener) {
    state_->active.insert(this);
    wire_ = std::move(wire);
    listener_ = std::move(listener);
    begun_ = false;
    parser_.emplace();
    parser_->body_limit(kNoLimit);
    if (open_) {
      Write();
    } else {
      Connect();
    }
  }

  void Cancel() {
    cancelled_ = true;
    stream_.cancel();
  }

 private:
  void Connect() {
    ++state_->opened;
    stream_.expires_after(state_->options.timeout);
    stream_.async_connect(state_->addresses,
                          [self = shared_from_this()](error_code error, const tcp::endpoint&) {
                            if (error) return self->End(self->EndOf(error, CallEnd::kConnect), error);
                            error_code ignored;
                            self->stream_.socket().set_option(tcp::no_delay(true), ignored);
                            self->Write();
                          });
  }

  void Write() {
    stream_.expires_after(state_->options.timeout);
    asio::async_write(stream_, asio::buffer(wire_), [self = shared_from_this()](error_code error, size_t) {
      if (error) return self->Broken(error);
      self->ReadHead();
    });
  }

  void ReadHead() {
    http::async_read_header(
        stream_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) {
          if (error) return self->Broken(error);
          self->begun_ = true;
          const auto& head = self->parser_->get();
          const auto type = head[http::field::content_type];
          self->listener_->OnHead(static_cast<int>(head.result_int()), {type.data(), type.size()});
          self->Deliver();
        });
  }

  void Deliver() {
    std::string& body = parser_->get().body();
    if (!body.empty()) {
      listener_->OnBody(body, CallListener::Clock::now());
      body.clear();
    }
    if (parser_->is_done()) return End(CallEnd::kWhole, {});
    stream_.expires_after(state_->options.timeout);
    http::async_read_some(stream_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) {
      // What came before the end is handed on in any case.
      if (error && !self->parser_->is_done()) {
        std::string& rest = self->parser_->get().body();
        if (!rest.empty()) self->listener_->OnBody(rest, CallListener::Clock::now());
        return self->End(self->EndOf(error, CallEnd::kBroken), error);
      }
      self->Deliver();
    });
  }

  // A connection that was idle may have been closed by the server a moment before it was used: the call then
  // was not taken and goes out again.
  void Broken(error_code error) {
    if (open_ && !begun_ && !cancelled_ && error != beast::error::timeout) {
      open_ = false;
      stream_.close();
      buffer_.clear();
      parser_.emplace();
      parser_->body_limit(kNoLimit);
      return Connect();
    }
    End(EndOf(error, CallEnd::kBroken), error);
  }

  CallEnd EndOf(error_code error, CallEnd otherwise) const {
    if (cancelled_) return CallEnd::kCancelled;
    return error == beast::error::timeout ? CallEnd::kTimeout : otherwise;
  }

  void End(CallEnd end, error_code error) {
    const std::shared_ptr<Connection> self = shared_from_this();
    state_->active.erase(this);
    open_ = end == CallEnd::kWhole && parser_->get().keep_alive();
    parser_.reset();
    wire_ = std::string();
    if (open_) {
      stream_.expires_never();
      state_->idle.push_back(self);
    } else {
      stream_.close();
    }
    const std::shared_ptr<CallListener> listener = std::move(listener_);
    listener->OnEnd(end, error ? error.message() : std::string());
  }

  const std::shared_ptr<State> state_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  std::optional<http::response_parser<http::string_body>> parser_;
  std::string wire_;
  std::shared_ptr<CallListener> listener_;
  bool open_ = false;   // connected, by an earlier call
  bool begun_ = false;  // the answer has
  bool cancelled_ = false;
};

LoadClient::LoadClient(std::shared_ptr<State> state) : state_(std::move(state)) {}

LoadClient::~LoadClient() {
  CancelAll();
  state_->idle.clear();
}

absl::StatusOr<std::unique_ptr<LoadClient>> LoadClient::Create(asio::io_context& io, const Options& options) {
  auto state = std::make_shared<State>(io, options);
  TANDEM_ASSIGN_OR_RETURN(state->addresses, Resolve(io, options.url));
  return std::unique_ptr<LoadClient>(new LoadClient(std::move(state)));
}

void LoadClient::Call(const std::string& path, const std::string& json,
                      std::shared_ptr<CallListener> listener) {
  const Url& url = state_->options.url;
  std::string wire =
      absl::StrCat(json.empty() ? "GET " : "POST ", url.path, path, " HTTP/1.1\r\nHost: ", url.host, ":",
                   url.port, "\r\nUser-Agent: tandem\r\n");
  if (!state_->options.api_key.empty()) {
    absl::StrAppend(&wire, "Authorization: Bearer ", state_->options.api_key, "\r\n");
  }
  if (!json.empty()) {
    absl::StrAppend(&wire, "Content-Type: application/json\r\nContent-Length: ", json.size(), "\r\n");
  }
  absl::StrAppend(&wire, "\r\n", json);
  std::shared_ptr<Connection> connection;
  if (state_->idle.empty()) {
    connection = std::make_shared<Connection>(state_);
  } else {
    connection = std::move(state_->idle.back());  // the one used last: the others may time out in peace
    state_->idle.pop_back();
  }
  connection->Start(std::move(wire), std::move(listener));
}

void LoadClient::CancelAll() {
  const std::unordered_set<Connection*> active = state_->active;
  for (Connection* connection : active) connection->Cancel();
}

int64_t LoadClient::connections_opened() const { return state_->opened; }

}  // namespace tandem::cli
