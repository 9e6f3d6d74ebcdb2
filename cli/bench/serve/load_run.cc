#include "cli/bench/serve/load_run.h"

#include <sys/resource.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cmath>
#include <csignal>
#include <functional>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/bench/serve/load_client.h"
#include "cli/bench/serve/prefix_ideal.h"
#include "cli/chat/stream.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

using Clock = CallListener::Clock;
using boost::system::error_code;

constexpr size_t kLongestErrorBody = 4096;
// Of a client of a closed loop, after a failure: a server that refuses is not asked again at once.
constexpr std::chrono::milliseconds kPauseAfterFailure{100};

// Thousands of connections need as many descriptors; the soft limit is 1024 mostly.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

class Run;

// A request under way.
class Exchange final : public CallListener {
 public:
  Exchange(Run* run, RequestOutcome outcome, const ExpectedAnswer& expected, Clock::time_point due)
      : outcome(std::move(outcome)), due(due), answer(expected), run_(run) {}

  void OnHead(int status, std::string_view content_type) override {
    status_ = status;
    stream_ = content_type.starts_with("text/event-stream");
  }
  void OnBody(std::string_view bytes, Clock::time_point now) override {
    if (status_ == 200 && stream_) {
      answer.Feed(bytes, now);
    } else if (error_body_.size() < kLongestErrorBody) {
      error_body_.append(bytes);
    }
  }
  void OnEnd(CallEnd end, const std::string& message) override;

  RequestOutcome outcome;
  const Clock::time_point due;
  StreamedAnswer answer;
  std::string body;         // of the request, where it may be asked again
  uint64_t prompt_key = 0;  // equal for equal greedy requests; 0: not to be compared

 private:
  void Judge(CallEnd end, const std::string& message);

  Run* const run_;
  int status_ = 0;
  bool stream_ = false;
  std::string error_body_;
};

class Run {
 public:
  Run(const LoadPlan& plan, Workload workload)
      : plan_(plan),
        options_(plan.options),
        workload_(std::move(workload)),
        ideal_(std::max<int64_t>(
            1, std::llround(static_cast<double>(options_.page_tokens) / plan.facts.tokens_per_word))),
        timer_(io_),
        signals_(io_, SIGINT) {}

  absl::StatusOr<LoadResults> Go();
  void Ended(Exchange& exchange);

 private:
  struct Sample {
    int64_t index;
    std::string body;
    std::string text;
    ExpectedAnswer expected;
  };

  void Begin();
  void OpenLoop();
  void Send(const PlannedRequest& request, Clock::time_point due);
  // The next request of a closed loop's client, if there is one.
  void SendNext();
  void SendNextAfterPause();
  // Whether one more request may begin now.
  bool MayBegin() const;
  ExpectedAnswer Expect(const PlannedRequest& request) const;
  void Keep(Exchange& exchange);
  void Compare(const Exchange& exchange);
  void AskAgain();
  void Finish();

  const LoadPlan& plan_;
  const ServeLoadOptions& options_;
  Workload workload_;
  PrefixIdeal ideal_;
  boost::asio::io_context io_{1};
  boost::asio::steady_timer timer_;
  boost::asio::signal_set signals_;
  std::unique_ptr<LoadClient> client_;
  std::unique_ptr<IdleCrowd> crowd_;

  LoadResults results_;
  Clock::time_point start_;
  Clock::time_point last_end_;
  std::optional<PlannedRequest> next_;  // of an open loop
  int64_t sent_ = 0;
  int64_t under_way_ = 0;
  int64_t pausing_ = 0;     // clients of a closed loop
  bool exhausted_ = false;  // the workload has no more
  int64_t good_ = 0;
  std::vector<Sample> samples_;                                      // a fair draw of the good answers
  size_t again_ = 0;                                                 // of those, asked again
  std::map<uint64_t, std::pair<int64_t, std::string>> first_texts_;  // by prompt_key
};

void Exchange::Judge(CallEnd end, const std::string& message) {
  switch (end) {
    case CallEnd::kConnect:
      outcome.failure = "no connection";
      outcome.detail = message;
      return;
    case CallEnd::kTimeout:
      outcome.failure = "timeout";
      outcome.detail = "no byte for too long";
      return;
    case CallEnd::kCancelled:
      outcome.failure = "interrupted";
      return;
    case CallEnd::kBroken:
    case CallEnd::kWhole:
      break;
  }
  if (status_ == 0) {
    outcome.failure = "no answer";
    outcome.detail = message;
  } else if (status_ != 200) {
    outcome.failure = absl::StrCat("http ", status_);
    outcome.detail = ErrorMessage(error_body_);
  } else if (!stream_) {
    outcome.failure = "malformed stream";
    outcome.detail = "the answer is no event stream: " + ErrorMessage(error_body_);
  } else if (const std::optional<Fault> fault = answer.Finish(end == CallEnd::kWhole)) {
    outcome.failure = fault->kind;
    outcome.detail = fault->detail;
  }
}

