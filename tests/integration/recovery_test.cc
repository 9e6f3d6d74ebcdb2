// What happens when something dies: processes are killed in mid-stream, clients go away, services are told to
// stop. Streams must end as if nothing had happened, or with an error that says what did.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>

#include "common/gguf/gguf.h"
#include "common/model/tensors.h"
#include "common/rpc/channel.h"
#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kLongTokens = 600;  // long enough that a kill after a few events comes in mid-stream
constexpr int kEventsBefore = 10;

// The same, drawn instead of greedy: only the same draws give the same text.
Json Sampled(Json request) {
  request["temperature"] = 1.2;
  request["top_p"] = 1;
  request["seed"] = 4711;
  return request;
}

// Does `strike` once, in the midst of the stream.
Answer StreamAndStrike(const RestClient& rest, const Json& request, const std::function<void()>& strike) {
  bool struck = false;
  Answer answer = rest.Stream(request, [&](int events) {
    if (!struck && events >= kEventsBefore) {
      struck = true;
      strike();
    }
    return true;
  });
  EXPECT_TRUE(struck) << answer.ToString();
  return answer;
}

void ExpectSame(const Answer& got, const Answer& undisturbed) {
  EXPECT_TRUE(got.ok()) << got.ToString();
  EXPECT_TRUE(got.done) << got.ToString();
  EXPECT_EQ(got.reasoning, undisturbed.reasoning);
  EXPECT_EQ(got.content, undisturbed.content);
  EXPECT_EQ(got.finish, undisturbed.finish);
  EXPECT_EQ(got.usage["prompt_tokens"], undisturbed.usage["prompt_tokens"]);
  EXPECT_EQ(got.usage["completion_tokens"], undisturbed.usage["completion_tokens"]);
}

// By the way that expert calls take.
class RecoveryTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (running_ != GetParam()) {
      stack_.reset();
      StackOptions options;
      options.attention = {"--expert-transport", GetParam()};
      options.gateway = {"--resume-timeout", "60"};
      stack_ = std::make_unique<Stack>(options);
      running_ = GetParam();
    }
    ASSERT_TRUE(stack_->WaitReady());
    if (greedy_.ok()) return;
    greedy_ = stack_->rest().Stream(LongQuestion(kLongTokens));
    ASSERT_TRUE(greedy_.ok()) << greedy_.ToString();
    ASSERT_GE(greedy_.usage["completion_tokens"], kLongTokens);
    sampled_ = stack_->rest().Stream(Sampled(LongQuestion(kLongTokens)));
    ASSERT_TRUE(sampled_.ok()) << sampled_.ToString();
    ASSERT_NE(sampled_.content, greedy_.content);
  }
  void TearDown() override {
    if (HasFailure()) std::cout << stack_->Logs();
  }
  static void TearDownTestSuite() { stack_.reset(); }

  static std::unique_ptr<Stack> stack_;
  static std::string running_;      // the parameter of stack_
  static Answer greedy_, sampled_;  // undisturbed
};
std::unique_ptr<Stack> RecoveryTest::stack_;
std::string RecoveryTest::running_;
Answer RecoveryTest::greedy_;
Answer RecoveryTest::sampled_;
INSTANTIATE_TEST_SUITE_P(Transports, RecoveryTest, ::testing::Values("ring", "grpc"),
                         [](const auto& info) { return info.param; });

TEST_P(RecoveryTest, ExpertKilledInMidStream) {
  const auto kill_expert = [] {
    stack_->expert().Kill();
    stack_->StartExpert(0);
  };
  ExpectSame(StreamAndStrike(stack_->rest(), LongQuestion(kLongTokens), kill_expert), greedy_);
  EXPECT_TRUE(
      WaitUntil([] { return stack_->attention_metrics().Metric("tandem_expert_reattach_total") >= 1; }));
  ExpectSame(StreamAndStrike(stack_->rest(), Sampled(LongQuestion(kLongTokens)), kill_expert), sampled_);
}

