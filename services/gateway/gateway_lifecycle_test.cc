// What happens when an engine, a client or the gateway goes away; admission; metrics; gRPC.
#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>

#include "common/rpc/channel.h"
#include "services/gateway/testing/gateway_fixture.h"
#include "tandem/v1/generation.grpc.pb.h"

namespace tandem::gateway {
namespace {

using testing::FakeEngine;
using ::testing::HasSubstr;
using testing::HttpReply;
using testing::Json;
using testing::RawClient;
using testing::Streamed;

std::string LongText() {
  std::string text = "some thoughts</think>";
  for (int i = 0; i < 60; ++i) text += "word " + std::to_string(i) + ", ";
  return text + "end.";
}

class LifecycleTest : public testing::GatewayFixture {
 protected:
  std::string Metric(const std::string& line_start) {
    const std::string all = Call("GET", "/metrics").body;
    const size_t at = all.find("\n" + line_start);
    if (at == std::string::npos) return {};
    const size_t value = at + 1 + line_start.size();
    return all.substr(value, all.find('\n', value) - value);
  }
  bool WaitMetric(const std::string& line_start, const std::string& value) {
    for (int i = 0; i < 1000; ++i) {
      if (Metric(line_start) == value) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    ADD_FAILURE() << line_start << " is " << Metric(line_start) << ", not " << value;
    return false;
  }
  // The gateway with two engines of the same script; both are known. `second` must outlive gateway_.
  void StartWith(FakeEngine& second, const FakeEngine::Script& script) {
    second.Start();
    options_.engines.push_back(second.address());
    Start();
    engine_->SetScript(script);
    second.SetScript(script);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
};

TEST_F(LifecycleTest, RefusesWithRetryAfterUntilTheEngineServes) {
  engine_->SetServing(false);
  Start(/*wait_ready=*/false);
  for (int i = 0; i < 500 && Call("GET", "/ready").body.find("42 %") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const HttpReply refused = Chat();
  ExpectError(refused, 503, "server_error", "", "service_unavailable", "loading the model: 42 %");
  EXPECT_EQ(refused.headers.count("retry-after"), 1u);
  EXPECT_EQ(Call("GET", "/health").status, 200);
  EXPECT_EQ(Call("GET", "/ready").status, 503);
  EXPECT_EQ(Call("GET", "/v1/models").status, 503);
  EXPECT_EQ(Call("POST", "/tokenize", R"({"content":"a"})").status, 503);
  EXPECT_EQ(Call("GET", "/").status, 200);
  engine_->SetServing(true);
  ASSERT_TRUE(WaitReady());
  EXPECT_EQ(Chat().status, 200);
}

TEST_F(LifecycleTest, ReadinessFollowsTheEngine) {
  options_.resume_timeout = absl::ZeroDuration();
  Start();
  engine_->Stop();
  EXPECT_TRUE(WaitReady(false));
  EXPECT_EQ(Chat().status, 503);
  engine_->Start();
  EXPECT_TRUE(WaitReady(true));
  EXPECT_EQ(Chat().status, 200);
}

TEST_F(LifecycleTest, NewRequestsWaitForALostEngineAsStreamsDo) {
  Start();
  EXPECT_EQ(Chat().status, 200);
  engine_->Stop();
  ASSERT_TRUE(WaitReady(false));
  std::future<HttpReply> waiting = std::async(std::launch::async, [this] { return Chat(); });
  EXPECT_TRUE(WaitMetric("tandem_requests_waiting{service=\"gateway\"} ", "1"));
  engine_->Start();
  EXPECT_EQ(waiting.get().status, 200);
}

TEST_F(LifecycleTest, NewRequestsDoNotWaitForEver) {
  options_.resume_timeout = absl::Milliseconds(300);
  Start();
  engine_->Stop();
  ASSERT_TRUE(WaitReady(false));
  const HttpReply late = Chat();  // the patience ends before it is let in, or after
  ExpectError(late, 503, "server_error", "", "service_unavailable", "");
  EXPECT_EQ(late.headers.count("retry-after"), 1u);
  std::this_thread::sleep_for(std::chrono::milliseconds(350));
  EXPECT_EQ(Chat().status, 503);
}

TEST_F(LifecycleTest, ReadinessSaysWhatIsInTheWayOfTheEngine) {
  Start();
  engine_->SetDegraded("expert process unix:/x is gone");
  EXPECT_TRUE(WaitReady(false));
  ExpectError(Call("GET", "/ready"), 503, "server_error", "", "service_unavailable",
              "expert process unix:/x is gone");
  EXPECT_EQ(Metric("tandem_ready{service=\"gateway\"} "), "0");
  EXPECT_EQ(Chat().status, 200) << "requests are let in all the same";
  EXPECT_EQ(Call("GET", "/health").status, 200);
  engine_->SetDegraded("");
  EXPECT_TRUE(WaitReady(true));
}

TEST_F(LifecycleTest, EngineErrorsBecomeHttpErrors) {
  options_.resume_timeout = absl::Milliseconds(200);
  Start();
  struct Case {
    grpc::StatusCode code;
    int status;
    const char* type;
    const char* api_code;
  };
  const Case cases[] = {
      {grpc::StatusCode::RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded"},
      {grpc::StatusCode::INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value"},
      {grpc::StatusCode::OUT_OF_RANGE, 400, "invalid_request_error", "context_length_exceeded"},
      {grpc::StatusCode::INTERNAL, 500, "server_error", "internal_error"},
      {grpc::StatusCode::UNAVAILABLE, 503, "server_error", "service_unavailable"}};
  for (const Case& c : cases) {
    FakeEngine::Script script;
    script.fail_after = 0;
    script.failure = grpc::Status(c.code, "because");
    engine_->SetScript(script);
    ASSERT_TRUE(WaitReady());
    for (const char* mode : {"false", "true"}) {
      ASSERT_TRUE(WaitReady());
      const HttpReply reply = Chat(R"("stream":)" + std::string(mode));
      ExpectError(reply, c.status, c.type, "", c.api_code, "because");
      EXPECT_EQ(reply.headers.count("retry-after"), c.status == 429 || c.status == 503 ? 1u : 0u);
    }
  }
  FakeEngine::Script script;
  script.finish = false;
  engine_->SetScript(script);
  ASSERT_TRUE(WaitReady());
  EXPECT_EQ(Chat().status, 500);
}

TEST_F(LifecycleTest, AnErrorInTheMiddleOfAStreamIsAnEvent) {
  Start();
  FakeEngine::Script script;
  script.fail_after = 8;
  script.failure = grpc::Status(grpc::StatusCode::INTERNAL, "it broke");
  engine_->SetScript(script);
  const HttpReply reply = Chat(R"("stream":true)");
  EXPECT_EQ(reply.status, 200);
  const Streamed stream = ParseStream(reply);
  EXPECT_EQ(stream.error["message"], "it broke");
  EXPECT_EQ(stream.error["type"], "server_error");
  EXPECT_EQ(stream.finish, "");
  EXPECT_TRUE(reply.complete);
}

TEST_F(LifecycleTest, AStreamSurvivesItsEngine) {
  Start();
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::milliseconds(2);
  engine_->SetScript(script);
  Streamed whole = ParseStream(Chat(R"("stream":true,"seed":5,"max_tokens":1000)"));
  EXPECT_EQ(whole.reasoning, "some thoughts");

  RawClient client(gateway_->http_port());
  client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true,"seed":5,"max_tokens":1000)")));
  const std::string begin = client.ReadUntil("word");
  engine_->Stop();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  engine_->Start();
  HttpReply rest;
  rest.body = begin + client.ReadUntil("[DONE]\n\n");
  // Undo the chunked framing by taking the events alone.
  std::string events;
  for (size_t at = 0; (at = rest.body.find("data: ", at)) != std::string::npos;) {
    const size_t end = rest.body.find("\n\n", at) + 2;
    events += rest.body.substr(at, end - at);
    at = end;
  }
  rest.body = events;
  const Streamed resumed = ParseStream(rest);
  EXPECT_EQ(resumed.content, whole.content);
  EXPECT_EQ(resumed.reasoning, whole.reasoning);
  EXPECT_EQ(resumed.finish, "stop");
  EXPECT_TRUE(resumed.done);

  const auto requests = engine_->requests();
  const v1::GenerateRequest& first = requests[1];
  const v1::GenerateRequest& again = requests.back();
  EXPECT_GT(again.resumed_tokens(), 0u);
  EXPECT_EQ(again.prompt_tokens_size(),
            first.prompt_tokens_size() + static_cast<int>(again.resumed_tokens()));
  EXPECT_EQ(again.max_new_tokens(), first.max_new_tokens() - again.resumed_tokens());
  EXPECT_EQ(again.sampling().seed(), 5u);
  EXPECT_EQ(Metric("tandem_stream_resumes_total{service=\"gateway\"} "), "1");
}

TEST_F(LifecycleTest, PatienceWithALostEngineEnds) {
  options_.resume_timeout = absl::Milliseconds(300);
  Start();
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::milliseconds(2);
  engine_->SetScript(script);
  RawClient client(gateway_->http_port());
  client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
  client.ReadUntil("word");
  engine_->Stop();
  const std::string rest = client.ReadUntil("[DONE]\n\n");
  EXPECT_THAT(rest, HasSubstr("\"error\""));
  EXPECT_THAT(rest, HasSubstr("did not come back"));
  EXPECT_THAT(rest, HasSubstr("service_unavailable"));
}

TEST_F(LifecycleTest, AClientThatLeavesCancelsTheEngine) {
  Start();
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::milliseconds(10);
  engine_->SetScript(script);
  {
    RawClient client(gateway_->http_port());
    client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
    client.ReadUntil("word");
  }
  EXPECT_TRUE(engine_->WaitCancelled(1));
  // Before the first token, streamed or not.
  script.hang = true;
  engine_->SetScript(script);
  int expected = 1;
  for (const char* mode : {"true", "false"}) {
    RawClient client(gateway_->http_port());
    client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("n":2,"stream":)" + std::string(mode))));
    for (int i = 0; i < 2000 && engine_->running() < 2; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    client.Close();
    expected += 2;
    EXPECT_TRUE(engine_->WaitCancelled(expected));
  }
  EXPECT_TRUE(WaitMetric("tandem_requests_total{service=\"gateway\",outcome=\"cancelled\"} ", "3"));
  EXPECT_TRUE(WaitMetric("tandem_requests_waiting{service=\"gateway\"} ", "0"));
  EXPECT_TRUE(WaitMetric("tandem_requests_running{service=\"gateway\"} ", "0"));
}

TEST_F(LifecycleTest, TheBoundOfAdmission) {
  options_.max_requests = 2;
  Start();
  FakeEngine::Script script;
  script.hang = true;
  engine_->SetScript(script);
  RawClient a(gateway_->http_port()), b(gateway_->http_port());
  a.Send(Wire("POST", "/v1/chat/completions", ChatBody("")));
  b.Send(Wire("POST", "/v1/chat/completions", ChatBody("")));
  for (int i = 0; i < 2000 && engine_->running() < 2; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const HttpReply refused = Chat();
  ExpectError(refused, 429, "rate_limit_error", "", "rate_limit_exceeded", "2 of 2");
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
  a.Close();
  EXPECT_TRUE(engine_->WaitCancelled(1));
  engine_->SetScript(FakeEngine::Script());
  for (int i = 0; i < 500; ++i) {
    if (Chat().status == 200) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  FAIL() << "the freed place was never given out";
}

TEST_F(LifecycleTest, RequestTimeout) {
  options_.request_timeout = absl::Milliseconds(200);
  Start();
  FakeEngine::Script script;
  script.hang = true;
  engine_->SetScript(script);
  ExpectError(Chat(), 504, "server_error", "", "timeout", "deadline");
  EXPECT_TRUE(engine_->WaitCancelled(1));
}

TEST_F(LifecycleTest, DrainLetsStreamsEndAndRefusesNewOnes) {
  Start();
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::milliseconds(3);
  engine_->SetScript(script);
  RawClient client(gateway_->http_port());
  client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
  client.ReadUntil("word");
  std::thread drain([this] { EXPECT_TRUE(gateway_->Drain(absl::Seconds(20))); });
  EXPECT_TRUE(WaitReady(false));
  const HttpReply refused = Chat();
  EXPECT_EQ(refused.status, 503);
  EXPECT_THAT(refused.body, HasSubstr("shutting down"));
  EXPECT_EQ(refused.headers.count("retry-after"), 1u);
  EXPECT_EQ(Call("GET", "/ready").status, 503);
  EXPECT_THAT(client.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"stop\""));
  drain.join();
  EXPECT_FALSE(RawClient(gateway_->http_port()).connected());
}

TEST_F(LifecycleTest, DrainCutsOffWhatDoesNotEnd) {
  Start();
  FakeEngine::Script script;
  script.hang = true;
  engine_->SetScript(script);
  RawClient client(gateway_->http_port());
  client.Send(Wire("POST", "/v1/chat/completions", ChatBody("")));
  for (int i = 0; i < 2000 && engine_->running() < 1; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  EXPECT_FALSE(gateway_->Drain(absl::Milliseconds(50)));
  const HttpReply reply = client.ReadReply();
  EXPECT_EQ(reply.status, 503);
  EXPECT_THAT(reply.body, HasSubstr("shutting down"));
}

TEST_F(LifecycleTest, ManyStreamsAtOnce) {
  Start();
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::microseconds(500);
  engine_->SetScript(script);
  const std::string expected = ParseStream(Chat(R"("stream":true)")).content;
  std::vector<std::thread> clients;
  std::atomic<int> right{0};
  for (int i = 0; i < 24; ++i) {
    clients.emplace_back([&, i] {
      for (int round = 0; round < 2; ++round) {
        const HttpReply reply = Chat(i % 2 == 0 ? R"("stream":true)" : "");
        const Json content =
            i % 2 == 0 ? Json(ParseStream(reply).content) : Parse(reply)["choices"][0]["message"]["content"];
        if (content == expected) right.fetch_add(1);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(right.load(), 48);
}

TEST_F(LifecycleTest, SeveralEnginesShareTheWorkAndReplaceEachOther) {
  FakeEngine::Script script;
  script.text = LongText();
  script.delay = std::chrono::milliseconds(3);
  FakeEngine second;
  StartWith(second, script);
  RawClient a(gateway_->http_port()), b(gateway_->http_port());
  a.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
  a.ReadUntil("word");
  b.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
  b.ReadUntil("word");
  EXPECT_EQ(engine_->requests().size(), 1u);
  EXPECT_EQ(second.requests().size(), 1u);
  engine_->Stop();
  EXPECT_THAT(a.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"stop\""));
  EXPECT_THAT(b.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"stop\""));
  EXPECT_EQ(second.requests().size(), 2u);
  gateway_.reset();
}

TEST_F(LifecycleTest, AFullEngineLeavesTheSequenceToTheNext) {
  FakeEngine::Script full;
  full.fail_after = 0;
  full.failure = grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");
  FakeEngine second;
  StartWith(second, full);
  ExpectError(Chat(), 429, "rate_limit_error", "", "rate_limit_exceeded", "the queue is full");
  EXPECT_EQ(engine_->requests().size(), 1u);
  EXPECT_EQ(second.requests().size(), 1u);
  second.SetScript(FakeEngine::Script());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Chat().status, 200);
  gateway_.reset();
}

FakeEngine::Script OutOfPatience(int after_tokens) {
  FakeEngine::Script script;
  script.text = LongText();
  script.fail_after = after_tokens;
  script.failure = grpc::Status(grpc::StatusCode::ABORTED, "expert x is lost; not back within 10s");
  return script;
}

TEST_F(LifecycleTest, AnEngineOutOfPatienceIsNotAskedAgain) {
  Start();
  engine_->SetScript(OutOfPatience(0));
  const HttpReply reply = Chat();
  ExpectError(reply, 503, "server_error", "", "service_unavailable", "expert x is lost; not back within 10s");
  EXPECT_EQ(reply.headers.count("retry-after"), 1u);
  EXPECT_EQ(engine_->requests().size(), 1u);
  engine_->SetScript(OutOfPatience(3));
  EXPECT_THAT(Chat(R"("stream":true)").body, HasSubstr("not back within 10s"));
  EXPECT_EQ(engine_->requests().size(), 2u);
  EXPECT_TRUE(gateway_->ready()) << "it is there";
}

TEST_F(LifecycleTest, AnEngineOutOfPatienceLeavesTheSequenceToOneThatComputes) {
  FakeEngine::Script script;
  script.text = LongText();
  FakeEngine second;
  StartWith(second, script);
  const std::string expected = ParseStream(Chat(R"("stream":true)")).content;
  for (const int tokens : {0, 5}) {
    // Whichever is asked first.
    const size_t before = second.requests().size();
    engine_->SetScript(OutOfPatience(tokens));
    const Streamed moved = ParseStream(Chat(R"("stream":true)"));
    EXPECT_EQ(moved.content, expected);
    EXPECT_EQ(moved.finish, "stop");
    ASSERT_EQ(second.requests().size(), before + 1);
    EXPECT_EQ(second.requests().back().resumed_tokens(), static_cast<uint32_t>(tokens));
  }
  EXPECT_EQ(Metric("tandem_stream_resumes_total{service=\"gateway\"} "), "2");

  // Nobody waits in turn at engines that would only wait, too.
  second.SetScript(OutOfPatience(0));
  const size_t first_before = engine_->requests().size(), second_before = second.requests().size();
  EXPECT_EQ(Chat().status, 503);
  EXPECT_EQ(engine_->requests().size() + second.requests().size(), first_before + second_before + 2);
  gateway_.reset();
}

TEST_F(LifecycleTest, StreamsOfADegradedEngineGoOnWithAnother) {
  FakeEngine second;
  second.SetServing(false);  // not yet: both streams begin at the first one
  second.Start();
  options_.engines.push_back(second.address());
  Start();
  FakeEngine::Script script;
  script.hang = true;
  engine_->SetScript(script);
  RawClient silent(gateway_->http_port());
  silent.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)")));
  while (engine_->running() < 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  script.hang = false;
  script.text = LongText().substr(0, 100);
  script.stay = true;
  engine_->SetScript(script);
  RawClient begun(gateway_->http_port());
  begun.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true,"ignore_eos":true)")));
  begun.ReadUntil("word");

  script.text = LongText();
  second.SetScript(script);
  engine_->SetDegraded("expert process unix:/x is gone");
  second.SetServing(true);
  EXPECT_THAT(silent.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"stop\""));
  for (int i = 0; i < 5000 && second.requests().size() < 2; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  ASSERT_EQ(second.requests().size(), 2u);
  EXPECT_GT(second.requests()[0].resumed_tokens() + second.requests()[1].resumed_tokens(), 0u);
  EXPECT_TRUE(engine_->WaitCancelled(2)) << "nothing goes on there";
  EXPECT_EQ(engine_->requests().size(), 2u);
  begun.Close();
  gateway_.reset();
}

TEST_F(LifecycleTest, AnEngineOutOfPatienceDoesNotPassOnToADegradedOne) {
  FakeEngine second;
  second.Start();
  second.SetDegraded("its experts are lost as well");
  options_.engines.push_back(second.address());
  Start();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // both are known
  engine_->SetScript(OutOfPatience(0));
  EXPECT_EQ(Chat().status, 503);
  EXPECT_EQ(engine_->requests().size(), 1u);
  EXPECT_EQ(second.requests().size(), 0u);
  gateway_.reset();
}

TEST_F(LifecycleTest, AClientThatDoesNotReadIsCancelled) {
  options_.max_output_bytes = 64 << 10;
  engine_->SetContext(200'000);
  Start();
  FakeEngine::Script script;
  for (int i = 0; i < 60'000; ++i) script.text += "word ";  // some 15 MB of events
  script.stay = true;  // all of it may fit the buffers between a fast engine and a slow gateway
  engine_->SetScript(script);
  RawClient client(gateway_->http_port());
  client.Send(Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true,"ignore_eos":true)")));
  EXPECT_TRUE(engine_->WaitCancelled(1));
  EXPECT_TRUE(WaitMetric("tandem_requests_total{service=\"gateway\",outcome=\"cancelled\"} ", "1"));
  EXPECT_TRUE(WaitMetric("tandem_requests_running{service=\"gateway\"} ", "0"));
  EXPECT_EQ(Call("GET", "/health").status, 200);
}

TEST_F(LifecycleTest, MetricsCountAndPassPromtool) {
  Start();
  Chat();
  Chat(R"("stream":true)");
  Chat(R"("n":0)");
  EXPECT_TRUE(WaitMetric("tandem_requests_total{service=\"gateway\",outcome=\"ok\"} ", "2"));
  EXPECT_EQ(Metric("tandem_requests_total{service=\"gateway\",outcome=\"invalid\"} "), "1");
  EXPECT_EQ(Metric("tandem_time_to_first_token_seconds_count{service=\"gateway\"} "), "2");
  EXPECT_EQ(Metric("tandem_prefill_tokens_per_second_count{service=\"gateway\"} "), "2");
  EXPECT_EQ(Metric("tandem_decode_tokens_per_second_count{service=\"gateway\"} "), "2");
  EXPECT_EQ(Metric("tandem_ready{service=\"gateway\"} "), "1");
  const size_t prompt = static_cast<size_t>(engine_->requests()[0].prompt_tokens_size());
  EXPECT_EQ(Metric("tandem_prompt_tokens_total{service=\"gateway\"} "), std::to_string(2 * prompt));

  if (std::system("command -v promtool >/dev/null 2>&1") != 0) GTEST_SKIP() << "promtool is not installed";
  const std::string file = ::testing::TempDir() + "gateway_metrics_" + std::to_string(getpid()) + ".txt";
  std::ofstream(file) << Call("GET", "/metrics").body;
  EXPECT_EQ(std::system(("promtool check metrics < " + file + " >&2").c_str()), 0);
  std::remove(file.c_str());
}

class GrpcTest : public LifecycleTest {
 protected:
  void Connect() {
    auto channel = rpc::Connect(gateway_->grpc_addresses().at(0));
    ASSERT_TRUE(channel.ok());
    stub_ = v1::Generation::NewStub(*channel);
  }
  struct Reply {
    std::string reasoning, content, finish;
    v1::Usage usage;
    grpc::Status status;
  };
  Reply Generate(const v1::GenerationRequest& request, const std::string& key = "") {
    grpc::ClientContext context;
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    Reply reply;
    auto reader = stub_->Generate(&context, request);
    for (v1::GenerationResponse response; reader->Read(&response);) {
      reply.reasoning += response.reasoning();
      reply.content += response.content();
      if (!response.finish_reason().empty()) reply.finish = response.finish_reason();
      if (response.has_usage()) reply.usage = response.usage();
    }
    reply.status = reader->Finish();
    return reply;
  }
  static v1::GenerationRequest Hi() {
    v1::GenerationRequest request;
    v1::ChatMessage& message = *request.mutable_chat()->add_messages();
    message.set_role("user");
    message.set_content("hi");
    return request;
  }
  std::unique_ptr<v1::Generation::Stub> stub_;
};

TEST_F(GrpcTest, GeneratesLikeRest) {
  Start();
  Connect();
  const Reply chat = Generate(Hi());
  ASSERT_TRUE(chat.status.ok()) << chat.status.error_message();
  EXPECT_EQ(chat.reasoning, "hm");
  EXPECT_EQ(chat.content, "Hello there.");
  EXPECT_EQ(chat.finish, "stop");
  EXPECT_EQ(chat.usage.prompt_tokens(), static_cast<uint32_t>(engine_->requests()[0].prompt_tokens_size()));
  EXPECT_EQ(chat.usage.cached_prompt_tokens(), 3u);
  v1::GenerationRequest text;
  text.set_text("Say:");
  text.set_max_tokens(4);
  text.add_stop("nothing");
  const Reply completion = Generate(text);
  EXPECT_EQ(completion.finish, "length");
  EXPECT_EQ(completion.usage.completion_tokens(), 4u);

  grpc::ClientContext c1, c2, c3;
  v1::TokenizeRequest tokenize;
  tokenize.set_content("Hello");
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&c1, tokenize, &tokens).ok());
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_tokens() = tokens.tokens();
  v1::DetokenizeResponse content;
  ASSERT_TRUE(stub_->Detokenize(&c2, detokenize, &content).ok());
  EXPECT_EQ(content.content(), "Hello");
  v1::ListModelsResponse models;
  ASSERT_TRUE(stub_->ListModels(&c3, v1::ListModelsRequest(), &models).ok());
  EXPECT_EQ(models.ids(0), "tinyr1");
}

TEST_F(GrpcTest, RefusesBadRequests) {
  options_.api_key = "sesame";
  Start();
  Connect();
  EXPECT_EQ(Generate(Hi()).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Generate(Hi(), "wrong").status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Generate(Hi(), "sesame").status.ok());
  const auto expect = [this](const v1::GenerationRequest& request, grpc::StatusCode code,
                             const char* message) {
    const Reply reply = Generate(request, "sesame");
    EXPECT_EQ(reply.status.error_code(), code);
    EXPECT_THAT(reply.status.error_message(), HasSubstr(message));
  };
  v1::GenerationRequest request = Hi();
  request.set_temperature(-1);
  expect(request, grpc::StatusCode::INVALID_ARGUMENT, "'temperature' must be from 0 to 2");
  request = Hi();
  request.set_top_p(std::numeric_limits<float>::quiet_NaN());
  expect(request, grpc::StatusCode::INVALID_ARGUMENT, "'top_p'");
  request = Hi();
  request.set_model("gpt-4");
  expect(request, grpc::StatusCode::NOT_FOUND, "served is 'tinyr1'");
  request = Hi();
  request.mutable_chat()->mutable_messages(0)->set_role("robot");
  expect(request, grpc::StatusCode::INVALID_ARGUMENT, "robot");
  expect(v1::GenerationRequest(), grpc::StatusCode::INVALID_ARGUMENT, "'chat' or 'text'");
  request = Hi();
  request.set_max_tokens(0);
  expect(request, grpc::StatusCode::INVALID_ARGUMENT, "'max_tokens'");
  std::string lots;
  for (int i = 0; i < 5000; ++i) lots += "many words ";
  request.Clear();
  request.set_text(lots);
  expect(request, grpc::StatusCode::OUT_OF_RANGE, "context is 4096 tokens");
}

TEST_F(GrpcTest, CancellingEndsTheEnginesWork) {
  Start();
  Connect();
  FakeEngine::Script script;
  script.hang = true;
  engine_->SetScript(script);
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Hi());
  for (int i = 0; i < 2000 && engine_->running() < 1; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  context.TryCancel();
  EXPECT_TRUE(engine_->WaitCancelled(1));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GrpcTest, AClientThatDoesNotReadIsCancelled) {
  options_.max_output_bytes = 4096;
  engine_->SetContext(200'000);
  Start();
  Connect();
  FakeEngine::Script script;
  for (int i = 0; i < 60'000; ++i) script.text += "word ";
  script.stay = true;  // as above
  engine_->SetScript(script);
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Hi());
  EXPECT_TRUE(engine_->WaitCancelled(1));
  v1::GenerationResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST(GatewayStartTest, ErrorsNameTheAddress) {
  testing::FakeEngine engine;
  engine.Start();
  GatewayOptions options;
  options.engines = {engine.address()};
  options.listen = "127.0.0.1:0";
  options.grpc_listen = "127.0.0.1:0";
  auto first = Gateway::Start(options);
  ASSERT_TRUE(first.ok()) << first.status();
  options.listen = "127.0.0.1:" + std::to_string((*first)->http_port());
  EXPECT_THAT(std::string(Gateway::Start(options).status().message()),
              HasSubstr(options.listen + " is already in use"));
  options.listen = "127.0.0.1:0";
  options.grpc_listen = (*first)->grpc_addresses()[0];
  EXPECT_THAT(std::string(Gateway::Start(options).status().message()), HasSubstr(options.grpc_listen));
  options.engines.clear();
  EXPECT_THAT(std::string(Gateway::Start(options).status().message()), HasSubstr("no engine"));
}

}  // namespace
}  // namespace tandem::gateway
