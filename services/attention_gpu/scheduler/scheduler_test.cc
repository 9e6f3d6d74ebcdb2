#include "services/attention_gpu/scheduler/scheduler.h"

#include <map>
#include <random>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

namespace tandem::attention {
namespace {

using testing::HasSubstr;

constexpr int32_t kVocab = 1000;
constexpr int32_t kPageTokens = 4;

// A model whose next token is a hash of all tokens before it, read back from its paged "cache": whatever the
// scheduler mixes up (pages, positions, order, a lost or doubled token) changes the answer.
int32_t NextToken(const std::vector<int32_t>& tokens) {
  uint64_t h = 1469598103934665603u;
  for (int32_t t : tokens) h = (h ^ static_cast<uint64_t>(t + 1)) * 1099511628211u;
  return static_cast<int32_t>((h >> 20) % (kVocab - 1)) + 1;
}

struct Script {
  absl::Mutex mutex;
  std::vector<absl::Status> step_errors ABSL_GUARDED_BY(mutex);  // taken from the back
  absl::Status recover_status ABSL_GUARDED_BY(mutex);
  int recoveries ABSL_GUARDED_BY(mutex) = 0;
  int max_sequences ABSL_GUARDED_BY(mutex) = 0;
  int max_tokens ABSL_GUARDED_BY(mutex) = 0;
  absl::Notification* hold ABSL_GUARDED_BY(mutex) = nullptr;
};

class HashBackend : public Backend {
 public:
  HashBackend(int32_t pages, Script& script) : cache_(pages * kPageTokens, -1), script_(script) {}
  std::string name() const override { return "hash"; }
  int32_t page_tokens() const override { return kPageTokens; }
  int32_t page_count() const override { return static_cast<int32_t>(cache_.size()) / kPageTokens; }
  int32_t max_step_tokens() const override { return 64; }

  absl::Status Step(const StepBatch& batch, StepResult* result) override {
    absl::Notification* hold;
    {
      absl::MutexLock lock(&script_.mutex);
      hold = script_.hold;
      script_.max_sequences = std::max(script_.max_sequences, static_cast<int>(batch.sequences.size()));
      script_.max_tokens = std::max(script_.max_tokens, static_cast<int>(batch.tokens.size()));
      if (!script_.step_errors.empty()) {
        absl::Status s = script_.step_errors.back();
        script_.step_errors.pop_back();
        if (!s.ok()) return s;
      }
    }
    if (hold != nullptr) hold->WaitForNotification();
    EXPECT_LE(batch.tokens.size(), 64u);
    std::set<int32_t> pages;
    size_t listed = 0;
    result->sampled.assign(batch.sequences.size(), {});
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const StepSequence& s = batch.sequences[i];
      pages.insert(s.pages.begin(), s.pages.end());
      listed += s.pages.size();
      std::vector<int32_t> all;
      for (int32_t p = 0; p < s.position + s.count; ++p) {
        int32_t& entry = cache_[s.pages[p / kPageTokens] * kPageTokens + p % kPageTokens];
        if (p >= s.position) entry = batch.tokens[s.first + p - s.position];
        all.push_back(entry);
      }
      if (s.sample) result->sampled[i].token = NextToken(all);
    }
    EXPECT_EQ(pages.size(), listed) << "two sequences share a page";
    return absl::OkStatus();
  }
  absl::Status RecoverExperts(absl::Duration) override {
    absl::MutexLock lock(&script_.mutex);
    ++script_.recoveries;
    return script_.recover_status;
  }

 private:
  std::vector<int32_t> cache_;
  Script& script_;
};

std::vector<int32_t> Expected(std::vector<int32_t> tokens, int n) {
  std::vector<int32_t> out;
  for (int i = 0; i < n; ++i) {
    out.push_back(NextToken(tokens));
    tokens.push_back(out.back());
  }
  return out;
}

std::vector<int32_t> Prompt(int n, int seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> p(n);
  for (int32_t& t : p) t = static_cast<int32_t>(rng() % kVocab);
  return p;
}

// What one sequence received.
struct Sink {
  absl::Mutex mutex;
  std::vector<int32_t> tokens ABSL_GUARDED_BY(mutex);
  FinishReason finish ABSL_GUARDED_BY(mutex) = FinishReason::kNone;
  absl::Status status ABSL_GUARDED_BY(mutex);
  SequenceStatistics statistics ABSL_GUARDED_BY(mutex);
  bool ended ABSL_GUARDED_BY(mutex) = false;

