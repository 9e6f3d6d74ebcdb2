// SIGSTOP and SIGCONT in the midst of sixteen streams: a process that is slow is not taken for dead too soon,
// and one that was taken for dead and comes back does no harm.
#include <signal.h>

#include <iostream>
#include <thread>

#include "tests/chaos/crowd.h"

namespace tandem::integration {
namespace {

constexpr int kTokens = 400;

class StopTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    StackOptions options;
    options.gateway = {"--resume-timeout", "60"};
    stack_ = std::make_unique<Stack>(options);
    ASSERT_TRUE(stack_->WaitReady());
    requests_ = CrowdRequests(kTokens);
    alone_ = AskAlone(stack_->rest(), requests_);
  }
  static void TearDownTestSuite() { stack_.reset(); }
  void TearDown() override {
    if (HasFailure()) std::cout << stack_->Logs();
  }
  static void StopFor(Process& process, std::chrono::milliseconds time) {
    process.Stop();
    std::this_thread::sleep_for(time);
    process.Signal(SIGCONT);
  }

  static std::unique_ptr<Stack> stack_;
  static std::vector<Json> requests_;
  static std::vector<Answer> alone_;
};
std::unique_ptr<Stack> StopTest::stack_;
std::vector<Json> StopTest::requests_;
std::vector<Answer> StopTest::alone_;

TEST_F(StopTest, ExpertForAMoment) {
  const auto strike = [] { StopFor(stack_->expert(), std::chrono::milliseconds(500)); };
  ExpectSame(AskTogether(stack_->rest(), requests_, strike), alone_);
  EXPECT_EQ(stack_->attention_metrics().Metric("tandem_expert_reattach_total"), 0);
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(StopTest, ExpertBeyondItsLease) {
  const auto strike = [] { StopFor(stack_->expert(), std::chrono::seconds(13)); };
  ExpectSame(AskTogether(stack_->rest(), requests_, strike), alone_);
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(StopTest, Attention) {
  const auto strike = [] { StopFor(stack_->attention(), std::chrono::seconds(2)); };
  ExpectSame(AskTogether(stack_->rest(), requests_, strike), alone_);
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(StopTest, Gateway) {
  const auto strike = [] { StopFor(stack_->gateway(), std::chrono::seconds(2)); };
  ExpectSame(AskTogether(stack_->rest(), requests_, strike), alone_);
  EXPECT_TRUE(WaitIdle(*stack_));
}

}  // namespace
}  // namespace tandem::integration
