#include "services/attention_gpu/scheduler/planner.h"

#include <gtest/gtest.h>

#include "services/attention_gpu/scheduler/hash_backend.h"

namespace tandem::attention {
namespace {

class PlannerTest : public testing::Test {
 protected:
  void Make(int32_t pages) {
    backend_ = std::make_unique<HashBackend>(pages, script_);
    planner_ = std::make_unique<Planner>(options_, *backend_, HostPages());
  }
  static SchedulerOptions Options() {
    SchedulerOptions o;
    o.context_length = 256;
    o.max_batch_size = 4;
    o.chunk_size = 32;
    o.mixed_chunk_size = 8;
    o.max_decode_slowdown = 0;  // no times here
    o.vocab_size = kHashVocab;
    return o;
  }
  uint64_t Enqueue(int32_t prompt, int32_t first_token = -1) {
    auto s = std::make_unique<Sequence>();
    s->number = ++last_;
    const int32_t base = first_token >= 0 ? first_token : static_cast<int32_t>(last_) * 300;
    for (int32_t i = 0; i < prompt; ++i) s->tokens.push_back(base + i);
    s->request.prompt = s->tokens;
    all_[s->number] = s.get();
    planner_->Enqueue(std::move(s));
    return last_;
  }
  // One step; {sequence: tokens}.
  std::map<uint64_t, int32_t> Step() {
    const Plan plan = planner_->Next();
    StepResult result;
    EXPECT_TRUE(backend_->Step(plan.batch, &result).ok());
    planner_->Done(plan, 0.001);
    std::map<uint64_t, int32_t> out;
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      Sequence& s = *plan.sequences[i];
      out[s.number] = plan.batch.sequences[i].count;
      if (!plan.batch.sequences[i].sample) continue;
      s.tokens.push_back(result.sampled[i].token);
      ++s.generated;
    }
    return out;
  }
  using Counts = std::map<uint64_t, int32_t>;

