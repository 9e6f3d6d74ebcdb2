// Clients that leave at every stage, do not read, or are too many: nothing of them stays, and the others
// notice nothing.
#include <gmock/gmock.h>

#include <future>
#include <iostream>

#include "services/gateway/testing/raw_client.h"
#include "tests/chaos/crowd.h"

namespace tandem::integration {
namespace {

using gateway::testing::HttpReply;
using gateway::testing::RawClient;
using ::testing::HasSubstr;

std::string Wire(const Json& body) {
  const std::string text = body.dump();
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: "
         "application/json\r\nContent-Length: " +
         std::to_string(text.size()) + "\r\n\r\n" + text;
}

Json Streamed(int tokens) {
  Json request = LongQuestion(tokens);
  request["stream"] = true;
  return request;
}

// A prompt of a few thousand tokens that no other has: its prefill takes a while.
Json LongPrompt(int number) {
  std::string text = "Number " + std::to_string(number) + ": ";
  for (int i = 0; i < 500; ++i) text += std::to_string((i * 7919 + number * 104729) % 1000) + " + ";
  Json request = Question(text + "1?");
  request["stream"] = true;
  return request;
}

class ClientsTest : public ::testing::Test {
 protected:
  static constexpr int kAdmitted = 20;

  static void SetUpTestSuite() {
    StackOptions options;
    options.attention = {"--max-batch-size", "4", "--max-waiting", "4"};
    options.gateway = {"--max-requests", std::to_string(kAdmitted), "--max-output-bytes", "65536"};
    stack_ = std::make_unique<Stack>(options);
    ASSERT_TRUE(stack_->WaitReady());
    alone_ = stack_->rest().Stream(LongQuestion(200));
    ASSERT_TRUE(alone_.ok()) << alone_.ToString();
  }
  static void TearDownTestSuite() { stack_.reset(); }
  void TearDown() override {
    EXPECT_TRUE(WaitIdle(*stack_));
    const Answer again = stack_->rest().Stream(LongQuestion(200));
    EXPECT_EQ(again.content, alone_.content) << again.ToString();
    if (HasFailure()) std::cout << stack_->Logs();
  }
  static double Cancelled() {
    return std::max(0.0, stack_->rest().Metric("tandem_requests_total", "outcome=\"cancelled\""));
  }
  static bool WaitCancelled(double count) {
    return WaitUntil([&] { return Cancelled() >= count; });
  }
  static bool WaitRunning(int count) {
    return WaitUntil([&] { return stack_->attention_metrics().Metric("tandem_requests_running") >= count; });
  }