  EventCallback callback() {
    return [this](SequenceEvent e) {
      absl::MutexLock lock(&mutex);
      EXPECT_FALSE(ended) << "an event after the last one";
      for (auto& t : e.tokens) tokens.push_back(t.token);
      finish = e.finish;
      status = e.status;
      statistics = e.statistics;
      ended = e.finish != FinishReason::kNone || !e.status.ok();
    };
  }
  void Wait() {
    absl::MutexLock lock(&mutex);
    EXPECT_TRUE(mutex.AwaitWithTimeout(absl::Condition(&ended), absl::Seconds(60)));
  }
  std::vector<int32_t> Tokens() {
    absl::MutexLock lock(&mutex);
    return tokens;
  }
  absl::Status Status() {
    absl::MutexLock lock(&mutex);
    return status;
  }
  FinishReason Finish() {
    absl::MutexLock lock(&mutex);
    return finish;
  }
};

SequenceRequest Request(std::vector<int32_t> prompt, int n) {
  SequenceRequest r;
  r.prompt = std::move(prompt);
  r.max_new_tokens = n;
  return r;
}

SchedulerOptions Options() {
  SchedulerOptions o;
  o.context_length = 128;
  o.max_batch_size = 8;
  o.max_waiting = 64;
  o.chunk_size = 32;
  o.mixed_chunk_size = 8;
  o.vocab_size = kVocab;
  o.expert_patience = absl::Milliseconds(200);
  return o;
}

TEST(Scheduler, OneSequence) {
  Script script;
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  Sink sink;
  ASSERT_TRUE(s.Submit(Request(Prompt(50, 1), 20), sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.Tokens(), Expected(Prompt(50, 1), 20));
  EXPECT_EQ(sink.Finish(), FinishReason::kLength);
  absl::MutexLock lock(&sink.mutex);
  EXPECT_EQ(sink.statistics.prompt_tokens, 50);
  EXPECT_EQ(sink.statistics.generated_tokens, 20);
}

TEST(Scheduler, StopTokensEndASequence) {
  Script script;
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  const auto want = Expected(Prompt(5, 2), 10);
  SequenceRequest r = Request(Prompt(5, 2), 10);
  r.stop_token_ids = {want[3]};
  Sink sink;
  ASSERT_TRUE(s.Submit(r, sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.Tokens(), std::vector<int32_t>(want.begin(), want.begin() + 4));
  EXPECT_EQ(sink.Finish(), FinishReason::kStop);
}

TEST(Scheduler, TheContextEndsASequence) {
  Script script;
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  Sink sink;
  ASSERT_TRUE(s.Submit(Request(Prompt(120, 3), 0), sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.Tokens().size(), 8u);
  EXPECT_EQ(sink.Finish(), FinishReason::kLength);
}

// Many sequences of random sizes, far more than fit the pages at once: preemption, chunking and reuse of
// pages must not change a token of anyone, and in the end every page is free.
TEST(Scheduler, ManySequencesInFewPagesAllGetTheirTokens) {
  Script script;
  SchedulerOptions o = Options();
  Scheduler s(o, std::make_unique<HashBackend>(40, script));  // 160 tokens of cache
  std::mt19937 rng(5);
  constexpr int kCount = 60;
  std::vector<Sink> sinks(kCount);
  std::vector<std::pair<std::vector<int32_t>, int>> asked;
  for (int i = 0; i < kCount; ++i) {
    asked.push_back({Prompt(1 + static_cast<int>(rng() % 60), i), 1 + static_cast<int>(rng() % 60)});
    ASSERT_TRUE(s.Submit(Request(asked[i].first, asked[i].second), sinks[i].callback()).ok());
  }
  for (int i = 0; i < kCount; ++i) {
    sinks[i].Wait();
    EXPECT_EQ(sinks[i].Tokens(), Expected(asked[i].first, asked[i].second)) << "sequence " << i;
  }
  EXPECT_TRUE(s.Drain(absl::Seconds(5)));
  const SchedulerSnapshot now = s.Snapshot();
  EXPECT_GT(now.preemptions, 0u) << "the test does not test preemption";
  EXPECT_EQ(now.running, 0);
  EXPECT_EQ(now.waiting, 0);
  absl::MutexLock lock(&script.mutex);
  EXPECT_GT(script.max_sequences, 1);
  EXPECT_LE(script.max_sequences, o.max_batch_size);
}

TEST(Scheduler, CancelFreesAndLeavesTheOthers) {
  Script script;
  absl::Notification go;
  {
    absl::MutexLock lock(&script.mutex);
    script.hold = &go;
  }
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  Sink cancelled, kept;
  auto number = s.Submit(Request(Prompt(10, 1), 100), cancelled.callback());
  ASSERT_TRUE(number.ok());
  ASSERT_TRUE(s.Submit(Request(Prompt(10, 2), 50), kept.callback()).ok());
  s.Cancel(*number);
  s.Cancel(12345);
  go.Notify();
  kept.Wait();
  EXPECT_EQ(kept.Tokens(), Expected(Prompt(10, 2), 50));
  EXPECT_LE(cancelled.Tokens().size(), 1u);
  EXPECT_TRUE(s.Drain(absl::Seconds(5)));
}

TEST(Scheduler, LostExpertsArePausesNotFailures) {
  Script script;
  {
    absl::MutexLock lock(&script.mutex);
    for (int i = 0; i < 3; ++i) {
      script.step_errors.push_back(absl::OkStatus());
      script.step_errors.push_back(absl::UnavailableError("expert gone"));
    }
  }
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  std::vector<bool> health;
  absl::Mutex m;
  s.OnHealthChange([&](bool ok) {
    absl::MutexLock lock(&m);
    health.push_back(ok);
  });
  Sink sink;
  ASSERT_TRUE(s.Submit(Request(Prompt(10, 1), 20), sink.callback()).ok());
  sink.Wait();
  EXPECT_TRUE(sink.Status().ok());
  EXPECT_EQ(sink.Tokens(), Expected(Prompt(10, 1), 20));
  EXPECT_EQ(s.Snapshot().expert_recoveries, 3u);
  absl::MutexLock lock(&m);
  EXPECT_THAT(health, testing::ElementsAre(false, true, false, true, false, true));
}

TEST(Scheduler, ExpertsThatStayAwayFailTheStepAndTheNextOneWorks) {
  Script script;
  {
    absl::MutexLock lock(&script.mutex);
    script.step_errors.push_back(absl::UnavailableError("expert gone"));
    script.recover_status = absl::UnavailableError("connection refused");
  }
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  Sink lost, next;
  ASSERT_TRUE(s.Submit(Request(Prompt(10, 1), 20), lost.callback()).ok());
  lost.Wait();
  EXPECT_TRUE(absl::IsUnavailable(lost.Status()));
  EXPECT_THAT(std::string(lost.Status().message()), HasSubstr("connection refused"));
  ASSERT_TRUE(s.Submit(Request(Prompt(10, 2), 5), next.callback()).ok());
  next.Wait();
  EXPECT_EQ(next.Tokens(), Expected(Prompt(10, 2), 5));
}

TEST(Scheduler, RefusesWhatItCannotDo) {
  Script script;
  Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
  Sink sink;
  auto code = [&](const SequenceRequest& r) { return s.Submit(r, sink.callback()).status().code(); };
  EXPECT_EQ(code(Request({}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request({kVocab}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request({-1}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request(Prompt(128, 1), 1)), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(code(Request({1}, -5)), absl::StatusCode::kInvalidArgument);
  SequenceRequest r = Request({1}, 1);
  r.sampling.top_p = 7;
  EXPECT_EQ(code(r), absl::StatusCode::kInvalidArgument);
  r = Request({1}, 1);
  r.resumed_tokens = 2;
  EXPECT_EQ(code(r), absl::StatusCode::kInvalidArgument);
}

TEST(Scheduler, AFullQueueRefuses) {
  Script script;
  absl::Notification go;
  {
    absl::MutexLock lock(&script.mutex);
    script.hold = &go;
  }
  SchedulerOptions o = Options();
  o.max_batch_size = 1;
  o.max_waiting = 2;
  Scheduler s(o, std::make_unique<HashBackend>(64, script));
  std::vector<Sink> sinks(4);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(s.Submit(Request({1}, 2), sinks[i].callback()).ok());
  const auto refused = s.Submit(Request({1}, 2), sinks[3].callback()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("1 sequences run and 2 wait"));
  go.Notify();
  for (int i = 0; i < 3; ++i) sinks[i].Wait();
}

TEST(Scheduler, DrainRefusesNewcomersAndDestructionFailsTheRest) {
  Script script;
  absl::Notification go;
  {
    absl::MutexLock lock(&script.mutex);
    script.hold = &go;
  }
  Sink sink, late;
  {
    Scheduler s(Options(), std::make_unique<HashBackend>(64, script));
    ASSERT_TRUE(s.Submit(Request({1}, 100), sink.callback()).ok());
    EXPECT_FALSE(s.Drain(absl::Milliseconds(10)));
    EXPECT_TRUE(absl::IsUnavailable(s.Submit(Request({1}, 1), late.callback()).status()));
    go.Notify();
  }
  absl::MutexLock lock(&sink.mutex);
  EXPECT_TRUE(sink.ended);
}

TEST(Scheduler, ALongPromptDoesNotStallTheOthers) {
  Script script;
  SchedulerOptions o = Options();
  Scheduler s(o, std::make_unique<HashBackend>(128, script));
  absl::Notification go;
  {
    absl::MutexLock lock(&script.mutex);
    script.hold = &go;
  }
  Sink small, large;
  ASSERT_TRUE(s.Submit(Request({1, 2}, 60), small.callback()).ok());
  ASSERT_TRUE(s.Submit(Request(Prompt(100, 9), 5), large.callback()).ok());
  go.Notify();
  small.Wait();
  large.Wait();
  EXPECT_EQ(large.Tokens(), Expected(Prompt(100, 9), 5));
  absl::MutexLock lock(&script.mutex);
  // The first step may be all prompt; beside a running sequence only a small chunk is.
  EXPECT_LE(script.max_tokens, o.chunk_size);
}

}  // namespace
}  // namespace tandem::attention
