// What users do wrong: models, flags, ports, requests. Each is answered with a message that names the thing,
// with the right code, and leaves a server serving.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/str_format.h"
#include "cli/util/format.h"
#include "common/rpc/channel.h"
#include "common/topology/limits.h"
#include "services/gateway/testing/raw_client.h"
#include "tandem/v1/generation.grpc.pb.h"
#include "tests/integration/bad_models.h"
#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

using gateway::testing::RawClient;
using ::testing::HasSubstr;

// --- Programs that must not start -----------------------------------------------------------------------

struct Command {
  std::string program;
  std::vector<std::string> args;
};

std::vector<Command> CommandsFor(const std::string& model, const TempFolder& folder) {
  return {
      {"tandem-expert", {"--model", model, "--listen", "unix:" + (folder / "e")}},
      {"tandem-attention",
       {"--model", model, "--listen", "unix:" + (folder / "a"), "--metrics-listen", "", "--expert",
        "unix:" + (folder / "none")}},
      {"tandem", {"serve", "--model", model, "--port", "0", "--grpc-port", "0", "--metrics-base-port", "0"}}};
}

TEST(BadModelTest, IsNamedByEveryProgram) {
  const TempFolder folder;
  for (const BadModel& model : MakeBadModels(folder.path())) {
    for (const Command& command : CommandsFor(model.path, folder)) {
      Process process(command.program, command.args);
      EXPECT_EQ(process.Wait(), 1) << model.what << ", " << command.program << ":\n" << process.Output();
      for (const std::string& word : model.words) {
        EXPECT_THAT(process.Output(), HasSubstr(word)) << model.what << ", " << command.program;
      }
      // One line for the user, not a pile of what each child said.
      if (command.program == "tandem") {
        EXPECT_THAT(process.Output(), ::testing::Not(HasSubstr("[expert0]"))) << model.what;
      }
    }
  }
}

TEST(NoMemoryTest, IsSaidBeforeLoadingWithTheNumbers) {
  const TempFolder folder;
  const HugeModel huge = WriteHugeModel(folder.path());
  const topology::MemoryInfo memory = topology::ReadMemoryInfo();
  {
    Process serve("tandem", {"serve", "--model", huge.path, "--port", "0", "--grpc-port", "0",
                             "--metrics-base-port", "0"});
    EXPECT_EQ(serve.Wait(), 1) << serve.Output();
    EXPECT_THAT(serve.Output(), HasSubstr("not enough memory"));
    EXPECT_THAT(serve.Output(), HasSubstr("routed experts " + cli::FormatBytes(huge.expert_bytes)));
    EXPECT_THAT(serve.Output(), HasSubstr("of " + cli::FormatBytes(memory.total_bytes)));
    EXPECT_THAT(serve.Output(), ::testing::Not(HasSubstr("[expert0]"))) << "it started something";
  }
  {
    Process expert("tandem-expert", {"--model", huge.path, "--listen", "unix:" + (folder / "e")});
    EXPECT_EQ(expert.Wait(), 1) << expert.Output();
    EXPECT_THAT(expert.Output(), HasSubstr("huge.gguf"));
    EXPECT_THAT(expert.Output(), HasSubstr(absl::StrFormat("%.2f GB of weights",
                                                           static_cast<double>(huge.expert_bytes) / 1e9)));
    EXPECT_THAT(expert.Output(), ::testing::ContainsRegex("[0-9.]+ GB are available"));
    EXPECT_THAT(expert.Output(), ::testing::Not(HasSubstr("loading")));
  }
  // The experts are others' business here, the cache is not; experts that do not answer are not waited for.
  Process attention("tandem-attention",
                    {"--model", DemoModel(), "--listen", "unix:" + (folder / "a"), "--metrics-listen", "",
                     "--expert", "unix:" + (folder / "none"), "--kv-tokens", "1073741824"});
  EXPECT_EQ(attention.Wait(), 1) << attention.Output();
  EXPECT_THAT(attention.Output(), HasSubstr("not enough memory"));
  EXPECT_THAT(attention.Output(), ::testing::ContainsRegex("KV cache [0-9.]+ GB"));
  EXPECT_THAT(attention.Output(), ::testing::ContainsRegex("[0-9.]+ GB are available"));
}

