#include "services/attention_gpu/scheduler/scheduler.h"

#include <random>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "services/attention_gpu/scheduler/hash_backend.h"
#include "services/attention_gpu/scheduler/sink.h"

namespace tandem::attention {
namespace {

using testing::HasSubstr;

std::vector<int32_t> Prompt(int n, int seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> p(n);
  for (int32_t& t : p) t = static_cast<int32_t>(rng() % kHashVocab);
  return p;
}

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
  o.vocab_size = kHashVocab;
  o.expert_patience = absl::Milliseconds(200);
  return o;
}

std::unique_ptr<Scheduler> Make(const SchedulerOptions& o, int32_t pages, HashScript& script) {
  auto s = Scheduler::Create(o, std::make_unique<HashBackend>(pages, script));
  EXPECT_TRUE(s.ok()) << s.status();
  return std::move(*s);
}

TEST(Scheduler, OneSequence) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  Sink sink;
  ASSERT_TRUE(s->Submit(Request(Prompt(50, 1), 20), sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(50, 1), 20));
  EXPECT_EQ(sink.finish(), FinishReason::kLength);
  EXPECT_EQ(sink.statistics().prompt_tokens, 50);
  EXPECT_EQ(sink.statistics().cached_prompt_tokens, 0);
  EXPECT_EQ(sink.statistics().generated_tokens, 20);
}

TEST(Scheduler, StopTokensEndASequence) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  const auto want = HashAnswer(Prompt(5, 2), 10);
  SequenceRequest r = Request(Prompt(5, 2), 10);
  r.stop_token_ids = {want[3]};
  Sink sink;
  ASSERT_TRUE(s->Submit(r, sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.tokens(), std::vector<int32_t>(want.begin(), want.begin() + 4));
  EXPECT_EQ(sink.finish(), FinishReason::kStop);
}

TEST(Scheduler, TheContextEndsASequence) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  Sink sink;
  ASSERT_TRUE(s->Submit(Request(Prompt(120, 3), 0), sink.callback()).ok());
  sink.Wait();
  EXPECT_EQ(sink.tokens().size(), 8u);
  EXPECT_EQ(sink.finish(), FinishReason::kLength);
}

// Many sequences of random sizes, far more than fit the pages at once: preemption, chunking and reuse of
// pages must not change a token of anyone, and in the end every page is free.
TEST(Scheduler, ManySequencesInFewPagesAllGetTheirTokens) {
  HashScript script;
  SchedulerOptions o = Options();
  const auto s = Make(o, 40, script);  // 160 tokens of cache
  std::mt19937 rng(5);
  constexpr int kCount = 60;
  std::vector<Sink> sinks(kCount);
  std::vector<std::pair<std::vector<int32_t>, int>> asked;
  for (int i = 0; i < kCount; ++i) {
    asked.push_back({Prompt(1 + static_cast<int>(rng() % 60), i), 1 + static_cast<int>(rng() % 60)});
    ASSERT_TRUE(s->Submit(Request(asked[i].first, asked[i].second), sinks[i].callback()).ok());
  }
  for (int i = 0; i < kCount; ++i) {
    sinks[i].Wait();
    EXPECT_EQ(sinks[i].tokens(), HashAnswer(asked[i].first, asked[i].second)) << "sequence " << i;
  }
  EXPECT_TRUE(s->Drain(absl::Seconds(5)));
  const SchedulerSnapshot now = s->Snapshot();
  EXPECT_GT(now.preemptions, 0u) << "the test does not test preemption";
  EXPECT_EQ(now.running, 0);
  EXPECT_EQ(now.waiting, 0);
  EXPECT_EQ(now.kv.used, 0);
  EXPECT_GT(script.max_sequences(), 1);
  EXPECT_LE(script.max_sequences(), o.max_batch_size);
}

