#include "services/attention_gpu/experts/stream_share.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace tandem::attention {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

TEST(StreamShareTest, Spellings) {
  EXPECT_EQ(ParseStreamShare("auto")->mode, StreamShare::Mode::kAuto);
  EXPECT_EQ(ParseStreamShare("off")->mode, StreamShare::Mode::kOff);
  const auto percent = ParseStreamShare("40");
  ASSERT_TRUE(percent.ok());
  EXPECT_EQ(percent->mode, StreamShare::Mode::kPercent);
  EXPECT_EQ(percent->percent, 40);
  for (const char* bad : {"", "on", "-1", "101", "4x", "0.5"}) {
    const auto refused = ParseStreamShare(bad);
    EXPECT_TRUE(absl::IsInvalidArgument(refused.status())) << bad;
    EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("--stream-share"));
  }
}

// An R1 layer on a PCIe 5.0 machine.
ShareCosts Costs() {
  ShareCosts c;
  c.stream_expert = 0.52e-3;
  c.call_experts = {{4, 0.6e-3}, {16, 0.6e-3}, {128, 2.4e-3}};
  c.call_token = 4e-6;
  c.rest = 1e-3;
  c.rest_token = 3e-6;
  return c;
}

TEST(CallExpertTest, BetweenWhatWasMeasured) {
  ShareCosts c;
  EXPECT_EQ(CallExpertSeconds(c, 5), 0);
  c.call_experts = {{4, 2}};
  EXPECT_DOUBLE_EQ(CallExpertSeconds(c, 1), 2);
  EXPECT_DOUBLE_EQ(CallExpertSeconds(c, 8), 4);
  c.call_experts = {{4, 2}, {8, 3}, {16, 4}};
  c.call_factor = 10;
  for (const auto& [tokens, seconds] :
       {std::pair{1, 20}, {4, 20}, {6, 25}, {8, 30}, {12, 35}, {16, 40}, {32, 60}}) {
    EXPECT_DOUBLE_EQ(CallExpertSeconds(c, tokens), seconds) << tokens;
  }
  EXPECT_DOUBLE_EQ(CallExpertsSeconds(c, std::vector<int32_t>{6, 0, 8, 16}, {true, true, false, true}), 65);
}

TEST(CallFactorTest, GoesHalfOfTheWayAndNotTooFar) {
  ShareCosts c;
  LearnCallFactor(1, 1.04, &c);
  LearnCallFactor(1, 0, &c);
  LearnCallFactor(0, 1, &c);
  EXPECT_EQ(c.call_factor, 1);
  LearnCallFactor(1, 1.21, &c);
  EXPECT_DOUBLE_EQ(c.call_factor, 1.1);
  LearnCallFactor(4, 1, &c);
  EXPECT_DOUBLE_EQ(c.call_factor, 0.55);
  LearnCallFactor(4, 1, &c);
  EXPECT_EQ(c.call_factor, 0.5);
  for (int i = 0; i < 3; ++i) LearnCallFactor(1, 4, &c);
  EXPECT_EQ(c.call_factor, 2);
}

TEST(SharedLayerTest, TheLongerSide) {
  ShareCosts c;
  c.stream_expert = 2;
  c.call_token = 0.25;
  c.rest = 1;
  c.rest_token = 0.125;
  // The rest is 1 + 8 / 8 = 2.
  EXPECT_DOUBLE_EQ(SharedLayerSeconds(c, 8, 10, 4, 0), 20);  // copies all the time
  EXPECT_DOUBLE_EQ(SharedLayerSeconds(c, 8, 10, 0, 0), 22);  // none before the routing
  EXPECT_DOUBLE_EQ(SharedLayerSeconds(c, 8, 10, 4, 4), 20);
  EXPECT_DOUBLE_EQ(SharedLayerSeconds(c, 8, 2, 2, 24), 2 + 2 + 24);
}

TEST(ChooseSharedTest, BothSidesEndTogetherAndTheLeastAreGivenAway) {
  const ShareCosts c = Costs();
  std::vector<int32_t> counts(256, 16);
  for (size_t e = 100; e < 110; ++e) counts[e] = 2;
  counts[7] = 0;
  counts[3] = 1;
  std::vector<bool> ahead(256);
  std::fill_n(ahead.begin(), 24, true);
  const std::vector<bool> shared = ChooseShared(c, 512, counts, ahead);
  EXPECT_EQ(shared, ChooseShared(c, 512, counts, ahead));
  int64_t given = 0;
  for (size_t e = 0; e < 256; ++e) {
    if (e < 24 || counts[e] == 0) {
      EXPECT_FALSE(shared[e]) << e;
    } else if (counts[e] == 2) {
      EXPECT_TRUE(shared[e]) << e;
    }
    if (!shared[e]) continue;
    ++given;
  }
  EXPECT_TRUE(shared[255]);
  EXPECT_FALSE(shared[24]);
  const double calls = CallExpertsSeconds(c, counts, shared), one = CallExpertSeconds(c, 16);
  const auto with = [&](int64_t n, double s) { return SharedLayerSeconds(c, 512, 255 - n, 23, s); };
  EXPECT_LE(with(given, calls), with(given - 1, calls - one));
  EXPECT_LE(with(given, calls), with(given + 1, calls + one));
  EXPECT_LT(with(given, calls), 0.6 * with(0, 0));
}