TEST_P(RecoveryTest, AttentionKilledInMidStream) {
  const double resumes = stack_->rest().Metric("tandem_stream_resumes_total");
  const auto kill_attention = [] {
    stack_->attention().Kill();
    stack_->StartAttention();
  };
  ExpectSame(StreamAndStrike(stack_->rest(), LongQuestion(kLongTokens), kill_attention), greedy_);
  ExpectSame(StreamAndStrike(stack_->rest(), Sampled(LongQuestion(kLongTokens)), kill_attention), sampled_);
  EXPECT_EQ(stack_->rest().Metric("tandem_stream_resumes_total"), resumes + 2);
}

TEST_P(RecoveryTest, BothKilledWithSeveralStreams) {
  std::vector<std::future<Answer>> others;
  const RestClient rest = stack_->rest();
  for (int i = 0; i < 3; ++i) {
    others.push_back(
        std::async(std::launch::async, [rest] { return rest.Stream(LongQuestion(kLongTokens)); }));
  }
  ExpectSame(StreamAndStrike(rest, LongQuestion(kLongTokens),
                             [] {
                               stack_->expert().Kill();
                               stack_->attention().Kill();
                               stack_->StartAttention();
                               stack_->StartExpert(0);
                             }),
             greedy_);
  for (auto& other : others) ExpectSame(other.get(), greedy_);
}

TEST_P(RecoveryTest, ExpertStoppedInMidStream) {
  ExpectSame(StreamAndStrike(stack_->rest(), LongQuestion(kLongTokens),
                             [] {
                               stack_->expert().Signal(SIGTERM);
                               EXPECT_EQ(stack_->expert().Wait(), 0) << stack_->expert().Output();
                               stack_->StartExpert(0);
                             }),
             greedy_);
}

TEST_P(RecoveryTest, WorkOfAClientThatLeftIsCancelled) {
  const RestClient rest = stack_->rest(), attention = stack_->attention_metrics();
  EXPECT_TRUE(WaitUntil([&] { return attention.Metric("tandem_requests_running") == 0; }));
  const double before = attention.Metric("tandem_generated_tokens_total");
  const double cancelled = rest.Metric("tandem_requests_total", "outcome=\"cancelled\"");
  // Three that would run for very long between them.
  constexpr int kTokens = 3900;
  std::vector<std::future<Answer>> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(std::async(std::launch::async, [rest] {
      return rest.Stream(LongQuestion(kTokens), [](int events) { return events < kEventsBefore; });
    }));
  }
  for (auto& client : clients) EXPECT_FALSE(client.get().ok());
  EXPECT_TRUE(WaitUntil([&] {
    return attention.Metric("tandem_requests_running") == 0 &&
           attention.Metric("tandem_requests_waiting") == 0;
  }));
  EXPECT_TRUE(WaitUntil([&] { return rest.Metric("tandem_requests_running") == 0; }));
  EXPECT_LT(attention.Metric("tandem_generated_tokens_total") - before, 3 * kTokens)
      << "they ran to their ends";
  EXPECT_EQ(attention.Metric("tandem_kv_cache_used_ratio"), 0);
  EXPECT_EQ(rest.Metric("tandem_requests_total", "outcome=\"cancelled\""), cancelled + 3);
}

// Waits until /ready answers `status`: what it says is wrong, if anything.
std::string WaitForReady(const RestClient& rest, int status) {
  Reply reply;
  EXPECT_TRUE(WaitUntil([&] { return (reply = rest.Get("/ready")).status == status; })) << reply.body;
  return reply.status == 200 ? "" : reply.body["error"]["message"].get<std::string>();
}