TEST(Scheduler, CancelFreesAndLeavesTheOthers) {
  HashScript script;
  script.Hold();
  const auto s = Make(Options(), 64, script);
  Sink cancelled, kept;
  auto number = s->Submit(Request(Prompt(10, 1), 100), cancelled.callback());
  ASSERT_TRUE(number.ok());
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 2), 50), kept.callback()).ok());
  s->Cancel(*number);
  s->Cancel(12345);
  script.Go();
  kept.Wait();
  EXPECT_EQ(kept.tokens(), HashAnswer(Prompt(10, 2), 50));
  EXPECT_LE(cancelled.tokens().size(), 1u);
  EXPECT_TRUE(s->Drain(absl::Seconds(5)));
}

TEST(Scheduler, LostExpertsArePausesNotFailures) {
  HashScript script;
  const absl::Status gone = absl::UnavailableError("expert gone");
  script.FailSteps({absl::OkStatus(), gone, absl::OkStatus(), gone, absl::OkStatus(), gone});
  const auto s = Make(Options(), 64, script);
  std::vector<bool> health;
  std::mutex m;
  s->OnHealthChange([&](bool ok) {
    const std::lock_guard lock(m);
    health.push_back(ok);
  });
  Sink sink;
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 20), sink.callback()).ok());
  sink.Wait();
  EXPECT_TRUE(sink.status().ok());
  EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(10, 1), 20));
  EXPECT_EQ(s->Snapshot().expert_recoveries, 3u);
  const std::lock_guard lock(m);
  EXPECT_THAT(health, testing::ElementsAre(false, true, false, true, false, true));
}

TEST(Scheduler, ARefusedStepIsNotTheRequestsFault) {
  HashScript script;
  script.FailSteps({absl::InvalidArgumentError("a step of 99 tokens")});
  const auto s = Make(Options(), 64, script);
  Sink sink, next;
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 20), sink.callback()).ok());
  sink.Wait();
  EXPECT_TRUE(absl::IsInternal(sink.status())) << sink.status();
  EXPECT_THAT(std::string(sink.status().message()), HasSubstr("a step of 99 tokens"));
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 2), 5), next.callback()).ok());
  next.Wait();
  EXPECT_EQ(next.tokens(), HashAnswer(Prompt(10, 2), 5));
}

TEST(Scheduler, ExpertsThatStayAwayFailWhatWaitsForThemAndTheNextOneWorks) {
  HashScript script;
  script.FailSteps({absl::UnavailableError("expert gone")});
  script.SetRecovery(absl::UnavailableError("connection refused"));
  const auto s = Make(Options(), 64, script);
  Sink lost, next;
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 20), lost.callback()).ok());
  lost.Wait();
  EXPECT_TRUE(absl::IsAborted(lost.status())) << lost.status();
  EXPECT_THAT(std::string(lost.status().message()), HasSubstr("connection refused"));
  EXPECT_FALSE(s->Snapshot().healthy);
  EXPECT_EQ(s->Snapshot().loss, absl::UnavailableError("connection refused"));
  // Once they are back, the engine finds them without being asked for anything.
  script.SetRecovery(absl::OkStatus());
  while (!s->Snapshot().healthy) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 2), 5), next.callback()).ok());
  next.Wait();
  EXPECT_EQ(next.tokens(), HashAnswer(Prompt(10, 2), 5));
}

// Nothing is computed meanwhile: no step runs into the loss.
TEST(Scheduler, SuspectedExpertsAreLostUntilTheyAreAttachedAnew) {
  HashScript script;
  const absl::Status wrong = absl::FailedPreconditionError("holds another model");
  script.SetRecovery(wrong);
  SchedulerOptions o = Options();
  o.expert_patience = absl::Hours(1);
  const auto s = Make(o, 64, script);
  s->SuspectExperts(absl::UnavailableError("no answer"));
  EXPECT_FALSE(s->Snapshot().healthy);
  while (s->Snapshot().loss != wrong) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_FALSE(s->Snapshot().healthy);
  Sink waiting;
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 20), waiting.callback()).ok());
  EXPECT_EQ(script.steps(), 0);
  script.SetRecovery(absl::OkStatus());
  waiting.Wait();
  EXPECT_EQ(waiting.tokens(), HashAnswer(Prompt(10, 1), 20));
  EXPECT_TRUE(s->Snapshot().healthy);
  EXPECT_TRUE(s->Snapshot().loss.ok());
  EXPECT_EQ(s->Snapshot().expert_recoveries, 1u);
}

