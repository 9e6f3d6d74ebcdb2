#include "services/attention_gpu/scheduler/scheduler.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/kv/page_allocator.h"

namespace tandem::attention {
namespace {

struct Sequence {
  uint64_t number = 0;
  SequenceRequest request;
  EventCallback callback;
  std::vector<int32_t> tokens;  // prompt and generated
  int32_t computed = 0;         // tokens whose cache entries are written
  int32_t limit = 0;            // tokens at which it ends by length
  std::vector<int32_t> pages;
  std::unordered_map<int32_t, int32_t> counts;  // generated tokens
  int32_t generated = 0;
  absl::Time arrived, started = absl::InfiniteFuture(), first_token, last_token;

  int32_t remaining() const { return static_cast<int32_t>(tokens.size()) - computed; }
  bool decoding() const { return generated > 0 && remaining() == 1; }
};
using SequencePtr = std::unique_ptr<Sequence>;

SequenceStatistics StatisticsOf(const Sequence& s) {
  SequenceStatistics out;
  out.prompt_tokens = static_cast<int32_t>(s.request.prompt.size());
  out.generated_tokens = s.generated;
  if (s.started != absl::InfiniteFuture()) out.queued = s.started - s.arrived;
  if (s.generated > 0) {
    out.prefill = s.first_token - s.started;
    out.decode = s.last_token - s.first_token;
  }
  return out;
}

bool IsLoss(const absl::Status& s) { return absl::IsUnavailable(s) || absl::IsDeadlineExceeded(s); }

}  // namespace

class Scheduler::Loop {
 public:
  Loop(const SchedulerOptions& options, Backend& backend)
      : options_(options), backend_(backend), pages_(backend.page_count()), thread_([this] { Run(); }) {}

