// The whole stack with one expert process, seen by its clients.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <future>

#include "common/rpc/channel.h"
#include "tandem/v1/generation.grpc.pb.h"
#include "tests/integration/golden_data.h"
#include "tests/integration/reflection.h"
#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

using ::testing::HasSubstr;

class GenerationTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    stack_ = std::make_unique<Stack>();
    ASSERT_TRUE(stack_->WaitReady());
  }
  static void TearDownTestSuite() { stack_.reset(); }

  static RestClient Rest() { return stack_->rest(); }
  static std::shared_ptr<grpc::Channel> Channel(const std::string& address) {
    auto channel = rpc::Connect(address);
    return channel.ok() ? *channel : nullptr;
  }

  static std::unique_ptr<Stack> stack_;
};
std::unique_ptr<Stack> GenerationTest::stack_;

TEST_F(GenerationTest, AnswersAreRightAndTheSameStreamed) {
  const RestClient rest = Rest();
  for (const EvaluationItem& item : EvaluationItems({"add-000", "sub-030", "recall-194", "reverse-179",
                                                     "sort-136", "followup-226", "json-256", "name-282"})) {
    Json request = {{"messages", item.messages}, {"temperature", 0}};
    const Answer whole = rest.Ask(request);
    ASSERT_TRUE(whole.ok()) << item.id << ": " << whole.ToString();
    EXPECT_TRUE(item.Accepts(whole.content)) << item.id << ": " << whole.ToString();
    EXPECT_EQ(whole.finish, "stop");
    const Answer streamed = rest.Stream(request);
    ASSERT_TRUE(streamed.ok()) << item.id << ": " << streamed.ToString();
    EXPECT_TRUE(streamed.done);
    EXPECT_GT(streamed.events, 3) << "the text is to come in pieces";
    EXPECT_EQ(streamed.content, whole.content);
    EXPECT_EQ(streamed.reasoning, whole.reasoning);
    EXPECT_EQ(streamed.finish, whole.finish);
    // But for what the second one found of the first one's pages.
    Json usage = streamed.usage;
    EXPECT_GE(usage["prompt_tokens_details"]["cached_tokens"].get<int>(),
              (usage["prompt_tokens"].get<int>() - 1) / 32 * 32);
    usage["prompt_tokens_details"] = whole.usage["prompt_tokens_details"];
    EXPECT_EQ(usage, whole.usage);
    EXPECT_EQ(whole.content.find("<think>"), std::string::npos);
    EXPECT_EQ(whole.content.find("</think>"), std::string::npos);
  }
}

TEST_F(GenerationTest, ReasoningIsApartAndCounted) {
  const Answer answer = Rest().Ask(Question("What is 123 + 456?"));
  ASSERT_TRUE(answer.ok()) << answer.ToString();
  EXPECT_EQ(answer.content, "123 + 456 = 579.");
  EXPECT_THAT(answer.reasoning, HasSubstr("3 + 6 = 9"));
  const int completion = answer.usage["completion_tokens"];
  const int reasoning = answer.usage["completion_tokens_details"]["reasoning_tokens"];
  EXPECT_GT(reasoning, 20);
  EXPECT_LT(reasoning, completion);
  EXPECT_EQ(answer.usage["total_tokens"].get<int>(), completion + answer.usage["prompt_tokens"].get<int>());
}

// The rendered prompt, its tokens and the greedy answer are those of transformers.
TEST_F(GenerationTest, GoldenPromptsAndContinuations) {
  const RestClient rest = Rest();
  const std::vector<GoldenPrompt> prompts = GoldenPrompts();
  ASSERT_GE(prompts.size(), 5u);
  for (const GoldenPrompt& golden : prompts) {
    if (!golden.messages.empty()) {
      const Reply rendered = rest.Post("/apply-template", {{"messages", golden.messages}});
      ASSERT_EQ(rendered.status, 200) << rendered.text;
      EXPECT_EQ(rendered.body["prompt"], golden.text) << golden.name;
    }
    const Answer answer =
        rest.Ask({{"prompt", golden.text}, {"temperature", 0}, {"max_tokens", golden.greedy_tokens}});
    ASSERT_TRUE(answer.ok()) << golden.name << ": " << answer.ToString();
    EXPECT_EQ(answer.content, golden.greedy_text) << golden.name;
    EXPECT_EQ(answer.finish, golden.complete ? "stop" : "length") << golden.name;
    EXPECT_EQ(answer.usage["prompt_tokens"], golden.prompt_tokens) << golden.name << ": BOS exactly once";
    EXPECT_EQ(answer.usage["completion_tokens"], golden.greedy_tokens) << golden.name;
  }
}

TEST_F(GenerationTest, SeedsAndTemperature) {
  const RestClient rest = Rest();
  Json request = {{"prompt", "The"}, {"temperature", 1.5}, {"top_p", 1}, {"max_tokens", 40}, {"seed", 7}};
  const Answer first = rest.Ask(request);
  ASSERT_TRUE(first.ok()) << first.ToString();
  EXPECT_EQ(rest.Ask(request).content, first.content);
  EXPECT_EQ(rest.Stream(request).content, first.content);
  request["seed"] = 8;
  EXPECT_NE(rest.Ask(request).content, first.content);
  request["temperature"] = 0;
  const std::string greedy = rest.Ask(request).content;
  request["seed"] = 9;
  EXPECT_EQ(rest.Ask(request).content, greedy);
}