TEST(Scheduler, AStepThatWorksEndsASuspicion) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  script.Hold();
  Sink sink;
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 20), sink.callback()).ok());
  while (s->Snapshot().running == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  s->SuspectExperts(absl::UnavailableError("no answer"));
  EXPECT_FALSE(s->Snapshot().healthy);
  script.Go();
  sink.Wait();
  EXPECT_TRUE(s->Snapshot().healthy);
  EXPECT_TRUE(s->Drain(absl::Seconds(5)));
  EXPECT_EQ(s->Snapshot().expert_recoveries, 0u);
}

TEST(Scheduler, RefusesWhatItCannotDo) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  Sink sink;
  auto code = [&](const SequenceRequest& r) { return s->Submit(r, sink.callback()).status().code(); };
  EXPECT_EQ(code(Request({}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request({kHashVocab}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request({-1}, 5)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request(Prompt(128, 1), 1)), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(code(Request({1}, -5)), absl::StatusCode::kInvalidArgument);
  SequenceRequest r = Request({1}, 1);
  r.sampling.top_p = 7;
  EXPECT_EQ(code(r), absl::StatusCode::kInvalidArgument);
  r = Request({1}, 1);
  r.resumed_tokens = 2;
  EXPECT_EQ(code(r), absl::StatusCode::kInvalidArgument);
  r = Request({1}, 1);
  r.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_EQ(code(r), absl::StatusCode::kDeadlineExceeded);
}

TEST(Scheduler, RefusesOptionsThatCannotWork) {
  HashScript script;
  auto code = [&](const SchedulerOptions& o, int32_t pages) {
    return Scheduler::Create(o, std::make_unique<HashBackend>(pages, script)).status().code();
  };
  EXPECT_EQ(code(Options(), 31), absl::StatusCode::kInvalidArgument) << "31 * 4 tokens, a context has 128";
  SchedulerOptions o = Options();
  o.max_batch_size = 65;
  EXPECT_EQ(code(o, 64), absl::StatusCode::kInvalidArgument);
  o = Options();
  o.prefix_cache = false;
  o.kv_host_bytes = 1 << 20;
  EXPECT_EQ(code(o, 64), absl::StatusCode::kInvalidArgument);
}

TEST(Scheduler, ADeadlineEndsWhatRunsAndWhatWaits) {
  HashScript script;
  SchedulerOptions o = Options();
  o.max_batch_size = 1;
  const auto s = Make(o, 64, script);
  script.Hold();
  SequenceRequest late = Request(Prompt(10, 1), 100);
  late.deadline = absl::Now() + absl::Milliseconds(20);
  Sink running, waiting, other;
  ASSERT_TRUE(s->Submit(late, running.callback()).ok());
  ASSERT_TRUE(s->Submit(late, waiting.callback()).ok());
  ASSERT_TRUE(s->Submit(Request(Prompt(10, 1), 10), other.callback()).ok());
  absl::SleepFor(late.deadline - absl::Now() + absl::Milliseconds(1));
  script.Go();
  running.Wait();
  waiting.Wait();
  other.Wait();
  EXPECT_TRUE(absl::IsDeadlineExceeded(running.status())) << running.status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(waiting.status())) << waiting.status();
  EXPECT_EQ(other.tokens(), HashAnswer(Prompt(10, 1), 10));
  EXPECT_TRUE(s->Drain(absl::Seconds(5)));
  EXPECT_EQ(s->Snapshot().kv.used, 0);
}

// While experts are lost, nobody who leaves has to wait for them.
TEST(Scheduler, CancelWorksWhileExpertsAreLost) {
  HashScript script;
  script.FailSteps({absl::UnavailableError("expert gone")});
  script.SetRecovery(absl::UnavailableError("connection refused"));
  SchedulerOptions o = Options();
  o.expert_patience = absl::Hours(1);
  const auto s = Make(o, 64, script);
  Sink sink;
  const auto number = s->Submit(Request(Prompt(10, 1), 20), sink.callback());
  ASSERT_TRUE(number.ok());
  while (s->Snapshot().healthy) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  s->Cancel(*number);
  EXPECT_TRUE(s->Drain(absl::Seconds(10)));
  EXPECT_EQ(s->Snapshot().kv.used, 0);
}

TEST(Scheduler, AFullQueueRefuses) {
  HashScript script;
  script.Hold();
  SchedulerOptions o = Options();
  o.max_batch_size = 1;
  o.max_waiting = 2;
  const auto s = Make(o, 64, script);
  std::vector<Sink> sinks(4);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(s->Submit(Request({1}, 2), sinks[i].callback()).ok());
  const auto refused = s->Submit(Request({1}, 2), sinks[3].callback()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("1 sequences run and 2 wait"));
  script.Go();
  for (int i = 0; i < 3; ++i) sinks[i].Wait();
}

TEST(Scheduler, DrainRefusesNewcomersAndDestructionFailsTheRest) {
  HashScript script;
  script.Hold();
  Sink sink, late;
  {
    const auto s = Make(Options(), 64, script);
    ASSERT_TRUE(s->Submit(Request({1}, 100), sink.callback()).ok());
    EXPECT_FALSE(s->Drain(absl::Milliseconds(10)));
    EXPECT_TRUE(absl::IsUnavailable(s->Submit(Request({1}, 1), late.callback()).status()));
    script.Go();
  }
  EXPECT_TRUE(sink.ended());
}

TEST(Scheduler, ALongPromptDoesNotStallTheOthers) {
  HashScript script;
  SchedulerOptions o = Options();
  const auto s = Make(o, 128, script);
  script.Hold();
  Sink small, large;
  ASSERT_TRUE(s->Submit(Request({1, 2}, 60), small.callback()).ok());
  ASSERT_TRUE(s->Submit(Request(Prompt(100, 9), 5), large.callback()).ok());
  script.Go();
  small.Wait();
  large.Wait();
  EXPECT_EQ(large.tokens(), HashAnswer(Prompt(100, 9), 5));
  // The first step may be all prompt; beside a running sequence only a small chunk is.
  EXPECT_LE(script.max_tokens(), o.chunk_size);
}

// The second turn of a conversation finds the first one's prompt and answer.
TEST(Scheduler, WhatWasComputedIsFoundAgain) {
  HashScript script;
  const auto s = Make(Options(), 64, script);
  Sink first, second, third;
  ASSERT_TRUE(s->Submit(Request(Prompt(30, 1), 20), first.callback()).ok());
  first.Wait();
  std::vector<int32_t> turn = Prompt(30, 1);
  const auto answer = first.tokens();
  turn.insert(turn.end(), answer.begin(), answer.end());
  const int64_t before = script.tokens();
  ASSERT_TRUE(s->Submit(Request(turn, 10), second.callback()).ok());
  second.Wait();
  EXPECT_EQ(second.tokens(), HashAnswer(turn, 10));
  EXPECT_EQ(second.statistics().cached_prompt_tokens, 48) << "49 of 50 were computed; 12 pages of 4 are full";
  EXPECT_EQ(script.tokens() - before, 2 + 9);
  // As a cut-off stream resumes: the same prompt, the first tokens of the answer, and the rest to be made.
  SequenceRequest resumed = Request(turn, 10);
  const auto rest = second.tokens();
  resumed.prompt.insert(resumed.prompt.end(), rest.begin(), rest.begin() + 4);
  resumed.resumed_tokens = 4;
  resumed.max_new_tokens = 6;
  ASSERT_TRUE(s->Submit(resumed, third.callback()).ok());
  third.Wait();
  EXPECT_EQ(third.tokens(), std::vector<int32_t>(rest.begin() + 4, rest.end()));
  EXPECT_EQ(third.statistics().cached_prompt_tokens, 53)
      << "and of a page that is known all but its last token";
  const SchedulerSnapshot now = s->Snapshot();
  EXPECT_EQ(now.query_tokens, 30u + 50u + 54u);
  EXPECT_EQ(now.hit_tokens, 48u + 53u);
}

// Several answers to one prompt, asked for at the same time: its full pages are computed once.
TEST(Scheduler, EqualPromptsAtTheSameTimeAreComputedOnce) {
  HashScript script;
  const auto s = Make(Options(), 128, script);
  script.Hold();
  std::vector<Sink> sinks(6);
  for (auto& sink : sinks) ASSERT_TRUE(s->Submit(Request(Prompt(101, 1), 1), sink.callback()).ok());
  script.Go();
  for (auto& sink : sinks) {
    sink.Wait();
    EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(101, 1), 1));
  }
  EXPECT_EQ(script.tokens(), 101 + 5);
}