  static std::unique_ptr<Stack> stack_;
  static Answer alone_;
};
std::unique_ptr<Stack> ClientsTest::stack_;
Answer ClientsTest::alone_;

TEST_F(ClientsTest, LeavingBeforeTheRequestIsWhole) {
  const double cancelled = Cancelled();
  const std::string wire = Wire(Streamed(3000));
  const size_t head = wire.find("\r\n\r\n") + 4;
  for (const size_t bytes : {size_t{0}, size_t{20}, head, head + 10, wire.size() - 1}) {
    RawClient client(stack_->rest_port());
    ASSERT_TRUE(client.Send(wire.substr(0, bytes)));
  }
  EXPECT_TRUE(WaitIdle(*stack_));
  EXPECT_EQ(Cancelled(), cancelled) << "none of these was a request";
}

TEST_F(ClientsTest, LeavingAtEveryStageOfTheAnswer) {
  double cancelled = Cancelled();
  {
    SCOPED_TRACE("as soon as the request is sent");
    for (int i = 0; i < 4; ++i) {
      RawClient client(stack_->rest_port());
      ASSERT_TRUE(client.Send(Wire(LongPrompt(i))));
    }
    EXPECT_TRUE(WaitCancelled(cancelled += 4));
    EXPECT_TRUE(WaitIdle(*stack_));
  }
  {
    SCOPED_TRACE("while the prompt is computed");
    RawClient client(stack_->rest_port());
    ASSERT_TRUE(client.Send(Wire(LongPrompt(100))));
    EXPECT_TRUE(WaitRunning(1));
    client.Close();
    EXPECT_TRUE(WaitCancelled(cancelled += 1));
    EXPECT_TRUE(WaitIdle(*stack_));
  }
  for (const char* until : {"\r\n\r\n", "reasoning_content", "\"content\":\"4"}) {
    SCOPED_TRACE(std::string("after ") + until);
    RawClient client(stack_->rest_port());
    ASSERT_TRUE(client.Send(Wire(Streamed(3900))));
    EXPECT_FALSE(client.ReadUntil(until).empty());
    client.Close();
    EXPECT_TRUE(WaitCancelled(cancelled += 1));
    EXPECT_TRUE(WaitIdle(*stack_));
  }
  {
    SCOPED_TRACE("of an answer that is not streamed");
    RawClient client(stack_->rest_port());
    ASSERT_TRUE(client.Send(Wire(LongQuestion(3900))));
    EXPECT_TRUE(WaitRunning(1));
    client.Close();
    EXPECT_TRUE(WaitCancelled(cancelled += 1));
  }
}

TEST_F(ClientsTest, LeavingTheQueue) {
  const double cancelled = Cancelled();
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < 8; ++i) {  // four run, four wait
    clients.push_back(std::make_unique<RawClient>(stack_->rest_port()));
    ASSERT_TRUE(clients.back()->Send(Wire(Streamed(3900))));
    if (i == 3) {
      EXPECT_TRUE(WaitRunning(4));
    }
  }
  const RestClient attention = stack_->attention_metrics();
  EXPECT_TRUE(WaitUntil([&] { return attention.Metric("tandem_requests_waiting") == 4; }));
  for (int i = 4; i < 8; ++i) clients[static_cast<size_t>(i)]->Close();
  EXPECT_TRUE(WaitUntil([&] { return attention.Metric("tandem_requests_waiting") == 0; }));
  EXPECT_EQ(attention.Metric("tandem_requests_running"), 4);
  clients.clear();
  EXPECT_TRUE(WaitCancelled(cancelled + 8));
}

TEST_F(ClientsTest, AClientThatDoesNotReadIsCutOff) {
  const double cancelled = Cancelled();
  // Events of some kilobytes each: more than the sockets of the system take in.
  Json request = Streamed(3900);
  request["logprobs"] = true;
  request["top_logprobs"] = 20;
  RawClient client(stack_->rest_port(), /*receive_buffer=*/4096);
  ASSERT_TRUE(client.Send(Wire(request)));
  const Answer beside = stack_->rest().Stream(LongQuestion(200));
  EXPECT_EQ(beside.content, alone_.content) << beside.ToString();
  EXPECT_TRUE(WaitCancelled(cancelled + 1));
  EXPECT_TRUE(WaitIdle(*stack_));
}

TEST_F(ClientsTest, AClientThatReadsSlowlyGetsAll) {
  const Answer slow = stack_->rest().Stream(LongQuestion(200), [](int events) {
    if (events % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    return true;
  });
  EXPECT_TRUE(slow.done);
  EXPECT_EQ(slow.content, alone_.content) << slow.ToString();
  EXPECT_EQ(slow.reasoning, alone_.reasoning);
}

TEST_F(ClientsTest, AFullQueueSaysWhenToComeAgain) {
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<RawClient>(stack_->rest_port()));
    ASSERT_TRUE(clients.back()->Send(Wire(Streamed(1500))));
  }
  const RestClient attention = stack_->attention_metrics();
  EXPECT_TRUE(WaitUntil([&] {
    return attention.Metric("tandem_requests_running") + attention.Metric("tandem_requests_waiting") == 8;
  }));
  RawClient refused(stack_->rest_port());
  ASSERT_TRUE(refused.Send(Wire(LongQuestion(10))));
  const HttpReply reply = refused.ReadReply();
  EXPECT_EQ(reply.status, 429) << reply.body;
  EXPECT_EQ(reply.headers.count("retry-after"), 1u);
  EXPECT_THAT(reply.body, HasSubstr("rate_limit_exceeded"));
  for (const auto& client : clients) {
    EXPECT_THAT(client->ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"length\""));
  }
}

TEST_F(ClientsTest, TheGatewaysOwnBound) {
  std::vector<std::future<Answer>> crowd;
  const RestClient rest = stack_->rest();
  for (int i = 0; i < kAdmitted + 20; ++i) {
    crowd.push_back(std::async(std::launch::async, [rest] { return rest.Stream(LongQuestion(200)); }));
  }
  int answered = 0, refused = 0;
  for (auto& one : crowd) {
    const Answer answer = one.get();
    if (answer.ok()) {
      ++answered;
      EXPECT_EQ(answer.content, alone_.content);
    } else {
      ++refused;
      EXPECT_EQ(answer.status, 429) << answer.ToString();
    }
  }
  EXPECT_GE(answered, 8) << "as many as the engine has places, at least";
  EXPECT_GT(refused, 0);
}

// A gateway that may open few files keeps some for itself: connections beyond the rest are closed, and it
// answers again once others have gone.
TEST(ConnectionsTest, AreFewerThanTheFilesThatMayBeOpen) {
  const TempFolder folder;
  Process gateway("/bin/sh", {"-c", "ulimit -n 128 && exec \"$0\" \"$@\"", BinaryPath("tandem-gateway"),
                              "--engine", "unix:" + folder / "nobody", "--listen", "127.0.0.1:0",
                              "--grpc-listen", "unix:" + folder / "grpc"});
  const auto port = gateway.WaitForOutput("HTTP on .*:([0-9]+)");
  ASSERT_TRUE(port.has_value()) << gateway.Output();
  EXPECT_THAT(gateway.Output(), HasSubstr("64 connections at a time instead of 16384"));
  const int number = std::atoi(port->c_str());
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < 200; ++i) {
    clients.push_back(std::make_unique<RawClient>(number));
    ASSERT_TRUE(clients.back()->connected()) << i;
    clients.back()->Send("GET /health HTTP/1.1\r\nHost: t\r\n\r\n");
  }
  int answered = 0;
  for (auto& client : clients) answered += client->ReadReply().status == 200 ? 1 : 0;
  EXPECT_EQ(answered, 64);
  clients.clear();
  EXPECT_TRUE(WaitUntil([&] { return RestClient(number).Get("/health").status == 200; }));
  gateway.Signal(SIGTERM);
  EXPECT_EQ(gateway.Wait(), 0) << gateway.Output();
}

}  // namespace
}  // namespace tandem::integration