TEST(BadFlagTest, EndsWithTwoAndIsNamed) {
  const std::vector<std::pair<Command, std::string>> cases = {
      {{"tandem-expert", {"--model", "m", "--frobnicate", "1"}}, "--frobnicate"},
      {{"tandem-attention", {"--model", "m", "--frobnicate", "1"}}, "--frobnicate"},
      {{"tandem-gateway", {"--engine", "127.0.0.1:1", "--frobnicate", "1"}}, "--frobnicate"},
      {{"tandem", {"serve", "--frobnicate", "1"}}, "--frobnicate"},
      {{"tandem", {"frobnicate"}}, "frobnicate"},
      {{"tandem", {}}, "serve"},
      {{"tandem-expert", {}}, "--model"},
      {{"tandem-attention", {}}, "--model"},
      {{"tandem-gateway", {}}, "--engine"},
      {{"tandem-expert", {"--model", "m", "--threads", "-3"}}, "--threads"},
      {{"tandem-attention", {"--model", "m", "--max-batch-size", "0"}}, "--max-batch-size"},
      {{"tandem-attention", {"--model", "m", "--precision", "exact"}}, "--precision"},
      {{"tandem-gateway", {"--engine", "127.0.0.1:1", "--max-requests", "many"}}, "--max-requests"},
      {{"tandem", {"serve", "--port", "99999"}}, "--port"},
      {{"tandem", {"serve", "--ctx", "-1"}}, "--ctx"}};
  for (const auto& [command, word] : cases) {
    Process process(command.program, command.args);
    EXPECT_EQ(process.Wait(), 2) << command.program << " ... " << word << ":\n" << process.Output();
    EXPECT_THAT(process.Output(), HasSubstr(word)) << command.program;
  }
}

// Each source has a value that is none; the one that the error names was taken.
TEST(BadFlagTest, EveryProgramTakesTheCommandLineThenTheEnvironmentThenTheFile) {
  struct Case {
    Command command;
    std::string flag, variable;
  };
  const std::vector<Case> cases = {
      {{"tandem-expert", {"--model", "m"}}, "precision", "TANDEM_PRECISION"},
      {{"tandem-attention", {"--model", "m"}}, "precision", "TANDEM_PRECISION"},
      {{"tandem-gateway", {"--engine", "127.0.0.1:1"}}, "max-requests", "TANDEM_MAX_REQUESTS"},
      {{"tandem", {"serve"}}, "precision", "TANDEM_PRECISION"}};
  const TempFolder folder;
  for (const Case& c : cases) {
    const std::string file = folder / "config";
    std::ofstream(file) << c.flag << " = \"of-file\"\n";
    const auto expect = [&](const std::vector<std::string>& more, const std::vector<std::string>& environment,
                            const std::string& taken) {
      std::vector<std::string> args = c.command.args;
      args.insert(args.end(), more.begin(), more.end());
      Process process(c.command.program, args, environment);
      EXPECT_EQ(process.Wait(), 2) << c.command.program << ", " << taken << ":\n" << process.Output();
      for (const char* value : {"of-file", "of-environment", "of-line"}) {
        if (value == taken) {
          EXPECT_THAT(process.Output(), HasSubstr(value)) << c.command.program;
        } else {
          EXPECT_THAT(process.Output(), ::testing::Not(HasSubstr(value))) << c.command.program;
        }
      }
    };
    const std::string named = "TANDEM_CONFIG=" + file, set = c.variable + "=of-environment";
    expect({"--config", file}, {}, "of-file");
    expect({}, {named}, "of-file");
    expect({"--config", file}, {set}, "of-environment");
    expect({}, {named, set}, "of-environment");
    expect({"--config", file, "--" + c.flag, "of-line"}, {set}, "of-line");
  }
}

TEST(BadFlagTest, ContextBeyondTheModels) {
  const TempFolder folder;
  for (Command command : CommandsFor(DemoModel(), folder)) {
    if (command.program == "tandem-expert") continue;
    command.args.insert(command.args.end(), {"--ctx", "1000000"});
    Process process(command.program, command.args);
    EXPECT_NE(process.Wait().value_or(0), 0) << process.Output();
    EXPECT_THAT(process.Output(), HasSubstr("--ctx 1000000: the model's context is 4096"));
  }
}

