#include "services/attention_gpu/scheduler/pacer.h"

#include <random>

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

// A machine whose steps take so long.
double StepTime(int32_t decoding, int32_t prompt_tokens) {
  return 0.0007 + 0.0001 * decoding + 0.00015 * prompt_tokens;
}

// The largest slowdown over `steps` mixed steps after `warm` ones, and the prompt tokens done in all.
std::pair<double, int64_t> Drive(Pacer& pacer, int32_t decoding, int warm, int steps) {
  double worst = 0;
  int64_t tokens = 0;
  for (int i = 0; i < warm + steps; ++i) {
    const int32_t chunk = pacer.Chunk(decoding);
    pacer.Observe(decoding, chunk, StepTime(decoding, chunk));
    if (i < warm) continue;
    worst = std::max(worst, StepTime(decoding, chunk) / StepTime(decoding, 0));
    tokens += chunk;
  }
  return {worst, tokens};
}

TEST(Pacer, KeepsToTheSlowdownAndUsesIt) {
  for (int32_t decoding : {1, 4, 16}) {
    Pacer pacer(2, 64, 16);
    const auto [worst, tokens] = Drive(pacer, decoding, 40, 1000);
    EXPECT_LE(worst, 2) << decoding;
    EXPECT_GT(worst, 1.3) << decoding;
    EXPECT_GT(tokens, 1000) << decoding;
  }
}

TEST(Pacer, AlwaysMovesOn) {
  Pacer pacer(1.01, 64, 16);  // less than one token's worth
  const auto [worst, tokens] = Drive(pacer, 1, 0, 320);
  EXPECT_GE(tokens, 300) << "one token a step, but for the probes";
}

TEST(Pacer, AStallOfTheMachineIsForgotten) {
  Pacer pacer(2, 64, 16);
  Drive(pacer, 2, 0, 100);
  pacer.Observe(2, 0, 5.0);  // an undisturbed step of five seconds
  EXPECT_LE(StepTime(2, pacer.Chunk(2)) / StepTime(2, 0), 2.5);
  pacer.Observe(2, 5, 5.0);
  const auto [worst, tokens] = Drive(pacer, 2, 200, 200);
  EXPECT_LE(worst, 2);
  EXPECT_GT(tokens, 200);
}

TEST(Pacer, WithoutALimitTheChunkIsWhatItIs) {
  Pacer pacer(0, 64, 16);
  EXPECT_EQ(pacer.Chunk(3), 64);
}

TEST(Pacer, TheLimitOfTheChunkHolds) {
  Pacer pacer(1000, 8, 16);
  for (int i = 0; i < 100; ++i) {
    const int32_t chunk = pacer.Chunk(1);
    EXPECT_LE(chunk, 8);
    pacer.Observe(1, chunk, StepTime(1, chunk));
  }
}

}  // namespace
}  // namespace tandem::attention