// A prompt that ends with a page: its last page is not computed again either, later or at the same time.
TEST(Scheduler, OfAKnownPromptOneTokenIsComputed) {
  HashScript script;
  const auto s = Make(Options(), 128, script);
  script.Hold();
  std::vector<Sink> sinks(4);
  for (auto& sink : sinks) ASSERT_TRUE(s->Submit(Request(Prompt(64, 1), 1), sink.callback()).ok());
  script.Go();
  for (auto& sink : sinks) {
    sink.Wait();
    EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(64, 1), 1));
  }
  EXPECT_EQ(script.tokens(), 64 + 3);
  Sink later;
  ASSERT_TRUE(s->Submit(Request(Prompt(64, 1), 1), later.callback()).ok());
  later.Wait();
  EXPECT_EQ(later.statistics().cached_prompt_tokens, 63);
  EXPECT_EQ(script.tokens(), 64 + 4);
}

TEST(Scheduler, WithoutThePrefixCacheNothingIsKept) {
  HashScript script;
  SchedulerOptions o = Options();
  o.prefix_cache = false;
  const auto s = Make(o, 64, script);
  for (int i = 0; i < 2; ++i) {
    Sink sink;
    ASSERT_TRUE(s->Submit(Request(Prompt(30, 1), 5), sink.callback()).ok());
    sink.Wait();
    EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(30, 1), 5));
    EXPECT_EQ(sink.statistics().cached_prompt_tokens, 0);
  }
  EXPECT_EQ(script.tokens(), 2 * 34);
  EXPECT_TRUE(s->Drain(absl::Seconds(5)));
  EXPECT_EQ(s->Snapshot().kv.cached, 0);
  EXPECT_EQ(s->Snapshot().query_tokens, 0u);
}

// Pages that did not fit the device come back from the host, and are not computed again.
TEST(Scheduler, EvictedPagesReturnFromTheHost) {
  HashScript script;
  SchedulerOptions o = Options();
  o.kv_host_bytes = 64 * kHashPageTokens * static_cast<int64_t>(sizeof(int32_t));
  const auto s = Make(o, 32, script);  // one context
  for (int round = 0; round < 3; ++round) {
    for (int seed = 0; seed < 3; ++seed) {
      Sink sink;
      ASSERT_TRUE(s->Submit(Request(Prompt(81, seed), 3), sink.callback()).ok());
      sink.Wait();
      EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(81, seed), 3));
      EXPECT_EQ(sink.statistics().cached_prompt_tokens, round == 0 ? 0 : 80);
    }
  }
  const SchedulerSnapshot now = s->Snapshot();
  EXPECT_GT(now.kv.host_returned, 0u);
  EXPECT_EQ(now.kv.host_evicted, 0u);
  EXPECT_EQ(script.tokens(), 3 * 83 + 6 * 3);
}

}  // namespace
}  // namespace tandem::attention