TEST(PortInUseTest, IsNamed) {
  // A server of ours holds a gRPC, a metrics and, with the gateway, an HTTP port.
  Process expert("tandem-expert", {"--model", DemoModel(), "--listen", "127.0.0.1:0", "--metrics-listen",
                                   "127.0.0.1:0", "--threads", "1"});
  Process gateway("tandem-gateway",
                  {"--engine", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--grpc-listen", ""});
  const auto grpc = expert.WaitForOutput("listening at 127.0.0.1:([0-9]+)");
  const auto metrics = expert.WaitForOutput("metrics at port ([0-9]+)");
  const auto http = gateway.WaitForOutput("HTTP on 127.0.0.1:([0-9]+)");
  ASSERT_TRUE(grpc.has_value() && metrics.has_value() && http.has_value());

  const TempFolder folder;
  for (const std::string& port : {*grpc, *metrics, *http}) {
    const std::string address = "127.0.0.1:" + port;
    const std::vector<Command> commands = {
        {"tandem-expert", {"--model", DemoModel(), "--listen", address}},
        {"tandem-expert",
         {"--model", DemoModel(), "--listen", "unix:" + (folder / "e"), "--metrics-listen", address}},
        {"tandem-attention", {"--model", DemoModel(), "--listen", address, "--metrics-listen", ""}},
        {"tandem-attention",
         {"--model", DemoModel(), "--listen", "unix:" + (folder / "a"), "--metrics-listen", address}},
        {"tandem-gateway", {"--engine", "127.0.0.1:1", "--listen", address, "--grpc-listen", ""}},
        {"tandem-gateway", {"--engine", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--grpc-listen", address}},
        {"tandem", {"serve", "--port", port, "--grpc-port", "0", "--metrics-base-port", "0"}},
        {"tandem", {"serve", "--port", "0", "--grpc-port", port, "--metrics-base-port", "0"}}};
    for (const Command& command : commands) {
      Process process(command.program, command.args);
      EXPECT_EQ(process.Wait(), 1) << command.program << " " << command.args[0] << ":\n" << process.Output();
      EXPECT_THAT(process.Output(), HasSubstr(port)) << command.program;
      EXPECT_THAT(process.Output(), HasSubstr("in use")) << command.program;
    }
  }
}

// --- Requests that must be refused ----------------------------------------------------------------------

class BadRequestTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    StackOptions options;
    options.gateway = {"--max-body-bytes", "1000000"};
    stack_ = std::make_unique<Stack>(options);
    ASSERT_TRUE(stack_->WaitReady());
    const Reply models = stack_->rest().Get("/v1/models");
    ASSERT_EQ(models.status, 200);
  }
  static void TearDownTestSuite() { stack_.reset(); }
  // Whatever came before: it serves.
  void TearDown() override {
    const Answer answer = stack_->rest().Ask(Question("What is 12 + 34?"));
    EXPECT_EQ(answer.content, "12 + 34 = 46.") << answer.ToString();
    EXPECT_EQ(stack_->rest().Metric("tandem_requests_running"), 0);
    EXPECT_EQ(stack_->rest().Metric("tandem_requests_waiting"), 0);
  }

  static gateway::testing::HttpReply Raw(const std::string& bytes) {
    RawClient client(std::atoi(stack_->gateway().WaitForOutput("HTTP on .*:([0-9]+)")->c_str()));
    EXPECT_TRUE(client.connected());
    client.Send(bytes);
    return client.ReadReply();
  }
  static gateway::testing::HttpReply Call(const std::string& method, const std::string& path,
                                          const std::string& body) {
    return Raw(method + " " + path + " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n" +
               "Content-Length: " + std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" + body);
  }

  struct Case {
    std::string path, body;
    int status;
    std::string code;  // empty: any
    std::string word;  // in the message
  };
  static void Expect(const gateway::testing::HttpReply& reply, const Case& c) {
    const std::string sent = c.path + " " + c.body.substr(0, 200);
    EXPECT_EQ(reply.status, c.status) << sent << "\n" << reply.body;
    const Json body = Json::parse(reply.body, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(body.is_object() && body.contains("error")) << sent << "\n" << reply.body;
    const Json& error = body["error"];
    EXPECT_THAT(error["message"].get<std::string>(), HasSubstr(c.word)) << sent;
    EXPECT_TRUE(error.contains("type") && error.contains("param") && error.contains("code")) << reply.body;
    if (!c.code.empty()) {
      EXPECT_EQ(error["code"], c.code) << sent;
    }
  }

  static std::unique_ptr<Stack> stack_;
};
std::unique_ptr<Stack> BadRequestTest::stack_;

constexpr char kChat[] = "/v1/chat/completions";
constexpr char kText[] = "/v1/completions";

// {"messages": [a good one], MORE}
std::string Chat(const std::string& more) {
  return R"({"messages": [{"role": "user", "content": "hi"}], )" + more + "}";
}

TEST_F(BadRequestTest, Bodies) {
  const std::vector<Case> cases = {
      {kChat, R"({"messages": [)", 400, "invalid_json", ""},
      {kChat, "", 400, "invalid_json", ""},
      {kChat, "[]", 400, "", "object"},
      {kChat, "\"hi\"", 400, "", "object"},
      {kChat, std::string(100000, '['), 400, "invalid_json", ""},
      {kChat, "{}", 400, "missing_field", "messages"},
      {kChat, R"({"messages": []})", 400, "", "messages"},
      {kChat, R"({"messages": "hi"})", 400, "", "messages"},
      {kChat, R"({"messages": [{"role": "user"}]})", 400, "missing_field", "messages[0].content"},
      {kChat, R"({"messages": [{"role": "god", "content": "x"}]})", 400, "", "god"},
      {kChat, R"({"messages": [{"role": 5, "content": "x"}]})", 400, "", "messages[0].role"},
      {kChat, R"({"messages": [{"role": "user", "content": 5}]})", 400, "", "messages[0].content"},
      {kChat, R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})", 400, "",
       "image_url"},
      {kChat, Chat(R"("model": "gpt-4")"), 404, "model_not_found", "gpt-4"},
      {kChat, Chat(R"("model": 4)"), 400, "", "model"},
      {kChat, Chat(R"("temperature": "hot")"), 400, "", "temperature"},
      {kChat, Chat(R"("temperature": -0.1)"), 400, "out_of_range", "temperature"},
      {kChat, Chat(R"("temperature": 1e300)"), 400, "out_of_range", "temperature"},
      {kChat, Chat(R"("temperature": 1e400)"), 400, "", ""},
      {kChat, Chat(R"("temperature": NaN)"), 400, "invalid_json", ""},
      {kChat, Chat(R"("top_p": -1)"), 400, "out_of_range", "top_p"},
      {kChat, Chat(R"("top_k": -2)"), 400, "out_of_range", "top_k"},
      {kChat, Chat(R"("max_tokens": 0)"), 400, "out_of_range", "max_tokens"},
      {kChat, Chat(R"("max_tokens": -1)"), 400, "out_of_range", "max_tokens"},
      {kChat, Chat(R"("max_tokens": 1.5)"), 400, "", "max_tokens"},
      {kChat, Chat(R"("max_tokens": "ten")"), 400, "", "max_tokens"},
      {kChat, Chat(R"("max_tokens": 99999999999999999999)"), 400, "", "max_tokens"},
      {kChat, Chat(R"("n": 100000)"), 400, "out_of_range", "n"},
      {kChat, Chat(R"("stream": "yes")"), 400, "", "stream"},
      {kChat, Chat(R"("stream_options": {"include_usage": true})"), 400, "", "stream_options"},
      {kChat, Chat(R"("stop": [""])"), 400, "", "stop[0]"},
      {kChat, Chat(R"("stop": {"a": 1})"), 400, "", "stop"},
      {kChat, Chat(R"("logprobs": true, "top_logprobs": 1000)"), 400, "out_of_range", "top_logprobs"},
      {kChat, Chat(R"("logit_bias": {"999999": 1})"), 400, "out_of_range", "999999"},
      {kChat, Chat(R"("tools": [{"type": "function"}])"), 400, "unsupported", "tools"},
      {kChat, "{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}", 400, "invalid_json",
       "UTF-8"},
      {kText, "{\"prompt\": \"\xe4\xbd\"}", 400, "invalid_json", "UTF-8"},
      {kText, "{}", 400, "missing_field", "prompt"},
      {kText, R"({"prompt": 5})", 400, "", "prompt"},
      {kText, R"({"prompt": [-1]})", 400, "", "prompt"},
      {kText, R"({"prompt": [2560]})", 400, "", "2559"},
      {kText, R"({"prompt": []})", 400, "", "prompt"},
      {"/tokenize", R"({"content": 5})", 400, "", "content"},
      {"/tokenize", "{}", 400, "missing_field", "content"},
      {"/detokenize", R"({"tokens": [-1]})", 400, "out_of_range", "tokens[0]"},
      {"/detokenize", R"({"tokens": [1, 99999999]})", 400, "out_of_range", "tokens[1]"},
      {"/detokenize", R"({"tokens": "x"})", 400, "", "tokens"},
      {"/apply-template", R"({"messages": 1})", 400, "", "messages"},
      {"/v1/nothing", "{}", 404, "", "/v1/nothing"}};
  for (const Case& c : cases) Expect(Call("POST", c.path, c.body), c);
}

TEST_F(BadRequestTest, PromptBeyondTheContext) {
  std::string words;
  for (int i = 0; i < 5000; ++i) words += " apple";
  const Json chat = {{"messages", {{{"role", "user"}, {"content", words}}}}};
  Expect(Call("POST", kChat, chat.dump()), {kChat, "long", 400, "context_length_exceeded", "4096"});
  const Json text = {{"prompt", words}, {"stream", true}};
  Expect(Call("POST", kText, text.dump()), {kText, "long", 400, "context_length_exceeded", "4096"});
}

TEST_F(BadRequestTest, Protocol) {
  const gateway::testing::HttpReply get = Call("GET", kChat, "");
  Expect(get, {kChat, "GET", 405, "method_not_allowed", "POST"});
  EXPECT_THAT(get.headers.at("allow"), HasSubstr("POST"));
  Expect(Call("DELETE", "/v1/models", ""), {"/v1/models", "DELETE", 405, "", "GET"});
  Expect(Call("GET", "/v1/models/gpt-4", ""), {"/v1/models/gpt-4", "GET", 404, "model_not_found", "gpt-4"});
  // Refused by its head: nothing of the body is sent.
  const std::string head = std::string("POST ") + kChat + " HTTP/1.1\r\nHost: test\r\nContent-Length: ";
  Expect(Raw(head + "1000001\r\n\r\n"), {kChat, "large", 413, "request_too_large", "1000000"});
  Expect(Raw(head + "99999999999999999999999\r\n\r\n"), {kChat, "overflow", 400, "", ""});
  Expect(Raw("GET / HTTP/1.1\r\nHost: test\r\nX: " + std::string(100000, 'x') + "\r\n\r\n"),
         {"/", "long head", 431, "headers_too_large", ""});
  Expect(Raw("what is this\r\n\r\n"), {"", "no HTTP", 505, "http_version_not_supported", ""});
  Expect(Raw(std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 15)),
         {"", "TLS", 400, "", ""});
}

TEST_F(BadRequestTest, Grpc) {
  auto channel = rpc::Connect(stack_->gateway_address());
  ASSERT_TRUE(channel.ok()) << channel.status();
  const auto stub = v1::Generation::NewStub(*channel);
  const auto ask = [&](const v1::GenerationRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    const auto reader = stub->Generate(&context, request);
    for (v1::GenerationResponse response; reader->Read(&response);) {
    }
    return reader->Finish();
  };
  v1::GenerationRequest good;
  good.set_text("The");
  good.set_max_tokens(3);
  EXPECT_TRUE(ask(good).ok());

  v1::GenerationRequest request = good;
  request.set_model("gpt-4");
  grpc::Status status = ask(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("gpt-4"));
  request = good;
  request.set_temperature(-1);
  status = ask(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("temperature"));
  status = ask({});
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  std::string words;
  for (int i = 0; i < 5000; ++i) words += " apple";
  request = good;
  request.set_text(words);
  status = ask(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::OUT_OF_RANGE) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("4096"));
  EXPECT_TRUE(ask(good).ok());
}

}  // namespace
}  // namespace tandem::integration
