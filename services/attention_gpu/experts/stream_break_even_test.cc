#include "services/attention_gpu/experts/stream_break_even.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

namespace tandem::attention {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

TEST(StreamPrefillTest, Spellings) {
  EXPECT_EQ(ParseStreamPrefill("auto")->mode, StreamPrefill::Mode::kAuto);
  EXPECT_EQ(ParseStreamPrefill("off")->mode, StreamPrefill::Mode::kOff);
  const auto from = ParseStreamPrefill("700");
  ASSERT_TRUE(from.ok());
  EXPECT_EQ(from->mode, StreamPrefill::Mode::kFrom);
  EXPECT_EQ(from->from_tokens, 700);
  for (const char* bad : {"", "on", "0", "-1", "7x", "99999999999999999999"}) {
    const auto refused = ParseStreamPrefill(bad);
    EXPECT_TRUE(absl::IsInvalidArgument(refused.status())) << bad;
    EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("--stream-prefill"));
  }
}

TEST(BreakEvenTest, WhereTheCallsTakeAsLong) {
  EXPECT_EQ(BreakEvenTokens(0.130, 0.085, 256), 392);
  EXPECT_EQ(BreakEvenTokens(1e-9, 1, 256), 1);
  EXPECT_EQ(BreakEvenTokens(1, 0, 256), kNever);
  EXPECT_EQ(BreakEvenTokens(std::nan(""), 1, 256), kNever);
}

// Takes down what it is asked.
class Asked final : public ExpertGroup {
 public:
  absl::Status Start(const ExpertCall& call) override {
    layers.insert(call.layer);
    ++calls;
    for (int64_t t = 0; t < call.n_tokens; ++t) {
      std::set<int32_t> ids;
      for (int64_t i = 0; i < call.experts_per_token; ++i) {
        ids.insert(call.expert_ids[t * call.experts_per_token + i]);
      }
      EXPECT_EQ(static_cast<int32_t>(ids.size()), call.experts_per_token) << "an expert twice";
      EXPECT_GE(*ids.begin(), 0);
      EXPECT_LT(*ids.rbegin(), 10);
      used.merge(ids);
    }
    return calls > good ? absl::UnavailableError("gone") : absl::OkStatus();
  }
  absl::Status Finish(float*) override { return absl::OkStatus(); }
  absl::Status Recover(absl::Duration) override { return absl::OkStatus(); }
  int processes() const override { return 1; }

  std::set<int32_t> layers, used;
  int calls = 0, good = 1000;
};

TEST(TimeExpertCallTest, AsksAllLayersForAllExperts) {
  model::ModelConfig c;
  c.hidden_size = 32;
  c.n_routed_experts = 10;
  c.num_experts_per_tok = 3;
  c.num_hidden_layers = 4;
  c.first_k_dense_replace = 2;
  Asked asked;
  const auto seconds = TimeExpertCall(asked, c, 64);
  ASSERT_TRUE(seconds.ok()) << seconds.status();
  EXPECT_GE(*seconds, 0);
  EXPECT_THAT(asked.layers, ::testing::ElementsAre(2, 3));
  EXPECT_EQ(asked.used.size(), 10u);
  asked.good = asked.calls + 2;
  EXPECT_TRUE(absl::IsUnavailable(TimeExpertCall(asked, c, 64).status()));
  EXPECT_TRUE(absl::IsUnimplemented(asked.MapWeights().status()));
}

}  // namespace
}  // namespace tandem::attention