// Nothing is asked of the server meanwhile: no call to the experts runs into the loss.
TEST(ReadinessTest, FollowsTheExpertsWithoutAnyRequest) {
  Stack stack;
  ASSERT_TRUE(stack.WaitReady());
  const RestClient rest = stack.rest();
  const auto engine = rpc::Connect(stack.attention_address());
  ASSERT_TRUE(engine.ok()) << engine.status();

  stack.expert().Signal(SIGSTOP);
  EXPECT_THAT(WaitForReady(rest, 503), HasSubstr("expert process " + stack.expert_address()));
  EXPECT_FALSE(rpc::WaitServing(**engine, stack.attention_address(), absl::ZeroDuration()).ok());
  stack.expert().Signal(SIGCONT);
  WaitForReady(rest, 200);
  EXPECT_TRUE(rpc::WaitServing(**engine, stack.attention_address(), absl::Seconds(60)).ok());

  stack.expert().Kill();
  EXPECT_THAT(WaitForReady(rest, 503), HasSubstr("expert process " + stack.expert_address()));
  EXPECT_EQ(rest.Get("/health").status, 200);
  // Who comes all the same waits, as ever.
  auto waiting = std::async(std::launch::async, [rest] { return rest.Ask(Question("What is 12 + 34?")); });
  EXPECT_TRUE(WaitUntil(
      [&] { return rest.Metric("tandem_requests_running") + rest.Metric("tandem_requests_waiting") == 1; }));
  stack.StartExpert(0);
  EXPECT_EQ(waiting.get().content, "12 + 34 = 46.");
  WaitForReady(rest, 200);
}

// Nobody asks anything: that the process which is back holds other weights must show all the same.
TEST(ReadinessTest, AnIdleEngineRefusesExpertsWithOtherWeights) {
  const TempFolder folder;
  const std::string model = folder / "model.gguf";
  std::filesystem::copy_file(DemoModel(), model);
  // Turns the sampled bytes of some expert tensor to other ones, and back.
  const auto change = [&] {
    const auto file = gguf::File::Open(model);
    ASSERT_TRUE(file.ok()) << file.status();
    for (const gguf::Tensor& t : (*file)->tensors()) {
      if (!model::IsRoutedExpertTensor(t.name)) continue;
      const auto at = static_cast<std::streamoff>(t.file_offset + t.nbytes / 8 * 3);
      const char other = static_cast<char>(t.data[t.nbytes / 8 * 3] ^ 1);
      std::fstream(model, std::ios::in | std::ios::out | std::ios::binary).seekp(at).put(other);
      return;
    }
    FAIL() << "no routed experts";
  };
  StackOptions options;
  options.expert_model = model;
  Stack stack(options);
  ASSERT_TRUE(stack.WaitReady());
  const RestClient rest = stack.rest();

  stack.expert().Kill();
  WaitForReady(rest, 503);
  change();
  stack.StartExpert(0);
  EXPECT_TRUE(stack.attention().WaitForOutput("holds another model .*; no step is computed").has_value());
  EXPECT_TRUE(WaitUntil([&] {
    const Reply reply = rest.Get("/ready");
    return reply.status == 503 &&
           reply.body["error"]["message"].get<std::string>().find("holds another model") != std::string::npos;
  })) << stack.Logs();
  EXPECT_THAT(stack.attention().Output(), Not(HasSubstr("the experts are back")));

  stack.expert().Kill();
  change();
  stack.StartExpert(0);
  WaitForReady(rest, 200);
  EXPECT_TRUE(stack.attention().WaitForOutput("the experts are back").has_value());
  EXPECT_EQ(rest.Ask(Question("What is 12 + 34?")).content, "12 + 34 = 46.");
}

TEST(LossTest, ExpertThatDoesNotComeBack) {
  StackOptions options;
  options.attention = {"--expert-patience", "1"};
  options.gateway = {"--resume-timeout", "1"};
  Stack stack(options);
  ASSERT_TRUE(stack.WaitReady());
  const RestClient rest = stack.rest();
  const Answer cut = StreamAndStrike(rest, LongQuestion(kLongTokens), [&] { stack.expert().Kill(); });
  EXPECT_FALSE(cut.ok());
  ASSERT_TRUE(cut.error.is_object()) << cut.ToString();
  EXPECT_THAT(cut.error["message"].get<std::string>(), HasSubstr("expert process " + stack.expert_address()));
  EXPECT_FALSE(cut.content.empty() && cut.reasoning.empty());
  // A new request ends with an error as well, in the same bounded time.
  const Answer refused = rest.Ask(Question("What is 1 + 1?"));
  EXPECT_EQ(refused.status, 503) << refused.ToString();
  WaitForReady(rest, 503);
  stack.StartExpert(0);
  // Ready again though no request has met the new process yet.
  WaitForReady(rest, 200);
  EXPECT_TRUE(WaitUntil([&] { return rest.Ask(Question("What is 12 + 34?")).content == "12 + 34 = 46."; }))
      << stack.Logs();
}