TEST_F(GenerationTest, StopStringsAndLength) {
  const RestClient rest = Rest();
  Json request = Question("What is 12 + 34?");
  const Answer whole = rest.Ask(request);
  ASSERT_EQ(whole.content, "12 + 34 = 46.");
  request["stop"] = "= 46";
  for (const Answer& stopped : {rest.Ask(request), rest.Stream(request)}) {
    EXPECT_EQ(stopped.content, "12 + 34 ") << stopped.ToString();
    EXPECT_EQ(stopped.finish, "stop");
    EXPECT_EQ(stopped.reasoning, whole.reasoning);
  }
  request.erase("stop");
  request["max_tokens"] = 5;
  for (const Answer& cut : {rest.Ask(request), rest.Stream(request)}) {
    EXPECT_EQ(cut.finish, "length") << cut.ToString();
    EXPECT_EQ(cut.usage["completion_tokens"], 5);
    EXPECT_FALSE(cut.reasoning.empty());
    EXPECT_EQ(whole.reasoning.rfind(cut.reasoning, 0), 0u) << cut.reasoning;
  }
}

TEST_F(GenerationTest, Logprobs) {
  const RestClient rest = Rest();
  Json request = Question("What is 12 + 34?");
  request["logprobs"] = true;
  request["top_logprobs"] = 3;
  const Answer answer = rest.Ask(request);
  ASSERT_TRUE(answer.ok()) << answer.ToString();
  ASSERT_GT(answer.logprobs.size(), 10u);
  std::string text;
  for (const Json& token : answer.logprobs) {
    text += token["token"].get<std::string>();
    EXPECT_LE(token["logprob"].get<double>(), 0.0);
    ASSERT_EQ(token["top_logprobs"].size(), 3u);
    // Greedy: the chosen token is the likeliest one.
    EXPECT_EQ(token["top_logprobs"][0]["token"], token["token"]);
    EXPECT_EQ(token["top_logprobs"][0]["logprob"], token["logprob"]);
    EXPECT_GE(token["top_logprobs"][1]["logprob"].get<double>(),
              token["top_logprobs"][2]["logprob"].get<double>());
  }
  EXPECT_THAT(text, HasSubstr(answer.content));
  EXPECT_EQ(rest.Stream(request).logprobs, answer.logprobs);

  const Reply completion = rest.Post(
      "/v1/completions", {{"prompt", "The"}, {"temperature", 0}, {"max_tokens", 4}, {"logprobs", 2}});
  ASSERT_EQ(completion.status, 200) << completion.text;
  const Json& logprobs = completion.body["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"].size(), 4u);
  EXPECT_EQ(logprobs["token_logprobs"].size(), 4u);
  EXPECT_EQ(logprobs["top_logprobs"][0].size(), 2u);
}

TEST_F(GenerationTest, SixteenAtATimeGiveTheTextsOfOneAlone) {
  const RestClient rest = Rest();
  std::vector<Json> requests;
  for (int i = 0; i < 16; ++i) {
    requests.push_back(
        Question("What is " + std::to_string(100 + 37 * i) + " + " + std::to_string(250 + i) + "?"));
    requests.back()["max_tokens"] = 60;
  }
  std::vector<Answer> alone;
  for (const Json& request : requests) alone.push_back(rest.Ask(request));
  std::vector<std::future<Answer>> together;
  for (size_t i = 0; i < requests.size(); ++i) {
    together.push_back(std::async(std::launch::async, [&rest, &requests, i] {
      return i % 2 == 0 ? rest.Ask(requests[i]) : rest.Stream(requests[i]);
    }));
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const Answer answer = together[i].get();
    EXPECT_TRUE(answer.ok()) << answer.ToString();
    EXPECT_EQ(answer.reasoning, alone[i].reasoning);
    EXPECT_EQ(answer.content, alone[i].content);
  }
}

TEST_F(GenerationTest, TokenizeAndBack) {
  const RestClient rest = Rest();
  for (const char* text : {"Hello world", "héllo 😀👩‍👩‍👧 你好，世界！\n\n  12345\t", "",
                           " ", "<｜User｜>x"}) {
    const Reply tokens = rest.Post("/tokenize", {{"content", text}});
    ASSERT_EQ(tokens.status, 200) << tokens.text;
    const Reply back = rest.Post("/detokenize", {{"tokens", tokens.body["tokens"]}});
    ASSERT_EQ(back.status, 200) << back.text;
    EXPECT_EQ(back.body["content"], text);
  }
  const Json with = rest.Post("/tokenize", {{"content", "Hi"}, {"add_special", true}}).body["tokens"];
  const Json without = rest.Post("/tokenize", {{"content", "Hi"}}).body["tokens"];
  ASSERT_EQ(with.size(), without.size() + 1);
  EXPECT_EQ(with[0], 0) << "BOS";
  // What a user typed is text: no control token in it, where the caller says so.
  const Json typed =
      rest.Post("/tokenize", {{"content", "<｜User｜>"}, {"parse_special", false}}).body["tokens"];
  const Json control =
      rest.Post("/tokenize", {{"content", "<｜User｜>"}, {"parse_special", true}}).body["tokens"];
  EXPECT_EQ(control.size(), 1u);
  EXPECT_GT(typed.size(), 1u);
}