void Exchange::OnEnd(CallEnd end, const std::string& message) {
  Judge(end, message);
  outcome.end = Seconds(Clock::now() - due);
  if (answer.first().has_value()) outcome.first = Seconds(*answer.first() - due);
  outcome.prompt_tokens = answer.prompt_tokens();
  outcome.cached_tokens = answer.cached_tokens();
  outcome.completion_tokens = answer.completion_tokens();
  if (outcome.completion_tokens > 1 && answer.last().has_value()) {
    outcome.mean_gap =
        Seconds(*answer.last() - *answer.first()) / static_cast<double>(outcome.completion_tokens - 1);
  }
  run_->Ended(*this);
}

ExpectedAnswer Run::Expect(const PlannedRequest& request) const {
  ExpectedAnswer expected;
  expected.chat = options_.api == "chat";
  expected.max_tokens = request.output_tokens;
  expected.exact = options_.ignore_eos;
  if (!plan_.facts.tokens.empty()) expected.prompt_tokens = static_cast<int64_t>(request.prompt.size());
  return expected;
}

bool Run::MayBegin() const {
  if (results_.interrupted || exhausted_) return false;
  if (options_.requests > 0 && sent_ >= options_.requests) return false;
  return true;
}

void Run::Send(const PlannedRequest& request, Clock::time_point due) {
  const int64_t index = sent_++;
  RequestOutcome outcome;
  outcome.index = index;
  outcome.due = Seconds(due - start_);
  const double tokens_per_unit = plan_.facts.tokens_per_word;
  const auto tokens = [&](int64_t units) {
    return static_cast<int64_t>(std::llround(static_cast<double>(units) * tokens_per_unit));
  };
  outcome.asked_prompt = tokens(static_cast<int64_t>(request.prompt.size()));
  outcome.asked_output = request.output_tokens;
  outcome.ideal_cached = tokens(ideal_.Add(request.prompt));
  const uint64_t seed = Mix(static_cast<uint64_t>(options_.seed)) % 1'000'000 + static_cast<uint64_t>(index);
  std::string body =
      RequestBody(options_, plan_.facts, request.prompt, request.output_tokens, seed, /*stream=*/true);
  const auto exchange = std::make_shared<Exchange>(this, std::move(outcome), Expect(request), due);
  if (options_.verify > 0) {
    if (options_.temperature == 0) {
      exchange->prompt_key = 1;
      for (const int32_t unit : request.prompt) {
        exchange->prompt_key = Mix(exchange->prompt_key ^ static_cast<uint32_t>(unit));
      }
      exchange->prompt_key = Mix(exchange->prompt_key ^ static_cast<uint64_t>(request.output_tokens)) | 1;
    }
    exchange->body = body;
  }
  exchange->outcome.lateness = Seconds(Clock::now() - due);
  results_.most_under_way = std::max(results_.most_under_way, ++under_way_);
  client_->Call(RequestPath(options_), body, exchange);
}

// Sends what is due, then sleeps until the next arrival, whatever the answers do meanwhile.
void Run::OpenLoop() {
  while (MayBegin()) {
    if (!next_.has_value()) next_ = workload_.Next();
    if (!next_.has_value() || (options_.duration > 0 && next_->arrival > options_.duration)) {
      exhausted_ = true;
      break;
    }
    const Clock::time_point due =
        start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(next_->arrival));
    if (due > Clock::now()) {
      timer_.expires_at(due);
      timer_.async_wait([this](error_code error) {
        if (!error) OpenLoop();
      });
      return;
    }
    const PlannedRequest request = *std::exchange(next_, std::nullopt);
    Send(request, due);
  }
  exhausted_ = true;
  if (under_way_ == 0) AskAgain();
}

void Run::Begin() {
  start_ = last_end_ = Clock::now();
  if (options_.concurrency == 0) return OpenLoop();
  for (int64_t i = 0; i < options_.concurrency && MayBegin(); ++i) {
    const std::optional<PlannedRequest> request = workload_.Next();
    if (!request.has_value()) {
      exhausted_ = true;
      break;
    }
    Send(*request, Clock::now());
  }
  if (under_way_ == 0) AskAgain();
}

// Algorithm R: every good answer is in the sample with the same probability.
void Run::Keep(Exchange& exchange) {
  if (options_.verify == 0) return;
  const int64_t seen = good_++;
  const Sample sample{exchange.outcome.index,
                      std::move(exchange.body),
                      exchange.answer.text(),
                      {.chat = options_.api == "chat",
                       .max_tokens = exchange.outcome.asked_output,
                       .exact = options_.ignore_eos,
                       .prompt_tokens = 0}};
  if (seen < options_.verify) {
    samples_.push_back(sample);
    return;
  }
  const uint64_t place = Mix(static_cast<uint64_t>(options_.seed) ^ Mix(static_cast<uint64_t>(seen))) %
                         static_cast<uint64_t>(seen + 1);
  if (place < samples_.size()) samples_[place] = sample;
}

