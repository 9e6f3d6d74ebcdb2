#include "services/attention_gpu/scheduler/scheduler.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/scheduler/planner.h"
#include "services/attention_gpu/scheduler/sequence.h"

namespace tandem::attention {
namespace {

using Lock = std::unique_lock<std::mutex>;

constexpr absl::Duration kRecoverySlice = absl::Seconds(1);
constexpr absl::Duration kRecoveryPause = absl::Milliseconds(50);
constexpr absl::Duration kLongLook = absl::Milliseconds(10);  // of who has nothing else to do

double Seconds(std::chrono::steady_clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

bool IsLoss(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

class Scheduler::Loop {
 public:
  Loop(const SchedulerOptions& options, Backend& backend, HostPages host)
      : options_(options), backend_(backend), planner_(options, backend, std::move(host)) {
    Publish();
    thread_ = std::thread([this] { Run(); });
  }

  ~Loop() {
    {
      Lock lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  absl::StatusOr<uint64_t> Submit(SequenceRequest request, EventCallback callback) {
    TANDEM_RETURN_IF_ERROR(Check(request));
    auto s = std::make_unique<Sequence>();
    s->tokens = request.prompt;
    const int32_t prompt = static_cast<int32_t>(request.prompt.size());
    const int32_t room = options_.context_length - prompt;
    s->limit = prompt + (request.max_new_tokens > 0 ? std::min(request.max_new_tokens, room) : room);
    for (int32_t i = prompt - request.resumed_tokens; i < prompt; ++i) ++s->counts[request.prompt[i]];
    s->request = std::move(request);
    s->callback = std::move(callback);
    s->arrived = absl::Now();
    uint64_t number = 0;
    {
      Lock lock(mutex_);
      if (draining_ || stop_) return absl::UnavailableError("the engine is shutting down");
      if (live_ >= options_.max_batch_size + options_.max_waiting) {
        return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", options_.max_batch_size,
                                                         " sequences run and ", options_.max_waiting,
                                                         " wait"));
      }
      ++live_;
      number = s->number = ++last_number_;
      inbox_.push_back(std::move(s));
    }
    wake_.notify_all();
    return number;
  }

  void Cancel(uint64_t number) {
    {
      Lock lock(mutex_);
      cancels_.push_back(number);
    }
    wake_.notify_all();
  }

  bool Drain(absl::Duration patience) {
    Lock lock(mutex_);
    draining_ = true;
    return empty_.wait_for(lock, absl::ToChronoNanoseconds(patience), [this] { return live_ == 0; });
  }

  SchedulerSnapshot Snapshot() const {
    Lock lock(mutex_);
    SchedulerSnapshot s = snapshot_;
    s.waiting = static_cast<int32_t>(live_) - s.running;
    if (s.healthy && !suspicion_.ok()) {
      s.healthy = false;
      s.loss = suspicion_;
    }
    return s;
  }

  void SuspectExperts(const absl::Status& why) {
    {
      Lock lock(mutex_);
      suspicion_ = why;
    }
    wake_.notify_all();
  }

  void OnHealthChange(std::function<void(bool)> callback) {
    Lock lock(mutex_);
    on_health_ = std::move(callback);
  }

 private:
  absl::Status Check(const SequenceRequest& r) const {
    if (r.prompt.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
    if (static_cast<int64_t>(r.prompt.size()) >= options_.context_length) {
      return absl::OutOfRangeError(absl::StrCat("the prompt has ", r.prompt.size(), " tokens, the context ",
                                                options_.context_length,
                                                ", of which one at least is for the answer"));
    }
    for (size_t i = 0; i < r.prompt.size(); ++i) {
      if (r.prompt[i] < 0 || r.prompt[i] >= options_.vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat(
            "prompt token ", i, " = ", r.prompt[i], " is outside the vocabulary of ", options_.vocab_size));
      }
    }
    if (r.max_new_tokens < 0) return absl::InvalidArgumentError("max_new_tokens is negative");
    if (r.resumed_tokens < 0 || r.resumed_tokens > static_cast<int64_t>(r.prompt.size())) {
      return absl::InvalidArgumentError("resumed_tokens is larger than the prompt");
    }
    if (r.deadline <= absl::Now()) return absl::DeadlineExceededError("the deadline has passed already");
    return Validate(r.sampling, options_.vocab_size);
  }

  void Run() {
    while (TakeInbox()) {
      DropLate();
      if (planner_.idle() && !lost_) TakeSuspicion();
      if (lost_) {
        Recover();
        continue;
      }
      if (planner_.idle()) continue;
      if (long_) AwaitLong(absl::ZeroDuration());
      if (!long_ && !lost_) BeginLong();
      if (lost_ || planner_.idle()) continue;
      const Plan plan = planner_.Next();
      if (plan.sequences.empty()) {
        AwaitLong(kLongLook);
        continue;
      }
      Publish();
      StepResult result;
      const auto begin = std::chrono::steady_clock::now();
      const absl::Status status = backend_.Step(plan.batch, &result);
      if (status.ok()) {
        StepWorked();
        planner_.Done(plan, Seconds(std::chrono::steady_clock::now() - begin));
        Commit(plan, result);
      } else {
        Failed(plan, status);
      }
      Publish();
    }
    DropLong();
    const auto all = planner_.Select([](const Sequence&) { return true; });
    for (uint64_t number : all) Fail(number, absl::CancelledError("the engine stopped"));
  }

  // Prompts that are worth a long step get theirs beside the others'.
  void BeginLong() {
    Plan plan = planner_.NextLong();
    if (plan.sequences.empty()) return;
    long_ = std::move(plan);
    long_begin_ = std::chrono::steady_clock::now();
    Publish();
    const absl::Status status = backend_.BeginLong(long_->batch);
    if (!status.ok()) Failed(EndLong(), status);
  }

  void AwaitLong(absl::Duration most) {
    StepResult result;
    const absl::StatusOr<bool> done = backend_.AwaitLong(most, &result);
    if (done.ok() && !*done) return;
    if (!done.ok()) {
      Failed(EndLong(), done.status());
    } else {
      StepWorked();
      const Plan plan = *std::exchange(long_, std::nullopt);
      planner_.LongDone(plan, Seconds(std::chrono::steady_clock::now() - long_begin_));
      Commit(plan, result);
    }
    Publish();
  }

  // The plan of the long step that is no more; none of its tokens is computed.
  Plan EndLong() {
    Plan plan = *std::exchange(long_, std::nullopt);
    planner_.LongDropped(plan);
    return plan;
  }

  void DropLong() {
    if (!long_) return;
    backend_.DropLong();
    EndLong();
  }

  void Failed(const Plan& plan, const absl::Status& status) {
    if (IsLoss(status)) return Lose(status);
    // What a request asks for was checked when it came: that a step was refused is no fault of its.
    const absl::Status ours =
        absl::IsInvalidArgument(status)
            ? absl::InternalError(absl::StrCat("a step was planned wrongly: ", status.message()))
            : status;
    std::vector<uint64_t> numbers;
    for (const Sequence* s : plan.sequences) numbers.push_back(s->number);
    for (uint64_t number : numbers) Fail(number, ours);
  }

  // Out of the batch or the queue. Nobody leaves a long step alone: the others in it begin again.
  SequencePtr Take(uint64_t number) {
    if (long_ && std::any_of(long_->sequences.begin(), long_->sequences.end(),
                             [number](const Sequence* s) { return s->number == number; })) {
      DropLong();
    }
    return planner_.Remove(number);
  }

  // New sequences and cancellations; waits while there is nothing to do. False: stop.
  bool TakeInbox() {
    std::vector<SequencePtr> inbox;
    std::vector<uint64_t> cancels;
    bool stop;
    {
      Lock lock(mutex_);
      if (planner_.idle() && !lost_) {
        wake_.wait(lock,
                   [this] { return stop_ || !inbox_.empty() || !cancels_.empty() || !suspicion_.ok(); });
      }
      inbox.swap(inbox_);
      cancels.swap(cancels_);
      stop = stop_;
    }
    for (auto& s : inbox) planner_.Enqueue(std::move(s));
    for (uint64_t number : cancels) Drop(number);
    return !stop;
  }

  void DropLate() {
    const absl::Time now = absl::Now();
    for (uint64_t number : planner_.Select([now](const Sequence& s) { return s.request.deadline <= now; })) {
      Fail(number, absl::DeadlineExceededError("the request's deadline has passed"));
    }
  }

  void StepWorked() {
    lost_since_.reset();
    Lock lock(mutex_);
    suspicion_ = absl::OkStatus();
  }

  // Without steps nothing else would show that the experts are gone, or that those that are there now are
  // other ones.
  void TakeSuspicion() {
    absl::Status suspicion;
    {
      Lock lock(mutex_);
      suspicion = std::exchange(suspicion_, absl::OkStatus());
    }
    if (!suspicion.ok()) Lose(suspicion);
  }

  // A step failed because experts are gone. Nothing of it is kept: the next one is planned anew.
  void Lose(const absl::Status& status) {
    DropLong();
    lost_ = true;
    loss_ = status;
    if (!lost_since_) lost_since_ = absl::Now();
    SetHealth(status);
    FailImpatient();
  }

  // Looks for the experts, whether anybody waits for them or not: who asks for the engine's health is to see
  // them come back. In slices, so that neither a stop nor cancellations wait for experts that never come.
  void Recover() {
    const absl::Time begin = absl::Now();
    const absl::Status back = backend_.RecoverExperts(kRecoverySlice);
    if (back.ok()) {
      lost_ = false;
      if (planner_.idle()) lost_since_.reset();  // nobody has waited for a step since
      ++recoveries_;
      SetHealth(absl::OkStatus());
    } else {
      loss_ = Annotate(back, "the experts are lost");
      SetHealth(back);
      FailImpatient();
      Lock lock(mutex_);  // not in a hot loop if the backend gives up at once
      wake_.wait_for(lock, absl::ToChronoNanoseconds(kRecoveryPause - (absl::Now() - begin)),
                     [this] { return stop_ || !inbox_.empty() || !cancels_.empty(); });
    }
    Publish();
  }

  // Those that no step has worked for during the whole patience. A step that works ends the loss; experts
  // that come back only to be lost again do not. Aborted, not Unavailable: the engine is there, and whoever
  // calls it again begins to wait anew.
  void FailImpatient() {
    const absl::Time latest = absl::Now() - options_.expert_patience;
    if (*lost_since_ > latest) return;
    for (uint64_t number : planner_.Select([latest](const Sequence& s) { return s.arrived <= latest; })) {
      Fail(number, absl::AbortedError(absl::StrCat(loss_.message(), "; not back within ",
                                                   absl::FormatDuration(options_.expert_patience))));
    }
  }

  // `loss`: OK if there is none.
  void SetHealth(const absl::Status& loss) {
    std::function<void(bool)> callback;
    {
      Lock lock(mutex_);
      snapshot_.loss = loss;
      if (loss.ok()) suspicion_ = absl::OkStatus();  // what it said has been looked into
      if (snapshot_.healthy == loss.ok()) return;
      snapshot_.healthy = loss.ok();
      callback = on_health_;
    }
    if (callback) callback(loss.ok());
  }

  void Commit(const Plan& plan, StepResult& result) {
    const absl::Time now = absl::Now();
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      Sequence& s = *plan.sequences[i];
      const bool decoded = static_cast<int32_t>(i) < plan.decoding;
      if (!decoded) prompt_tokens_ += plan.batch.sequences[i].count;
      if (!plan.batch.sequences[i].sample) continue;
      ++generated_tokens_;
      SampledToken token = std::move(result.sampled[i]);
      if (s.generated++ == 0) s.first_token = now;
      s.last_token = now;
      s.tokens.push_back(token.token);
      ++s.counts[token.token];
      const auto& stops = s.request.stop_token_ids;
      FinishReason finish = FinishReason::kNone;
      if (std::find(stops.begin(), stops.end(), token.token) != stops.end()) {
        finish = FinishReason::kStop;
      } else if (static_cast<int32_t>(s.tokens.size()) >= s.limit) {
        finish = FinishReason::kLength;
      }
      std::vector<SampledToken> tokens;
      tokens.push_back(std::move(token));
      Deliver(s, std::move(tokens), finish, absl::OkStatus());
      if (finish != FinishReason::kNone) Drop(s.number);
    }
  }

  void Fail(uint64_t number, const absl::Status& status) {
    if (const SequencePtr s = Take(number)) {
      Deliver(*s, {}, FinishReason::kNone, status);
      Ended();
    }
  }

  void Drop(uint64_t number) {
    if (Take(number)) Ended();
  }

  // After the sequence has left its list, so that nobody sees it gone and still running.
  void Ended() {
    Lock lock(mutex_);
    --live_;
    planner_.Describe(snapshot_);
    if (live_ == 0) empty_.notify_all();
  }

  static void Deliver(Sequence& s, std::vector<SampledToken> tokens, FinishReason finish,
                      const absl::Status& status) {
    SequenceEvent e;
    e.tokens = std::move(tokens);
    e.finish = finish;
    e.status = status;
    if (finish != FinishReason::kNone || !status.ok() || s.generated == 1) e.statistics = StatisticsOf(s);
    s.callback(std::move(e));
  }

  void Publish() {
    Lock lock(mutex_);
    planner_.Describe(snapshot_);
    snapshot_.prompt_tokens = prompt_tokens_;
    snapshot_.generated_tokens = generated_tokens_;
    snapshot_.expert_recoveries = recoveries_;
  }

  const SchedulerOptions options_;
  Backend& backend_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;   // for the thread: something came in
  std::condition_variable empty_;  // for Drain: the last sequence ended
  std::vector<SequencePtr> inbox_;
  std::vector<uint64_t> cancels_;
  uint64_t last_number_ = 0;
  int64_t live_ = 0;  // accepted and not ended
  bool draining_ = false;
  bool stop_ = false;
  absl::Status suspicion_;  // not OK: see SuspectExperts
  SchedulerSnapshot snapshot_;
  std::function<void(bool)> on_health_;

  // The thread's own.
  Planner planner_;
  std::optional<Plan> long_;  // the step under way beside the others
  std::chrono::steady_clock::time_point long_begin_;
  uint64_t prompt_tokens_ = 0, generated_tokens_ = 0, recoveries_ = 0;
  bool lost_ = false;                     // RecoverExperts has to succeed before the next step
  std::optional<absl::Time> lost_since_;  // since then no step has worked
  absl::Status loss_;
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<Scheduler>> Scheduler::Create(const SchedulerOptions& options,
                                                             std::unique_ptr<Backend> backend) {
  if (int64_t{backend->page_count()} * backend->page_tokens() < options.context_length) {
    return absl::InvalidArgumentError(
        absl::StrCat("a KV cache of ", backend->page_count(), " pages of ", backend->page_tokens(),
                     " tokens holds less than one context of ", options.context_length));
  }
  if (options.max_batch_size < 1 || options.chunk_size < 1 || options.mixed_chunk_size < 1 ||
      backend->max_step_tokens() < options.max_batch_size) {
    return absl::InvalidArgumentError(
        "batch and chunk sizes are to be at least 1, and a batch to fit a step");
  }
  if (options.kv_host_bytes > 0 && !options.prefix_cache) {
    return absl::InvalidArgumentError("host memory for the KV cache is of use with the prefix cache only");
  }
  TANDEM_ASSIGN_OR_RETURN(HostPages host, HostPages::Create(options.kv_host_bytes, backend->page_bytes()));
  return std::unique_ptr<Scheduler>(new Scheduler(options, std::move(backend), std::move(host)));
}

Scheduler::Scheduler(const SchedulerOptions& options, std::unique_ptr<Backend> backend, HostPages host)
    : backend_(std::move(backend)), loop_(std::make_unique<Loop>(options, *backend_, std::move(host))) {}
Scheduler::~Scheduler() = default;
absl::StatusOr<uint64_t> Scheduler::Submit(SequenceRequest request, EventCallback callback) {
  return loop_->Submit(std::move(request), std::move(callback));
}
void Scheduler::Cancel(uint64_t number) { loop_->Cancel(number); }
bool Scheduler::Drain(absl::Duration patience) { return loop_->Drain(patience); }
SchedulerSnapshot Scheduler::Snapshot() const { return loop_->Snapshot(); }
void Scheduler::SuspectExperts(const absl::Status& why) { loop_->SuspectExperts(why); }
void Scheduler::OnHealthChange(std::function<void(bool)> callback) {
  loop_->OnHealthChange(std::move(callback));
}

}  // namespace tandem::attention
