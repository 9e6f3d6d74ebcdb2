#include "cli/bench/serve/idle_crowd.h"

#include <boost/asio/steady_timer.hpp>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/beast.h"
#include "common/base/status_macros.h"

namespace tandem::cli {

namespace {

constexpr int kOpeningAtATime = 64;
constexpr std::chrono::seconds kAnswerPatience{60};

class Member;

}  // namespace

struct IdleCrowd::State {
  explicit State(asio::io_context& io) : io(io) {}
  asio::io_context& io;
  tcp::resolver::results_type addresses;
  std::string wire;
  std::chrono::milliseconds every{0};
  std::function<void()> on_open;
  Counts counts;
  int64_t begun = 0;    // connections that were tried
  int64_t decided = 0;  // of those, that have been opened or refused
  bool stopping = false;
  std::vector<std::weak_ptr<Member>> members;
};

namespace {

using State = IdleCrowd::State;

void OpenNext(const std::shared_ptr<State>& state);

class Member : public std::enable_shared_from_this<Member> {
 public:
  explicit Member(std::shared_ptr<State> state)
      : state_(std::move(state)), stream_(state_->io), timer_(state_->io) {}

  void Connect() {
    stream_.expires_after(kAnswerPatience);
    stream_.async_connect(state_->addresses,
                          [self = shared_from_this()](error_code error, const tcp::endpoint&) {
                            if (error) return self->Lost();
                            self->AskHealth();
                          });
  }

  void Stop() {
    timer_.cancel();
    stream_.close();
  }

 private:
  void AskHealth() {
    if (state_->stopping) return;
    asking_ = true;
    stream_.expires_after(kAnswerPatience);
    asio::async_write(stream_, asio::buffer(state_->wire),
                      [self = shared_from_this()](error_code error, size_t) {
                        if (error) return self->Lost();
                        if (!self->waiting_) self->ReadAnswer();
                      });
  }

  // Wakes for the next answer and for the end of the connection: no buffer is held meanwhile.
  void Wait() {
    waiting_ = true;
    stream_.socket().async_wait(tcp::socket::wait_read, [self = shared_from_this()](error_code error) {
      self->waiting_ = false;
      if (self->state_->stopping) return;
      if (error || !self->asking_) return self->Lost();  // nothing is expected: it is the end
      self->ReadAnswer();
    });
  }

  void ReadAnswer() {
    parser_.emplace();
    http::async_read(stream_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) {
      if (error || self->parser_->get().result_int() != 200) return self->Lost();
      const bool keep = self->parser_->get().keep_alive();
      self->parser_.reset();
      self->buffer_ = beast::flat_buffer();
      self->Answered(keep);
    });
  }

  void Answered(bool keep) {
    ++state_->counts.requests;
    asking_ = false;
    Decide(true);
    if (!keep) return Lost();
    stream_.expires_never();
    Wait();
    if (state_->every.count() <= 0) return;
    timer_.expires_after(state_->every);
    timer_.async_wait([self = shared_from_this()](error_code error) {
      if (!error && self->held_) self->AskHealth();
    });
  }

  void Decide(bool open) {
    if (decided_) return;
    decided_ = true;
    held_ = open;
    ++(open ? state_->counts.open : state_->counts.refused);
    ++state_->decided;
    OpenNext(state_);
    if (state_->decided == state_->counts.wanted && state_->on_open) state_->on_open();
  }

  void Lost() {
    if (state_->stopping) return;
    if (held_) {
      held_ = false;
      --state_->counts.open;
      ++state_->counts.dropped;
    }
    Decide(false);
    Stop();
  }

  const std::shared_ptr<State> state_;
  beast::tcp_stream stream_;
  asio::steady_timer timer_;
  beast::flat_buffer buffer_;
  std::optional<http::response_parser<http::string_body>> parser_;
  bool asking_ = false;
  bool waiting_ = false;
  bool decided_ = false;
  bool held_ = false;
};

void OpenNext(const std::shared_ptr<State>& state) {
  while (!state->stopping && state->begun < state->counts.wanted &&
         state->begun - state->decided < kOpeningAtATime) {
    ++state->begun;
    auto member = std::make_shared<Member>(state);
    state->members.push_back(member);
    member->Connect();
  }
}

}  // namespace

IdleCrowd::IdleCrowd(std::shared_ptr<State> state) : state_(std::move(state)) {}
IdleCrowd::~IdleCrowd() { Stop(); }
IdleCrowd::Counts IdleCrowd::counts() const { return state_->counts; }

absl::StatusOr<std::unique_ptr<IdleCrowd>> IdleCrowd::Start(asio::io_context& io, const Url& url,
                                                            int64_t count, std::chrono::milliseconds every,
                                                            std::function<void()> on_open) {
  auto state = std::make_shared<State>(io);
  TANDEM_ASSIGN_OR_RETURN(state->addresses, Resolve(io, url));
  state->wire =
      absl::StrCat("GET ", url.path, "/health HTTP/1.1\r\nHost: ", url.host, ":", url.port, "\r\n\r\n");
  state->every = every;
  state->on_open = std::move(on_open);
  state->counts.wanted = count;
  OpenNext(state);
  return std::unique_ptr<IdleCrowd>(new IdleCrowd(std::move(state)));
}

void IdleCrowd::Stop() {
  if (std::exchange(state_->stopping, true)) return;
  for (const auto& weak : state_->members) {
    if (const auto member = weak.lock()) member->Stop();
  }
}

}  // namespace tandem::cli