TEST(StopTest, GatewayFinishesItsStreams) {
  Stack stack;
  ASSERT_TRUE(stack.WaitReady());
  const Answer undisturbed = stack.rest().Stream(LongQuestion(kLongTokens));
  ExpectSame(
      StreamAndStrike(stack.rest(), LongQuestion(kLongTokens), [&] { stack.gateway().Signal(SIGTERM); }),
      undisturbed);
  EXPECT_EQ(stack.gateway().Wait(), 0) << stack.gateway().Output();
}

TEST(StopTest, AttentionFinishesItsSequences) {
  Stack stack;
  ASSERT_TRUE(stack.WaitReady());
  const RestClient rest = stack.rest();
  const Answer undisturbed = rest.Stream(LongQuestion(kLongTokens));
  ExpectSame(StreamAndStrike(rest, LongQuestion(kLongTokens), [&] { stack.attention().Signal(SIGTERM); }),
             undisturbed);
  EXPECT_EQ(stack.attention().Wait(), 0) << stack.attention().Output();
  EXPECT_EQ(rest.Metric("tandem_stream_resumes_total"), 0) << "it ran to its end where it was";
  EXPECT_TRUE(WaitUntil([&] { return rest.Get("/ready").status == 503; }));
  EXPECT_EQ(rest.Get("/health").status, 200);
  // The expert is idle now, and the gateway without an engine: both stop at once.
  stack.expert().Signal(SIGTERM);
  EXPECT_EQ(stack.expert().Wait(), 0) << stack.expert().Output();
  stack.gateway().Signal(SIGTERM);
  EXPECT_EQ(stack.gateway().Wait(), 0) << stack.gateway().Output();
}

// As a service manager stops a group: all at the same moment, the experts first.
TEST(StopTest, AllAtOnceFinishTheirStreams) {
  Stack stack;
  ASSERT_TRUE(stack.WaitReady());
  const RestClient rest = stack.rest();
  const Answer undisturbed = rest.Stream(LongQuestion(kLongTokens));
  Process* const all[] = {&stack.expert(), &stack.attention(), &stack.gateway()};
  const auto stop = [&] {
    for (Process* process : all) process->Signal(SIGTERM);
  };
  ExpectSame(StreamAndStrike(rest, LongQuestion(kLongTokens), stop), undisturbed);
  for (Process* process : all) EXPECT_EQ(process->Wait(), 0) << process->Output();
  EXPECT_THAT(stack.expert().Output(), HasSubstr("stopping when the engine is done"));
}

TEST(StopTest, WhileStarting) {
  // Attention waits for an expert that is not there, the gateway for attention.
  StackOptions options;
  options.experts = {};
  options.attention = {"--expert", "unix:/tmp/tandem_nobody_is_here"};
  Stack stack(options);
  EXPECT_TRUE(stack.attention().WaitForOutput("waiting for 1 expert").has_value());
  EXPECT_TRUE(stack.gateway().WaitForOutput("HTTP on").has_value());
  const Reply ready = stack.rest().Get("/ready");
  EXPECT_EQ(ready.status, 503);
  stack.attention().Signal(SIGTERM);
  EXPECT_EQ(stack.attention().Wait(), 0) << stack.attention().Output();
  stack.gateway().Signal(SIGINT);
  EXPECT_EQ(stack.gateway().Wait(), 0) << stack.gateway().Output();
}

}  // namespace
}  // namespace tandem::integration