  SchedulerOptions options_ = Options();
  HashScript script_;
  std::unique_ptr<HashBackend> backend_;
  std::unique_ptr<Planner> planner_;
  std::map<uint64_t, Sequence*> all_;
  uint64_t last_ = 0;
};

TEST_F(PlannerTest, AShortPromptPassesALongOneWhichStillMovesOn) {
  Make(256);
  Enqueue(200);
  Enqueue(100);
  Enqueue(10);
  EXPECT_EQ(Step(), (Counts{{1, 16}, {2, 6}, {3, 10}}));
  // Now the third decodes, and the prompts share the smaller budget.
  EXPECT_EQ(Step(), (Counts{{1, 4}, {2, 4}, {3, 1}}));
}

TEST_F(PlannerTest, OnePromptAloneGetsTheWholeBudget) {
  Make(256);
  Enqueue(50);
  EXPECT_EQ(Step(), (Counts{{1, 32}}));
  EXPECT_EQ(Step(), (Counts{{1, 18}}));
  EXPECT_EQ(Step(), (Counts{{1, 1}}));
}

// Seconds of a step on a machine where a prompt token costs 5 ms beside others, 1 ms alone.
double StepSeconds(const Plan& plan) {
  return plan.decoding > 0 ? 0.010 + 0.005 * plan.prompt_tokens : 0.001 * plan.prompt_tokens;
}

TEST_F(PlannerTest, APromptThatHasWaitedTooLongGetsMore) {
  options_.max_decode_slowdown = 2;
  options_.context_length = 4096;
  Make(1024);
  Enqueue(10);
  Step();  // it decodes from here on
  const uint64_t prompt = Enqueue(1500);
  // Tokens of the prompt in the next 64 steps.
  const auto tokens = [&] {
    int32_t count = 0;
    for (int i = 0; i < 64; ++i) {
      const Plan plan = planner_->Next();
      StepResult result;
      EXPECT_TRUE(backend_->Step(plan.batch, &result).ok());
      planner_->Done(plan, StepSeconds(plan));
      for (size_t s = 0; s < plan.sequences.size(); ++s) {
        Sequence& sequence = *plan.sequences[s];
        if (sequence.number == prompt) count += plan.batch.sequences[s].count;
        if (!plan.batch.sequences[s].sample) continue;
        sequence.tokens.push_back(result.sampled[s].token);
        ++sequence.generated;
      }
    }
    return count;
  };
  const int32_t calm = tokens();
  EXPECT_GT(calm, 30);
  EXPECT_LT(calm, 100);
  // Far beyond what it takes alone.
  all_[prompt]->admitted -= absl::Seconds(40);
  EXPECT_GT(tokens(), 3 * calm);
}

// However urgent prompts are: beside those who decode, a step has no more tokens than the backend takes, also
// where it would take more of a long prompt alone.
TEST_F(PlannerTest, AnUrgentPromptKeepsToTheStepsLimit) {
  options_.max_decode_slowdown = 2;
  options_.context_length = 4096;
  Make(1024);
  backend_->most_tokens = options_.chunk_size;
  planner_ = std::make_unique<Planner>(options_, *backend_, HostPages());
  Enqueue(10);
  Enqueue(10);
  Step();  // they decode from here on
  const uint64_t prompt = Enqueue(1500);
  size_t most = 0;
  for (int i = 0; i < 24; ++i) {
    all_[prompt]->admitted -= absl::Seconds(100);
    const Plan plan = planner_->Next();
    StepResult result;
    ASSERT_TRUE(backend_->Step(plan.batch, &result).ok());
    planner_->Done(plan, 0.010 + 0.0001 * plan.prompt_tokens);
    most = std::max(most, plan.batch.tokens.size());
    for (size_t s = 0; s < plan.sequences.size(); ++s) {
      if (!plan.batch.sequences[s].sample) continue;
      plan.sequences[s]->tokens.push_back(result.sampled[s].token);
      ++plan.sequences[s]->generated;
    }
  }
  EXPECT_EQ(most, static_cast<size_t>(options_.chunk_size));
}

TEST_F(PlannerTest, LongPromptsGetTheLargestSteps) {
  Make(256);
  backend_->long_prompt = 40;
  Enqueue(120);
  EXPECT_EQ(Step(), (Counts{{1, 64}}));
  EXPECT_EQ(Step(), (Counts{{1, 56}}));
  EXPECT_EQ(Step(), (Counts{{1, 1}}));
  // Not beside one that decodes.
  Enqueue(120);
  EXPECT_EQ(Step(), (Counts{{1, 1}, {2, 8}}));
  planner_->Remove(1);
  EXPECT_EQ(Step(), (Counts{{2, 64}}));
  EXPECT_EQ(Step(), (Counts{{2, 48}}));
  planner_->Remove(2);
  // It is the step that counts, not a prompt of it; what is left below that goes in chunks.
  Enqueue(35);
  Enqueue(30);
  EXPECT_EQ(Step(), (Counts{{3, 34}, {4, 30}}));
  EXPECT_EQ(Step(), (Counts{{3, 1}, {4, 1}}));
  planner_->Remove(3);
  planner_->Remove(4);
  Enqueue(39);
  EXPECT_EQ(Step(), (Counts{{5, 32}}));
  EXPECT_EQ(Step(), (Counts{{5, 7}}));
}

TEST_F(PlannerTest, WhoseTurnItIsWaitsForRoomAndNobodyPassesHim) {
  Make(64);  // 256 tokens
  Enqueue(150);
  Enqueue(150);
  Enqueue(10);
  Step();
  EXPECT_EQ(planner_->running(), 1) << "two prompts of 38 pages do not fit 64, and the third has to wait";
  EXPECT_NE(planner_->Remove(1), nullptr);
  Step();
  EXPECT_EQ(planner_->running(), 2);
}

TEST_F(PlannerTest, AKnownPromptNeedsNoRoom) {
  Make(64);
  Enqueue(201, 0);
  for (int i = 0; i < 8; ++i) Step();
  Enqueue(201, 0);
  Step();
  EXPECT_EQ(planner_->running(), 2) << "50 of its 51 pages are the first one's";
  EXPECT_EQ(all_[2]->cached, 200);
}

TEST_F(PlannerTest, TheLatestComerGivesWay) {
  Make(64);
  Enqueue(120);
  Enqueue(120);
  for (int i = 0; i < 30; ++i) Step();  // both decode, 60 of 64 pages and a few more
  SchedulerSnapshot now;
  planner_->Describe(now);
  EXPECT_GT(now.preemptions, 0u);
  EXPECT_EQ(planner_->running(), 1);
  EXPECT_EQ(all_[2]->computed, 0);
  EXPECT_NE(planner_->Remove(1), nullptr);
  Step();
  EXPECT_GE(all_[2]->computed, 100) << "its pages were still there";
}

TEST_F(PlannerTest, TheEarliestMovesOnWhateverTheOthersHold) {
  Make(64);
  Enqueue(20);
  Enqueue(20);
  Enqueue(20);
  Enqueue(20);
  for (int i = 0; i < 300 && all_[1]->tokens.size() < 255; ++i) {
    const size_t before = all_[1]->tokens.size() + all_[1]->computed;
    Step();
    ASSERT_GT(all_[1]->tokens.size() + all_[1]->computed, before);
  }
  EXPECT_EQ(all_[1]->tokens.size(), 255u);
}

TEST_F(PlannerTest, EqualPromptsWaitForTheFirst) {
  Make(256);
  Enqueue(41, 0);
  Enqueue(41, 0);
  EXPECT_EQ(Step(), (Counts{{1, 32}}));
  EXPECT_EQ(Step(), (Counts{{1, 9}}));
  EXPECT_EQ(Step(), (Counts{{1, 1}, {2, 1}}));
  EXPECT_EQ(all_[2]->cached, 40);
}

TEST_F(PlannerTest, EqualPromptsOfWholePagesWaitForTheFirst) {
  Make(256);
  Enqueue(40, 0);
  Enqueue(40, 0);
  EXPECT_EQ(Step(), (Counts{{1, 32}}));
  EXPECT_EQ(Step(), (Counts{{1, 8}}));
  EXPECT_EQ(Step(), (Counts{{1, 1}, {2, 1}}));
  EXPECT_EQ(all_[2]->cached, 39);
}

TEST_F(PlannerTest, WhatIsAlikeAtTheBeginningIsComputedOnce) {
  Make(256);
  Enqueue(30, 0);
  Enqueue(100, 0);
  Step();  // the first one's whole prompt; the second had to wait for it
  EXPECT_EQ(all_[1]->computed, 30);
  EXPECT_EQ(all_[2]->computed, 0);
  EXPECT_EQ(Step(), (Counts{{1, 1}, {2, 8}}));
  EXPECT_EQ(all_[2]->computed, 28 + 8);
}

TEST_F(PlannerTest, RemoveGivesThePagesBack) {
  Make(64);
  const uint64_t n = Enqueue(100);
  Step();
  EXPECT_NE(planner_->Remove(n), nullptr);
  EXPECT_EQ(planner_->Remove(n), nullptr);
  EXPECT_TRUE(planner_->idle());
  SchedulerSnapshot now;
  planner_->Describe(now);
  EXPECT_EQ(now.kv.used, 0);
}

}  // namespace
}  // namespace tandem::attention
