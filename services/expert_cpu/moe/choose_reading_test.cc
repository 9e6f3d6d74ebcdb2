#include "services/expert_cpu/moe/choose_reading.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "services/expert_cpu/moe/moe_test_util.h"

namespace tandem::expert {
namespace {

using kernels::ReadingWay;
using testing::Batch;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Process;
using testing::SyntheticModel;
using testing::SyntheticShape;

std::vector<ReadingWay> Order(ReadingWay first, int rounds,
                              std::map<ReadingWay, std::vector<double>> seconds) {
  std::map<ReadingWay, size_t> calls;
  const auto tried = TryReadings(first, rounds, absl::InfiniteDuration(), [&](ReadingWay way) {
    const std::vector<double>& all = seconds[way];
    return absl::StatusOr<double>(all[calls[way]++ % all.size()]);
  });
  EXPECT_TRUE(tried.ok());
  std::vector<ReadingWay> out;
  for (const TriedReading& t : *tried) out.push_back(t.way);
  return out;
}

TEST(TryReadings, TheFastestInMostRoundsLeads) {
  EXPECT_THAT(Order(ReadingWay::kRowsTwice, 5,
                    {{ReadingWay::kPanels, {2, 2, 9, 2, 9}},
                     {ReadingWay::kPanelsRows, {6, 6, 6, 6, 6}},
                     {ReadingWay::kFollowed, {1, 5, 5, 1, 5}},
                     {ReadingWay::kRows, {4, 4, 4, 4, 4}},
                     {ReadingWay::kRowsTwice, {3, 3, 3, 3, 3}}}),
              ElementsAre(ReadingWay::kPanels, ReadingWay::kRowsTwice, ReadingWay::kRows,
                          ReadingWay::kFollowed, ReadingWay::kPanelsRows));
}

TEST(TryReadings, WhatIsUsualStaysUnlessAnotherIsClearlyFaster) {
  const std::map<ReadingWay, std::vector<double>> close = {{ReadingWay::kPanels, {1.00}},
                                                           {ReadingWay::kPanelsRows, {7.0}},
                                                           {ReadingWay::kFollowed, {0.98}},
                                                           {ReadingWay::kRows, {1.5}},
                                                           {ReadingWay::kRowsTwice, {1.2}}};
  EXPECT_THAT(Order(ReadingWay::kPanels, 3, close),
              ElementsAre(ReadingWay::kPanels, ReadingWay::kFollowed, ReadingWay::kRowsTwice,
                          ReadingWay::kRows, ReadingWay::kPanelsRows));
  EXPECT_EQ(Order(ReadingWay::kRows, 3, close)[0], ReadingWay::kFollowed);
}

// Memory that becomes slower in the middle is no reason to change.
TEST(TryReadings, WaysAreComparedWithinARound) {
  const std::vector<double> drifting = {1, 1, 4, 4, 4}, behind = {1.1, 1.1, 1.1, 4.4, 4.4};
  EXPECT_EQ(Order(ReadingWay::kRows, 5,
                  {{ReadingWay::kPanels, behind},
                   {ReadingWay::kPanelsRows, behind},
                   {ReadingWay::kFollowed, {2, 2, 8, 8, 8}},
                   {ReadingWay::kRows, drifting},
                   {ReadingWay::kRowsTwice, behind}})[0],
            ReadingWay::kRows);
}

TEST(TryReadings, OneRoundEvenWithoutTimeAndErrorsEndIt) {
  int calls = 0;
  const auto count = [&](ReadingWay) {
    ++calls;
    return absl::StatusOr<double>(1);
  };
  ASSERT_TRUE(TryReadings(ReadingWay::kRows, 9, absl::ZeroDuration(), count).ok());
  EXPECT_EQ(calls, static_cast<int>(kernels::kReadingWays.size()));
  const auto fail = [&](ReadingWay way) {
    return way == ReadingWay::kPanels ? absl::InternalError("no") : absl::StatusOr<double>(1);
  };
  EXPECT_EQ(TryReadings(ReadingWay::kRows, 9, absl::InfiniteDuration(), fail).status().message(), "no");
}

class ChooseReadingTest : public ::testing::Test {
 protected:
  ~ChooseReadingTest() override { kernels::SetReadingWay(kernels::DefaultReadingWay()); }
};

TEST_F(ChooseReadingTest, TriesAllOnTheShardsOwnExperts) {
  SyntheticShape shape;
  shape.hidden = 2048;  // long enough for rows
  shape.layers = 3;
  const SyntheticModel model(shape);
  Process process(model);
  const Batch batch = Batch::Random(shape, 3, 5);
  const auto before = process.F32(batch);
  ChooseReadingOptions options;
  options.least_bytes = 0;
  options.rounds = 2;
  const auto said = ChooseReading(process.shard(), process.moe(), options);
  ASSERT_TRUE(said.ok()) << said.status();
  for (const ReadingWay way : kernels::kReadingWays) {
    EXPECT_THAT(*said, HasSubstr(std::string(kernels::ReadingWayName(way))));
  }
  EXPECT_EQ(said->rfind(std::string(kernels::ReadingWayName(kernels::ActiveReadingWay())) + " (", 0), 0u)
      << *said;
  for (const ReadingWay way : kernels::kReadingWays) {
    kernels::SetReadingWay(way);
    EXPECT_EQ(process.F32(batch), before) << kernels::ReadingWayName(way);
  }
}

TEST_F(ChooseReadingTest, CallsMayHaveOneTokenOnly) {
  const SyntheticModel model{SyntheticShape()};
  Process process(model);
  threading::ThreadPool::Options threads;
  threads.threads = 1;
  threading::ThreadPool pool(threads);
  Moe::Options one;
  one.max_tokens = 1;
  Moe moe(process.shard(), pool, one);
  ChooseReadingOptions options;
  options.least_bytes = 0;
  options.rounds = 1;
  const auto said = ChooseReading(process.shard(), moe, options);
  EXPECT_TRUE(said.ok()) << said.status();
}

TEST_F(ChooseReadingTest, AShardThatCachesMayHoldSaysNothing) {
  const SyntheticModel model{SyntheticShape()};
  Process process(model);
  kernels::SetReadingWay(ReadingWay::kRows);
  const auto said = ChooseReading(process.shard(), process.moe(), {});
  ASSERT_TRUE(said.ok()) << said.status();
  EXPECT_THAT(*said, HasSubstr("usual"));
  EXPECT_EQ(kernels::ActiveReadingWay(), kernels::DefaultReadingWay());
}

TEST_F(ChooseReadingTest, ARangeOfExpertsFewerThanATokenHas) {
  SyntheticShape shape;
  shape.experts = 8;
  shape.experts_per_token = 4;
  const SyntheticModel model(shape);
  ShardRequest range;
  range.expert_begin = 5;
  range.expert_end = 8;
  Process process(model, range);
  ChooseReadingOptions options;
  options.least_bytes = 0;
  options.rounds = 1;
  const auto said = ChooseReading(process.shard(), process.moe(), options);
  EXPECT_TRUE(said.ok()) << said.status();
}

}  // namespace
}  // namespace tandem::expert
