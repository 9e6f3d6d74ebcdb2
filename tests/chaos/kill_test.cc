// kill -9 in the midst of sixteen streams: the clients see a pause.
#include <iostream>

#include "tests/chaos/crowd.h"

namespace tandem::integration {
namespace {

constexpr int kTokens = 400;

class KillTest : public ::testing::Test {
 protected:
  void Start(StackOptions options = {}) {
    options.gateway.insert(options.gateway.end(), {"--resume-timeout", "60"});
    stack_ = std::make_unique<Stack>(options);
    ASSERT_TRUE(stack_->WaitReady());
    requests_ = CrowdRequests(kTokens);
    alone_ = AskAlone(stack_->rest(), requests_);
  }
  void TearDown() override {
    if (HasFailure() && stack_ != nullptr) std::cout << stack_->Logs();
  }

  std::unique_ptr<Stack> stack_;
  std::vector<Json> requests_;
  std::vector<Answer> alone_;
};

TEST_F(KillTest, Expert) {
  StackOptions options;
  options.experts = {{"--experts", "0-8"}, {"--experts", "8-16"}};
  Start(options);
  ExpectSame(AskTogether(stack_->rest(), requests_,
                         [&] {
                           stack_->expert(1).Kill();
                           stack_->StartExpert(1);
                         }),
             alone_);
  EXPECT_TRUE(
      WaitUntil([&] { return stack_->attention_metrics().Metric("tandem_expert_reattach_total") >= 1; }));
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(KillTest, Attention) {
  Start();
  ExpectSame(AskTogether(stack_->rest(), requests_,
                         [&] {
                           stack_->attention().Kill();
                           stack_->StartAttention();
                         }),
             alone_);
  EXPECT_EQ(stack_->rest().Metric("tandem_stream_resumes_total"), kCrowd);
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(KillTest, OneOfTwoEngines) {
  const TempFolder folder;
  const std::string address = "unix:" + (folder / "second");
  StackOptions options;
  options.gateway = {"--engine", address};
  Start(options);
  Process second("tandem-attention",
                 {"--model", DemoModel(), "--listen", address, "--metrics-listen", "127.0.0.1:0", "--threads",
                  "1", "--kv-tokens", "16384", "--expert", stack_->expert_address()});
  ASSERT_TRUE(stack_->gateway().WaitForOutput("engine " + address + ": serving").has_value())
      << stack_->Logs();
  const std::optional<std::string> port = second.WaitForOutput("metrics on port ([0-9]+)");
  ASSERT_TRUE(port.has_value()) << second.Output();
  const RestClient second_metrics(std::atoi(port->c_str()));
  ExpectSame(AskTogether(stack_->rest(), requests_, [&] { stack_->attention().Kill(); }), alone_);
  // Both had work: some streams were moved, some were where they are.
  EXPECT_GT(stack_->rest().Metric("tandem_stream_resumes_total"), 0);
  EXPECT_LT(stack_->rest().Metric("tandem_stream_resumes_total"), kCrowd);
  EXPECT_TRUE(WaitUntil([&] {
    return second_metrics.Metric("tandem_requests_running") == 0 &&
           second_metrics.Metric("tandem_kv_cache_used_ratio") == 0;
  }));
  stack_->StartAttention();  // for WaitIdle's metrics
  EXPECT_TRUE(WaitIdle(*stack_));
}

}  // namespace
}  // namespace tandem::integration