TEST(ChooseSharedTest, NothingWhereItDoesNotPay) {
  ShareCosts c = Costs();
  const std::vector<int32_t> counts(16, 10);
  const std::vector<bool> none(16), all(16, true);
  c.call_experts = {{1, 1}};
  EXPECT_EQ(ChooseShared(c, 40, counts, none), none);
  c.call_experts = {{1, 0}};
  EXPECT_EQ(ChooseShared(c, 40, counts, all), none);
  EXPECT_EQ(ChooseShared(c, 40, std::vector<int32_t>(16), none), none);
}

TEST(ChoosePercentTest, OfThoseWithTokens) {
  const std::vector<int32_t> counts = {5, 0, 3, 9, 3};
  const std::vector<bool> ahead = {true, false, false, false, false};
  EXPECT_THAT(ChoosePercent(0, counts, ahead), ElementsAre(false, false, false, false, false));
  EXPECT_THAT(ChoosePercent(25, counts, ahead), ElementsAre(false, false, false, false, true));
  EXPECT_THAT(ChoosePercent(50, counts, ahead), ElementsAre(false, false, true, false, true));
  EXPECT_THAT(ChoosePercent(75, counts, ahead), ElementsAre(false, false, true, true, true));
  EXPECT_THAT(ChoosePercent(100, counts, ahead), ElementsAre(true, false, true, true, true));
}

TEST(ShareStepTokensTest, OneStepOrSeveralWhicheverIsFaster) {
  ShareCosts c = Costs();
  ShareShape shape;
  shape.experts = 256;
  shape.experts_per_token = 8;
  shape.ahead = 20;
  shape.most_tokens = 4096;
  constexpr int64_t kMost = 16384;
  for (int64_t few : {1, 100, 4096}) EXPECT_EQ(ShareStepTokens(c, shape, few, kMost), 4096) << few;
  EXPECT_EQ(ShareStepTokens(c, shape, 4097, kMost), 4096) << "one token more costs little behind it";
  for (int64_t many : {6000, 8192, 12000}) EXPECT_EQ(ShareStepTokens(c, shape, many, kMost), many);
  EXPECT_EQ(ShareStepTokens(c, shape, 50000, kMost), kMost);
  // A slower bus, faster processes: a whole pass for what is little more than a shared one is too much.
  c.stream_expert = 1.06e-3;
  c.call_experts = {{4, 0.2e-3}, {16, 0.25e-3}, {128, 1.2e-3}};
  EXPECT_LT(StreamedLayerSeconds(c, shape, 4096) + StreamedLayerSeconds(c, shape, 104),
            StreamedLayerSeconds(c, shape, 4200));
  EXPECT_EQ(ShareStepTokens(c, shape, 4200, kMost), 4096);
  EXPECT_EQ(ShareStepTokens(c, shape, 8192, kMost), 8192);
}

TEST(ShareBreakEvenTest, FromFewerTokensOnThanCopiesAlone) {
  ShareCosts c = Costs();
  c.call_experts = {{4, 0.35e-3}, {16, 0.35e-3}, {128, 2e-3}};
  c.alone = 0.9;
  const ShareShape shape{256, 8, 24, 512, 4096};
  const int64_t shared = ShareBreakEven(c, shape);
  EXPECT_GE(shared, 65);
  EXPECT_LT(shared, 150);
  // Where the processes are of no use to it, it is a matter of copies alone.
  ShareShape all_ahead = shape;
  all_ahead.ahead = 256;
  const int64_t copies = ShareBreakEven(c, all_ahead);
  EXPECT_GT(copies, shared);
  EXPECT_LT(copies, 600);
  // Nothing beats processes that take no time.
  c.call_experts = {{1, 0}, {100, 0}};
  c.call_token = c.rest = c.rest_token = 0;
  EXPECT_EQ(ShareBreakEven(c, shape), kNever);
}

}  // namespace
}  // namespace tandem::attention