void Run::Compare(const Exchange& exchange) {
  if (exchange.prompt_key == 0) return;
  const auto [it, fresh] = first_texts_.try_emplace(
      exchange.prompt_key, std::pair(exchange.outcome.index, exchange.answer.text()));
  if (fresh) return;
  ++results_.verify.repeated;
  if (it->second.second == exchange.answer.text()) return;
  ++results_.verify.repeated_differing;
  if (results_.verify.first_difference.empty()) {
    results_.verify.first_difference = absl::StrCat("requests ", it->second.first, " and ",
                                                    exchange.outcome.index, " are equal, their answers not");
  }
}

void Run::Ended(Exchange& exchange) {
  --under_way_;
  last_end_ = Clock::now();
  const bool failed = !exchange.outcome.failure.empty();
  if (!failed) {
    for (const float gap : exchange.answer.gaps()) results_.gaps.push_back(gap);
    Compare(exchange);
    Keep(exchange);
  }
  results_.outcomes.push_back(std::move(exchange.outcome));
  if (options_.concurrency > 0 && MayBegin()) {
    if (failed) {
      SendNextAfterPause();
    } else {
      SendNext();
    }
  }
  if (under_way_ == 0 && pausing_ == 0 && !MayBegin()) AskAgain();
}

void Run::SendNext() {
  const Clock::time_point now = Clock::now();
  const bool late = options_.duration > 0 && Seconds(now - start_) >= options_.duration;
  const std::optional<PlannedRequest> request = late ? std::nullopt : workload_.Next();
  if (request.has_value()) {
    Send(*request, now);
  } else {
    exhausted_ = true;
  }
}

void Run::SendNextAfterPause() {
  ++pausing_;
  const auto pause = std::make_shared<boost::asio::steady_timer>(io_, kPauseAfterFailure);
  pause->async_wait([this, pause](error_code) {
    --pausing_;
    if (MayBegin()) SendNext();
    if (under_way_ == 0 && pausing_ == 0 && !MayBegin()) AskAgain();
  });
}

// The second answer to a request that had a good one, with nobody beside it.
class Again final : public CallListener {
 public:
  Again(const ExpectedAnswer& expected, std::function<void(const std::string&)> done)
      : answer_(expected), done_(std::move(done)) {}
  void OnHead(int status, std::string_view) override { status_ = status; }
  void OnBody(std::string_view bytes, Clock::time_point now) override {
    if (status_ == 200) answer_.Feed(bytes, now);
  }
  void OnEnd(CallEnd end, const std::string&) override {
    const std::optional<Fault> fault = answer_.Finish(end == CallEnd::kWhole);
    done_(fault.has_value() ? "no good answer: " + fault->kind : answer_.text());
  }

 private:
  StreamedAnswer answer_;
  std::function<void(const std::string&)> done_;
  int status_ = 0;
};

void Run::AskAgain() {
  if (again_ == 0) {
    results_.seconds = Seconds(last_end_ - start_);
    results_.connections = client_->connections_opened();
    if (crowd_ != nullptr) {
      results_.idle = crowd_->counts();
      crowd_->Stop();
    }
  }
  if (results_.interrupted || again_ >= samples_.size()) return Finish();
  const Sample& sample = samples_[again_++];
  client_->Call(RequestPath(options_), sample.body,
                std::make_shared<Again>(sample.expected, [this, &sample](const std::string& text) {
                  if (results_.interrupted) return Finish();
                  ++results_.verify.again;
                  if (text != sample.text) {
                    ++results_.verify.again_differing;
                    if (results_.verify.first_difference.empty()) {
                      results_.verify.first_difference =
                          absl::StrCat("request ", sample.index, " asked again, alone, has another answer");
                    }
                  }
                  AskAgain();
                }));
}

void Run::Finish() {
  error_code ignored;
  signals_.cancel(ignored);
  timer_.cancel();
}

absl::StatusOr<LoadResults> Run::Go() {
  RaiseDescriptorLimit();
  LoadClient::Options client;
  client.url = plan_.url;
  client.api_key = options_.api_key;
  client.timeout = std::chrono::milliseconds(std::llround(options_.patience * 1000));
  TANDEM_ASSIGN_OR_RETURN(client_, LoadClient::Create(io_, client));
  signals_.async_wait([this](error_code error, int) {
    if (error) return;
    results_.interrupted = true;
    timer_.cancel();
    client_->CancelAll();
    if (under_way_ == 0 && pausing_ == 0) AskAgain();
  });
  if (options_.idle_connections > 0) {
    TANDEM_ASSIGN_OR_RETURN(
        crowd_, IdleCrowd::Start(io_, plan_.url, options_.idle_connections,
                                 std::chrono::milliseconds(std::llround(options_.idle_every * 1000)),
                                 [this] { Begin(); }));
  } else {
    Begin();
  }
  io_.run();
  return std::move(results_);
}

}  // namespace

absl::StatusOr<LoadResults> RunLoad(const LoadPlan& plan, Workload workload) {
  return Run(plan, std::move(workload)).Go();
}

}  // namespace tandem::cli
