// Long steps beside the others': the scheduler over a backend that can make them.
#include <algorithm>
#include <functional>
#include <random>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/attention_gpu/scheduler/hash_backend.h"
#include "services/attention_gpu/scheduler/scheduler.h"
#include "services/attention_gpu/scheduler/sink.h"

namespace tandem::attention {
namespace {

constexpr int kLong = 40;          // tokens from which on a prompt has a long step
constexpr int kForever = 1 << 30;  // looks

std::vector<int32_t> Prompt(int n, int seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> p(n);
  for (int32_t& t : p) t = static_cast<int32_t>(rng() % kHashVocab);
  return p;
}

class LongStep : public testing::Test {
 protected:
  void Start(int32_t pages = 256) {
    SchedulerOptions o;
    o.context_length = 512;
    o.max_batch_size = 8;
    o.chunk_size = 32;
    o.mixed_chunk_size = 8;
    o.vocab_size = kHashVocab;
    auto backend = std::make_unique<HashBackend>(pages, script_);
    backend->long_prompt = kLong;
    backend->beside = true;
    backend->long_step = long_step_;
    auto s = Scheduler::Create(o, std::move(backend));
    ASSERT_TRUE(s.ok()) << s.status();
    scheduler_ = std::move(*s);
  }
  uint64_t Submit(Sink& sink, int prompt, int seed, int n) {
    SequenceRequest r;
    r.prompt = Prompt(prompt, seed);
    r.max_new_tokens = n;
    const auto number = scheduler_->Submit(std::move(r), sink.callback());
    EXPECT_TRUE(number.ok()) << number.status();
    return number.ok() ? *number : 0;
  }
  // A stream in the middle of its first step, and a long prompt that comes before its second one.
  void SubmitBoth(Sink& stream, Sink& prompt) {
    script_.Hold();
    Submit(stream, 5, 1, 100);
    Until([&] { return scheduler_->Snapshot().running == 1; });
    Submit(prompt, 60, 2, 10);
  }
  template <typename Condition>
  static void Until(const Condition& condition) {
    for (int i = 0; i < 60'000 && !condition(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_TRUE(condition());
  }
  void ExpectAllFree() {
    EXPECT_TRUE(scheduler_->Drain(absl::Seconds(30)));
    EXPECT_EQ(scheduler_->Snapshot().kv.used, 0);
  }

  HashScript script_;
  std::function<int32_t(int64_t, bool)> long_step_;
  std::unique_ptr<Scheduler> scheduler_;
};

TEST_F(LongStep, OthersGoOnBesideIt) {
  Start();
  script_.SetLong(kForever);
  Sink stream, prompt, later;
  SubmitBoth(stream, prompt);
  script_.Go();
  stream.Wait();
  EXPECT_EQ(stream.tokens(), HashAnswer(Prompt(5, 1), 100));
  EXPECT_EQ(script_.long_steps(), 1);
  EXPECT_GE(script_.steps_beside(), 99);
  // A short prompt that comes meanwhile does not wait either.
  Submit(later, 20, 3, 5);
  later.Wait();
  EXPECT_EQ(later.tokens(), HashAnswer(Prompt(20, 3), 5));
  EXPECT_TRUE(prompt.tokens().empty());
  script_.SetLong(0);
  prompt.Wait();
  EXPECT_EQ(prompt.tokens(), HashAnswer(Prompt(60, 2), 10));
  EXPECT_EQ(script_.long_steps(), 1);
  EXPECT_EQ(script_.long_tokens(), 60);
  ExpectAllFree();
}

TEST_F(LongStep, AloneAndInSeveralSteps) {
  Start();
  script_.SetLong(3);
  Sink sink;
  Submit(sink, 2 * kHashStepTokens + 50, 1, 10);  // the last 50 are worth one, too
  sink.Wait();
  EXPECT_EQ(sink.tokens(), HashAnswer(Prompt(2 * kHashStepTokens + 50, 1), 10));
  EXPECT_EQ(script_.long_steps(), 3);
  EXPECT_EQ(script_.long_tokens(), 2 * kHashStepTokens + 50);
  Sink rest;
  Submit(rest, kHashStepTokens + 10, 2, 10);  // 10 are not
  rest.Wait();
  EXPECT_EQ(rest.tokens(), HashAnswer(Prompt(kHashStepTokens + 10, 2), 10));
  EXPECT_EQ(script_.long_tokens(), 3 * kHashStepTokens + 50);
  ExpectAllFree();
}

TEST_F(LongStep, AsLargeAsTheBackendWantsItForTheFirstPrompt) {
  std::vector<std::pair<int64_t, bool>> asked;
  long_step_ = [&asked](int64_t prompt, bool others_decode) {
    asked.emplace_back(prompt, others_decode);
    return others_decode ? kHashStepTokens : 50;
  };
  Start();
  script_.SetLong(3);
  Sink alone;
  Submit(alone, 150, 1, 10);
  alone.Wait();
  EXPECT_EQ(alone.tokens(), HashAnswer(Prompt(150, 1), 10));
  EXPECT_EQ(script_.long_steps(), 3);
  EXPECT_EQ(asked, (std::vector<std::pair<int64_t, bool>>{{150, false}, {100, false}, {50, false}}));
  Sink stream, prompt;
  SubmitBoth(stream, prompt);
  script_.Go();
  prompt.Wait();
  EXPECT_EQ(script_.long_steps(), 4) << "60 tokens at once";
  stream.Wait();
  // Not the last one always: what is asked when the prompt's end and the stream's come together counts, too.
  EXPECT_NE(std::find(asked.begin(), asked.end(), std::make_pair(int64_t{60}, true)), asked.end());
  ExpectAllFree();
}

TEST_F(LongStep, CancelledInTheMiddle) {
  Start();
  script_.SetLong(kForever);
  Sink stream, cancelled, companion;
  Submit(stream, 5, 1, 300);
  stream.WaitForTokens(1);
  script_.Hold();  // both come before the next step is planned
  const uint64_t number = Submit(cancelled, 30, 2, 10);
  Submit(companion, 31, 3, 10);
  script_.Go();
  Until([&] { return script_.long_steps() > 0; });
  scheduler_->Cancel(number);
  Until([&] { return script_.dropped() > 0; });
  script_.SetLong(2);
  companion.Wait();
  stream.Wait();
  EXPECT_EQ(companion.tokens(), HashAnswer(Prompt(31, 3), 10));
  EXPECT_EQ(stream.tokens(), HashAnswer(Prompt(5, 1), 300));
  EXPECT_TRUE(cancelled.tokens().empty());
  ExpectAllFree();
}

TEST_F(LongStep, ADeadlineInTheMiddle) {
  Start();
  script_.SetLong(kForever);
  Sink sink;
  SequenceRequest r;
  r.prompt = Prompt(60, 1);
  r.deadline = absl::Now() + absl::Milliseconds(50);
  ASSERT_TRUE(scheduler_->Submit(std::move(r), sink.callback()).ok());
  sink.Wait();
  EXPECT_TRUE(absl::IsDeadlineExceeded(sink.status()));
  EXPECT_EQ(script_.dropped(), script_.long_steps()) << "mostly one, none on a machine that stalls";
  ExpectAllFree();
}

TEST_F(LongStep, ALossThatItSeesIsAPause) {
  Start();
  script_.SetLong(5, {absl::UnavailableError("expert gone")});
  Sink stream, prompt;
  SubmitBoth(stream, prompt);
  script_.Go();
  prompt.Wait();
  stream.Wait();
  EXPECT_EQ(prompt.tokens(), HashAnswer(Prompt(60, 2), 10));
  EXPECT_EQ(stream.tokens(), HashAnswer(Prompt(5, 1), 100));
  EXPECT_EQ(script_.long_steps(), 2);
  EXPECT_EQ(script_.dropped(), 0) << "it is no more";
  EXPECT_EQ(scheduler_->Snapshot().expert_recoveries, 1u);
  ExpectAllFree();
}

TEST_F(LongStep, ALossThatOthersSeeEndsIt) {
  Start();
  script_.SetLong(kForever);
  Sink stream, prompt;
  SubmitBoth(stream, prompt);
  const absl::Status gone = absl::UnavailableError("expert gone");
  script_.FailSteps({gone, absl::OkStatus(), absl::OkStatus()});
  script_.Go();
  Until([&] { return script_.dropped() == 1; });
  script_.SetLong(1);
  prompt.Wait();
  stream.Wait();
  EXPECT_EQ(prompt.tokens(), HashAnswer(Prompt(60, 2), 10));
  EXPECT_EQ(stream.tokens(), HashAnswer(Prompt(5, 1), 100));
  EXPECT_EQ(scheduler_->Snapshot().expert_recoveries, 1u);
  ExpectAllFree();
}

TEST_F(LongStep, AnErrorIsThatOfThoseInIt) {
  Start();
  script_.SetLong(3, {absl::InternalError("no memory")});
  Sink stream, prompt;
  Submit(stream, 5, 1, 200);
  stream.WaitForTokens(1);
  Submit(prompt, 60, 2, 10);
  prompt.Wait();
  stream.Wait();
  EXPECT_EQ(prompt.status(), absl::InternalError("no memory"));
  EXPECT_EQ(stream.tokens(), HashAnswer(Prompt(5, 1), 200));
  ExpectAllFree();
}

TEST_F(LongStep, TheEngineStopsInTheMiddle) {
  Start();
  script_.SetLong(kForever);
  Sink prompt;
  Submit(prompt, 60, 2, 10);
  Until([&] { return script_.long_steps() == 1; });
  scheduler_.reset();
  EXPECT_TRUE(absl::IsCancelled(prompt.status()));
}

// Prompts short and long, far more than the pages hold: nobody starves, nobody's pages are taken in the
// middle, and everybody gets his tokens.
TEST_F(LongStep, ManyInFewPages) {
  Start(128);  // one context
  script_.SetLong(4);
  std::mt19937 rng(7);
  constexpr int kCount = 60;
  std::vector<Sink> sinks(kCount);
  std::vector<std::pair<int, int>> sizes;
  for (int i = 0; i < kCount; ++i) {
    const int prompt = 1 + static_cast<int>(rng() % (i % 3 == 0 ? 200 : 30));
    sizes.push_back({prompt, 1 + static_cast<int>(rng() % 80)});
    Submit(sinks[i], sizes[i].first, i, sizes[i].second);
  }
  for (int i = 0; i < kCount; ++i) {
    sinks[i].Wait();
    EXPECT_EQ(sinks[i].tokens(), HashAnswer(Prompt(sizes[i].first, i), sizes[i].second)) << "sequence " << i;
  }
  EXPECT_GT(scheduler_->Snapshot().preemptions, 0u) << "the test does not test preemption";
  EXPECT_GT(script_.long_steps(), 5);
  EXPECT_GT(script_.steps_beside(), 5);
  ExpectAllFree();
}

}  // namespace
}  // namespace tandem::attention