  ~Loop() {
    {
      absl::MutexLock lock(&mutex_);
      stop_ = true;
    }
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
    absl::MutexLock lock(&mutex_);
    if (draining_ || stop_) return absl::UnavailableError("the engine is shutting down");
    if (live_ >= options_.max_batch_size + options_.max_waiting) {
      return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", options_.max_batch_size,
                                                       " sequences run and ", options_.max_waiting, " wait"));
    }
    ++live_;
    s->number = ++last_number_;
    const uint64_t number = s->number;
    inbox_.push_back(std::move(s));
    return number;
  }

  void Cancel(uint64_t number) {
    absl::MutexLock lock(&mutex_);
    cancels_.push_back(number);
  }

  bool Drain(absl::Duration patience) {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    auto empty = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return live_ == 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&empty), patience);
  }

  SchedulerSnapshot Snapshot() const {
    absl::MutexLock lock(&mutex_);
    SchedulerSnapshot s = snapshot_;
    s.waiting = static_cast<int32_t>(live_) - s.running;
    return s;
  }

  void OnHealthChange(std::function<void(bool)> callback) {
    absl::MutexLock lock(&mutex_);
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
    return Validate(r.sampling, options_.vocab_size);
  }

  void Run() {
    for (;;) {
      if (!TakeInbox()) break;
      StepBatch batch;
      Plan(batch);
      if (batch.sequences.empty()) continue;
      StepResult result;
      const absl::Status status = StepWithRecovery(batch, result);
      if (status.ok()) {
        Commit(batch, result);
      } else {
        for (Sequence* s : planned_) Fail(s, status);
      }
      planned_.clear();
      Publish();
    }
    for (auto& s : waiting_) Deliver(*s, {}, FinishReason::kNone, absl::CancelledError("the engine stopped"));
    for (auto& s : running_) Deliver(*s, {}, FinishReason::kNone, absl::CancelledError("the engine stopped"));
  }

  // New sequences and cancellations; waits while there is nothing to do. False: stop.
  bool TakeInbox() {
    std::vector<uint64_t> cancels;
    {
      absl::MutexLock lock(&mutex_);
      auto wake = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stop_ || !inbox_.empty() || !cancels_.empty();
      };
      if (running_.empty() && waiting_.empty()) mutex_.Await(absl::Condition(&wake));
      if (stop_) {
        for (auto& s : inbox_) waiting_.push_back(std::move(s));
        inbox_.clear();
        return false;
      }
      for (auto& s : inbox_) waiting_.push_back(std::move(s));
      inbox_.clear();
      cancels.swap(cancels_);
    }
    for (uint64_t number : cancels) Drop(number);
    if (!cancels.empty()) Publish();
    return true;
  }

  void Drop(uint64_t number) {
    auto is_it = [number](const SequencePtr& s) { return s->number == number; };
    if (auto it = std::find_if(running_.begin(), running_.end(), is_it); it != running_.end()) {
      pages_.Release((*it)->pages);
      running_.erase(it);
      Ended();
    } else if (auto w = std::find_if(waiting_.begin(), waiting_.end(), is_it); w != waiting_.end()) {
      waiting_.erase(w);
      Ended();
    }
  }

  // After the sequence has left its list, so that nobody sees it gone and still running.
  void Ended() {
    absl::MutexLock lock(&mutex_);
    --live_;
    snapshot_.running = static_cast<int32_t>(running_.size());
  }

  // Makes sure that `s` has pages for its first `tokens` tokens; sequences that came later give theirs up.
  bool Reserve(Sequence& s, int32_t tokens) {
    const int32_t page_tokens = backend_.page_tokens();
    const int32_t needed = (tokens + page_tokens - 1) / page_tokens - static_cast<int32_t>(s.pages.size());
    if (needed <= 0) return true;
    while (!pages_.Allocate(needed, s.pages)) {
      if (!PreemptLaterThan(s.number)) return false;
    }
    return true;
  }

  // Takes the pages of the latest comer that is later than `number` and not yet in this step; it will be
  // computed again from its tokens.
  bool PreemptLaterThan(uint64_t number) {
    auto victim = running_.end();
    for (auto it = running_.begin(); it != running_.end(); ++it) {
      if ((*it)->number <= number) continue;
      if (std::find(planned_.begin(), planned_.end(), it->get()) != planned_.end()) continue;
      if (victim == running_.end() || (*it)->number > (*victim)->number) victim = it;
    }
    if (victim == running_.end()) return false;
    pages_.Release((*victim)->pages);
    (*victim)->computed = 0;
    auto at = std::find_if(waiting_.begin(), waiting_.end(),
                           [&](const SequencePtr& w) { return w->number > (*victim)->number; });
    waiting_.insert(at, std::move(*victim));
    running_.erase(victim);
    ++preemptions_;
    return true;
  }

  void Add(Sequence& s, int32_t count, StepBatch& batch) {
    StepSequence out;
    out.first = static_cast<int32_t>(batch.tokens.size());
    out.count = count;
    out.position = s.computed;
    out.pages = s.pages;
    out.sample = count == s.remaining();
    out.params = &s.request.sampling;
    out.counts = &s.counts;
    batch.tokens.insert(batch.tokens.end(), s.tokens.begin() + s.computed,
                        s.tokens.begin() + s.computed + count);
    batch.sequences.push_back(out);
    planned_.push_back(&s);
  }

  // Running sequences are kept in order of arrival, and so are the waiting ones.
  void Plan(StepBatch& batch) {
    planned_.clear();
    for (size_t i = 0; i < running_.size(); ++i) {
      Sequence& s = *running_[i];
      if (s.decoding() && Reserve(s, s.computed + 1)) Add(s, 1, batch);
    }
    const bool mixed = !batch.tokens.empty();
    int32_t budget = std::min(mixed ? options_.mixed_chunk_size : options_.chunk_size,
                              backend_.max_step_tokens() - static_cast<int32_t>(batch.tokens.size()));
    for (size_t i = 0; i < running_.size() && budget > 0; ++i) {
      Sequence& s = *running_[i];
      if (!s.decoding()) budget -= AddChunk(s, budget, batch);
    }
    while (budget > 0 && !waiting_.empty() &&
           static_cast<int32_t>(running_.size()) < options_.max_batch_size) {
      Sequence& s = *waiting_.front();
      // A newcomer takes free pages only: it must not push out those that run.
      const int32_t page_tokens = backend_.page_tokens();
      const int32_t first = std::min(budget, s.remaining());
      if ((first + page_tokens - 1) / page_tokens > pages_.free()) break;
      if (s.started == absl::InfiniteFuture()) s.started = absl::Now();
      running_.push_back(std::move(waiting_.front()));
      waiting_.pop_front();
      std::sort(running_.begin(), running_.end(),
                [](const SequencePtr& a, const SequencePtr& b) { return a->number < b->number; });
      budget -= AddChunk(s, budget, batch);
    }
    Publish();
  }

  int32_t AddChunk(Sequence& s, int32_t budget, StepBatch& batch) {
    const int32_t count = std::min(budget, s.remaining());
    if (!Reserve(s, s.computed + count)) return 0;
    Add(s, count, batch);
    return count;
  }

  absl::Status StepWithRecovery(const StepBatch& batch, StepResult& result) {
    absl::Status status = backend_.Step(batch, &result);
    const absl::Time deadline = absl::Now() + options_.expert_patience;
    while (!status.ok() && IsLoss(status)) {
      SetHealth(false);
      // In slices, so that a stop does not wait for experts that never come.
      const absl::Status back = backend_.RecoverExperts(std::min(deadline - absl::Now(), absl::Seconds(1)));
      if (back.ok()) {
        ++recoveries_;
        SetHealth(true);
        status = backend_.Step(batch, &result);
        continue;
      }
      absl::MutexLock lock(&mutex_);
      if (stop_ || absl::Now() >= deadline) {
        return absl::UnavailableError(absl::StrCat(status.message(), "; not back within ",
                                                   absl::FormatDuration(options_.expert_patience), ": ",
                                                   back.message()));
      }
    }
    return status;
  }

  void SetHealth(bool healthy) {
    std::function<void(bool)> callback;
    {
      absl::MutexLock lock(&mutex_);
      if (snapshot_.healthy == healthy) return;
      snapshot_.healthy = healthy;
      callback = on_health_;
    }
    if (callback) callback(healthy);
  }

  void Commit(const StepBatch& batch, StepResult& result) {
    const absl::Time now = absl::Now();
    for (size_t i = 0; i < planned_.size(); ++i) {
      Sequence& s = *planned_[i];
      const StepSequence& step = batch.sequences[i];
      s.computed += step.count;
      prompt_tokens_ += step.count;
      if (!step.sample) continue;
      --prompt_tokens_;
      ++generated_tokens_;
      SampledToken token = std::move(result.sampled[i]);
      if (s.generated++ == 0) {
        s.first_token = now;
        ++prompt_tokens_;
      }
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

  void Fail(Sequence* s, const absl::Status& status) {
    Deliver(*s, {}, FinishReason::kNone, status);
    Drop(s->number);
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
    absl::MutexLock lock(&mutex_);
    snapshot_.running = static_cast<int32_t>(running_.size());
    snapshot_.kv_used_ratio =
        pages_.total() > 0 ? 1.0 - static_cast<double>(pages_.free()) / pages_.total() : 0.0;
    snapshot_.prompt_tokens = prompt_tokens_;
    snapshot_.generated_tokens = generated_tokens_;
    snapshot_.preemptions = preemptions_;
    snapshot_.expert_recoveries = recoveries_;
  }

  const SchedulerOptions options_;
  Backend& backend_;

  mutable absl::Mutex mutex_;
  std::deque<SequencePtr> inbox_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint64_t> cancels_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_number_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t live_ ABSL_GUARDED_BY(mutex_) = 0;  // accepted and not ended
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  SchedulerSnapshot snapshot_ ABSL_GUARDED_BY(mutex_);
  std::function<void(bool)> on_health_ ABSL_GUARDED_BY(mutex_);

  // The thread's own.
  PageAllocator pages_;
  std::deque<SequencePtr> waiting_;
  std::vector<SequencePtr> running_;
  std::vector<Sequence*> planned_;  // the sequences of the step, as in StepBatch::sequences
  uint64_t prompt_tokens_ = 0, generated_tokens_ = 0, preemptions_ = 0, recoveries_ = 0;
  std::thread thread_;  // last: starts when all else is there
};

Scheduler::Scheduler(const SchedulerOptions& options, std::unique_ptr<Backend> backend)
    : backend_(std::move(backend)), loop_(std::make_unique<Loop>(options, *backend_)) {
  TANDEM_CHECK(static_cast<int64_t>(backend_->page_count()) * backend_->page_tokens() >=
               options.context_length);
}
Scheduler::~Scheduler() = default;
absl::StatusOr<uint64_t> Scheduler::Submit(SequenceRequest request, EventCallback callback) {
  return loop_->Submit(std::move(request), std::move(callback));
}
void Scheduler::Cancel(uint64_t number) { loop_->Cancel(number); }
bool Scheduler::Drain(absl::Duration patience) { return loop_->Drain(patience); }
SchedulerSnapshot Scheduler::Snapshot() const { return loop_->Snapshot(); }
void Scheduler::OnHealthChange(std::function<void(bool)> callback) {
  loop_->OnHealthChange(std::move(callback));
}

}  // namespace tandem::attention
