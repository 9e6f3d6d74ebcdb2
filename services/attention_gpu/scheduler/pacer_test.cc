#include "services/attention_gpu/scheduler/pacer.h"

#include <algorithm>
#include <functional>
#include <vector>

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

constexpr int32_t kMaxChunk = 64;

struct Outcome {
  double mean = 0, p50 = 0, p95 = 0, largest = 0;  // slowdowns of the steps
  int64_t tokens = 0;                              // of prompts
};

// A machine: seconds of a step of so many running sequences and prompt tokens.
using Machine = std::function<double(int32_t decoding, int32_t prompt_tokens)>;

Outcome Drive(Pacer& pacer, const Machine& machine, int32_t decoding, int warm, int steps,
              int32_t most_tokens = kMaxChunk) {
  Outcome out;
  std::vector<double> slowdowns;
  double time = 0;
  for (int i = 0; i < warm + steps; ++i) {
    const int32_t chunk = pacer.Chunk(decoding);
    EXPECT_LE(chunk, most_tokens);
    const double seconds = machine(decoding, chunk);
    pacer.Observe(decoding, chunk, seconds);
    if (i < warm) continue;
    slowdowns.push_back(seconds / machine(decoding, 0));
    time += slowdowns.back();
    out.tokens += chunk;
  }
  std::sort(slowdowns.begin(), slowdowns.end());
  out.mean = time / steps;
  out.p50 = slowdowns[steps / 2];
  out.p95 = slowdowns[steps * 95 / 100];
  out.largest = slowdowns.back();
  return out;
}

double Cheap(int32_t decoding, int32_t prompt_tokens) {
  return 0.0007 + 0.0001 * decoding + 0.00015 * prompt_tokens;
}

// One prompt token costs more than a whole step, as at the end of a long prompt; several at once cost less
// each.
double Dear(int32_t decoding, int32_t prompt_tokens) {
  return 0.0003 * decoding + (prompt_tokens > 0 ? 0.0007 + 0.0005 * prompt_tokens : 0);
}

TEST(Pacer, EveryStepKeepsToTheSlowdownWhereThatIsPossible) {
  for (const int32_t decoding : {1, 4, 16}) {
    Pacer pacer(2, kMaxChunk, 16);
    const Outcome o = Drive(pacer, Cheap, decoding, 40, 1000);
    EXPECT_LE(o.largest, 2) << decoding;
    EXPECT_GT(o.mean, 1.3) << decoding;
    EXPECT_GT(o.tokens, 1000) << decoding;
  }
}

TEST(Pacer, WhereThatIsNotPossibleFewStepsAreDisturbedAndTheMeanIsKept) {
  Pacer pacer(2, kMaxChunk, 16);
  const Outcome o = Drive(pacer, Dear, 1, 100, 5000);
  EXPECT_LE(o.mean, 2);
  EXPECT_GT(o.mean, 1.5);
  EXPECT_LE(o.p95, 1);
  EXPECT_LE(o.largest * Dear(1, 0), 0.012) << "seconds";
  EXPECT_GT(o.tokens, 1500);
}

// Steps are long and even a token at a time would be seen: still the mean is kept, and prompts move on.
TEST(Pacer, SlowMachinesDisturbAsLittleAsTheyCan) {
  const Machine slow = [](int32_t decoding, int32_t prompt_tokens) {
    return 0.2 * (decoding + prompt_tokens);
  };
  Pacer pacer(2, kMaxChunk, 16);
  const Outcome o = Drive(pacer, slow, 1, 10, 300);
  EXPECT_LE(o.mean, 2);
  EXPECT_LE(o.largest, 2.0001);
  EXPECT_GT(o.tokens, 200);
}

TEST(Pacer, FollowsWhatAPromptCostsWhereItStands) {
  Pacer pacer(2, kMaxChunk, 16);
  for (int round = 0; round < 3; ++round) {
    EXPECT_LE(Drive(pacer, Cheap, 1, 40, 200).largest, 2.01) << round;
    EXPECT_LE(Drive(pacer, Dear, 1, 40, 2000).mean, 2) << round;
  }
}

TEST(Pacer, UrgentPromptsMaySlowTheOthersDownInProportion) {
  const Machine machine = [](int32_t decoding, int32_t prompt_tokens) {
    return 20 * Cheap(decoding, prompt_tokens);
  };
  Pacer pacer(2, kMaxChunk, 16);
  const Outcome calm = Drive(pacer, machine, 4, 40, 500);
  pacer.SetUrgency(4);
  const Outcome urgent = Drive(pacer, machine, 4, 40, 500);
  EXPECT_GT(urgent.mean - 1, 3 * (calm.mean - 1));
  EXPECT_LE(urgent.largest, 5);
  EXPECT_GT(urgent.tokens, 3 * calm.tokens);
  pacer.SetUrgency(1);
  EXPECT_LE(Drive(pacer, machine, 4, 40, 500).largest, 2);
}

TEST(Pacer, UrgentPromptsMayTakeAsMuchAsASmoothTextAllows) {
  Pacer pacer(2, kMaxChunk, 16);
  Drive(pacer, Cheap, 4, 40, 100);
  pacer.SetUrgency(1.1);
  const Outcome urgent = Drive(pacer, Cheap, 4, 100, 500, 4 * kMaxChunk);
  EXPECT_LE(urgent.largest * Cheap(4, 0), 0.031);
  EXPECT_GT(urgent.tokens, 500 * 150);
}

TEST(Pacer, KnowsWhatAPromptTakesAlone) {
  Pacer pacer(2, kMaxChunk, 16);
  EXPECT_EQ(pacer.SecondsAlone(100), 0);
  for (int i = 0; i < 20; ++i) pacer.Observe(0, 100, 0.02);
  EXPECT_NEAR(pacer.SecondsAlone(1000), 0.2, 1e-6);
  pacer.Observe(0, 1, 0.01);  // a single token at a prompt's end says nothing of the rest
  Drive(pacer, Cheap, 2, 0, 50);
  EXPECT_NEAR(pacer.SecondsAlone(1000), 0.2, 1e-6);
}

TEST(Pacer, AStallOfTheMachineIsForgotten) {
  Pacer pacer(2, kMaxChunk, 16);
  Drive(pacer, Cheap, 2, 0, 100);
  pacer.Observe(2, 0, 5.0);  // an undisturbed step of five seconds
  EXPECT_LE(Cheap(2, pacer.Chunk(2)) / Cheap(2, 0), 2.5);
  pacer.Observe(2, 5, 5.0);
  const Outcome o = Drive(pacer, Cheap, 2, 200, 200);
  EXPECT_LE(o.mean, 2);
  EXPECT_GT(o.tokens, 200);
}

TEST(Pacer, WithoutALimitTheChunkIsWhatItIs) {
  Pacer pacer(0, kMaxChunk, 16);
  EXPECT_EQ(pacer.Chunk(3), kMaxChunk);
  Pacer wide(1000, kMaxChunk, 16);
  EXPECT_GE(Drive(wide, Cheap, 1, 100, 64).tokens, 62 * kMaxChunk);
}

}  // namespace
}  // namespace tandem::attention