TEST_F(GenerationTest, GrpcGivesTheSameText) {
  const Answer rest = Rest().Ask(Question("What is 77 + 88?"));
  ASSERT_TRUE(rest.ok()) << rest.ToString();
  const auto channel = Channel(stack_->gateway_address());
  ASSERT_NE(channel, nullptr);
  const auto stub = v1::Generation::NewStub(channel);
  v1::GenerationRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("What is 77 + 88?");
  request.set_temperature(0);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  const auto reader = stub->Generate(&context, request);
  std::string reasoning, content, finish;
  v1::Usage usage;
  int responses = 0;
  for (v1::GenerationResponse response; reader->Read(&response); ++responses) {
    reasoning += response.reasoning();
    content += response.content();
    finish += response.finish_reason();
    if (response.has_usage()) usage = response.usage();
  }
  const grpc::Status status = reader->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_GT(responses, 3);
  EXPECT_EQ(reasoning, rest.reasoning);
  EXPECT_EQ(content, rest.content);
  EXPECT_EQ(finish, "stop");
  EXPECT_EQ(usage.completion_tokens(), rest.usage["completion_tokens"]);
  EXPECT_EQ(usage.prompt_tokens(), rest.usage["prompt_tokens"]);

  v1::ListModelsResponse models;
  grpc::ClientContext list_context;
  ASSERT_TRUE(stub->ListModels(&list_context, {}, &models).ok());
  ASSERT_EQ(models.ids_size(), 1);
  EXPECT_EQ(models.ids(0), Rest().Get("/v1/models").body["data"][0]["id"].get<std::string>());
}

TEST_F(GenerationTest, HealthAndReflectionOfAllServices) {
  const std::pair<std::string, std::string> services[] = {
      {stack_->expert_address(), "tandem.v1.Experts"},
      {stack_->attention_address(), "tandem.v1.Engine"},
      {stack_->gateway_address(), "tandem.v1.Generation"}};
  for (const auto& [address, name] : services) {
    const auto channel = Channel(address);
    ASSERT_NE(channel, nullptr);
    const absl::Status serving = rpc::WaitServing(*channel, address, absl::Seconds(30));
    EXPECT_TRUE(serving.ok()) << serving;
    const std::vector<std::string> listed = ListServices(channel);
    EXPECT_THAT(listed, ::testing::Contains(name));
    EXPECT_THAT(listed, ::testing::Contains("grpc.health.v1.Health"));
  }
  EXPECT_EQ(Rest().Get("/health").status, 200);
  EXPECT_EQ(Rest().Get("/ready").status, 200);
}

TEST_F(GenerationTest, MetricsCountAndLint) {
  const Answer answer = Rest().Ask(Question("What is 3 + 4?"));
  ASSERT_TRUE(answer.ok()) << answer.ToString();
  EXPECT_THAT(stack_->gateway().Output(),
              ::testing::ContainsRegex("Performance\\(T/s\\): prefill [0-9.]+, decode [0-9.]+\\. "
                                       "Time\\(s\\): tokenize [0-9.]+, prefill [0-9.]+, decode [0-9.]+"));
  const RestClient gateway = Rest(), attention = stack_->attention_metrics(),
                   expert = stack_->expert_metrics();
  EXPECT_GE(gateway.Metric("tandem_generated_tokens_total"), answer.usage["completion_tokens"]);
  EXPECT_GE(gateway.Metric("tandem_requests_total"), 1);
  EXPECT_GE(gateway.Metric("tandem_time_to_first_token_seconds_count"), 1);
  EXPECT_TRUE(WaitUntil([&] { return attention.Metric("tandem_generated_tokens_total") > 0; }));
  EXPECT_GT(expert.Metric("tandem_expert_bytes_read_total"), 0);
  EXPECT_GT(expert.Metric("tandem_expert_call_seconds_count"), 0);
  EXPECT_GT(expert.Metric("tandem_expert_bandwidth_ratio"), 0);

  if (std::system("command -v promtool >/dev/null") != 0) GTEST_SKIP() << "promtool is not installed";
  const TempFolder folder;
  for (const RestClient& client : {gateway, attention, expert}) {
    const Reply metrics = client.Get("/metrics");
    ASSERT_EQ(metrics.status, 200);
    const std::string file = folder / "metrics";
    std::ofstream(file) << metrics.text;
    Process lint("/bin/sh", {"-c", "promtool check metrics < " + file});
    EXPECT_EQ(lint.Wait(), 0) << lint.Output() << metrics.text;
  }
}

}  // namespace
}  // namespace tandem::integration
