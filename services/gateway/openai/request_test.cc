#include "services/gateway/openai/request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "services/gateway/openai/json_body.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

Json Parse(const std::string& text) {
  absl::StatusOr<Json> json = ParseJsonBody(text);
  EXPECT_TRUE(json.ok()) << json.status() << "\n" << text;
  return json.ok() ? *json : Json::object();
}

const char* kHi = R"("messages":[{"role":"user","content":"hi"}])";

ChatRequest ParseChat(const std::string& fields) {
  ChatRequest out;
  const auto error = ParseChatRequest(
      Parse("{" + std::string(kHi) + (fields.empty() ? "" : ",") + fields + "}"), RequestDefaults(), &out);
  EXPECT_FALSE(error.has_value()) << (error ? error->message : "");
  return out;
}

TEST(ChatRequestTest, DefaultsAndAllFields) {
  const ChatRequest plain = ParseChat("");
  EXPECT_EQ(plain.model, "");
  EXPECT_FALSE(plain.stream);
  EXPECT_FALSE(plain.has_seed);
  EXPECT_FALSE(plain.max_tokens.has_value());
  EXPECT_FLOAT_EQ(plain.sampling.temperature, 0.6f);
  EXPECT_FLOAT_EQ(plain.sampling.top_p, 0.95f);
  EXPECT_EQ(plain.n, 1);

  const ChatRequest full = ParseChat(
      R"("model":"m","stream":true,"stream_options":{"include_usage":true},"temperature":0,"top_p":0.5,"top_k":7,
         "min_p":0.1,"seed":-1,"max_tokens":5,"max_completion_tokens":6,"stop":["a","b"],"n":3,
         "presence_penalty":-2,"frequency_penalty":2,"repetition_penalty":1.1,"logprobs":true,"top_logprobs":20,
         "logit_bias":{"12":-100,"7":1.5},"user":"u","response_format":{"type":"text"},"tools":[],
         "tool_choice":"none","unknown_field":{"x":[1]},"metadata":null,"chat_template_kwargs":{"a":1})");
  EXPECT_EQ(full.model, "m");
  EXPECT_TRUE(full.stream);
  EXPECT_TRUE(full.include_usage);
  EXPECT_EQ(full.sampling.temperature, 0);
  EXPECT_FLOAT_EQ(full.sampling.top_p, 0.5f);
  EXPECT_EQ(full.sampling.top_k, 7u);
  EXPECT_TRUE(full.has_seed);
  EXPECT_EQ(full.sampling.seed, UINT64_MAX);
  EXPECT_EQ(full.max_tokens, 6u);
  EXPECT_EQ(full.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(full.n, 3);
  EXPECT_EQ(full.top_logprobs, 20u);
  EXPECT_EQ(full.sampling.logit_bias, (std::map<int32_t, float>{{7, 1.5f}, {12, -100.f}}));
  EXPECT_EQ(full.template_kwargs["a"], 1);
  EXPECT_EQ(ParseChat(R"("stop":"END")").stop, (std::vector<std::string>{"END"}));
  EXPECT_EQ(ParseChat(R"("temperature":null,"stop":null,"seed":18446744073709551615)").sampling.seed,
            UINT64_MAX);
  EXPECT_EQ(ParseChat(R"("top_k":-1)").sampling.top_k, 0u);
  EXPECT_GT(ParseChat(R"("top_p":0)").sampling.top_p, 0);
}

TEST(ChatRequestTest, MessagesOfEveryShape) {
  ChatRequest out;
  const auto error = ParseChatRequest(Parse(R"({"messages":[
        {"role":"developer","content":"be brief"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"name":"bob"},
        {"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]},
        {"role":"tool","tool_call_id":"c","content":"7"},
        {"role":"assistant","reasoning_content":"ignored","content":"done"}]})"),
                                      RequestDefaults(), &out);
  ASSERT_FALSE(error.has_value()) << error->message;
  EXPECT_EQ(out.messages[0], Json::parse(R"({"role":"system","content":"be brief"})"));
  EXPECT_EQ(out.messages[1], Json::parse(R"({"role":"user","content":"ab","name":"bob"})"));
  EXPECT_TRUE(out.messages[2]["content"].is_null());
  EXPECT_EQ(out.messages[2]["tool_calls"][0]["function"]["name"], "f");
  EXPECT_EQ(out.messages[3]["tool_call_id"], "c");
  EXPECT_EQ(out.messages[4], Json::parse(R"({"role":"assistant","content":"done"})"));
}

struct BadField {
  const char* fields;
  const char* param;
  const char* code;
  const char* message;
};

class BadChatTest : public ::testing::TestWithParam<BadField> {};

TEST_P(BadChatTest, NamesTheFieldAndWhatIsWrong) {
  const BadField& c = GetParam();
  std::string body = c.fields;
  if (body.find("\"messages\"") == std::string::npos) body = std::string(kHi) + "," + body;
  ChatRequest out;
  const auto error = ParseChatRequest(Parse("{" + body + "}"), RequestDefaults(), &out);
  ASSERT_TRUE(error.has_value()) << body;
  EXPECT_EQ(error->status, 400);
  EXPECT_EQ(error->type, "invalid_request_error");
  EXPECT_EQ(error->param, c.param);
  EXPECT_EQ(error->code, c.code);
  EXPECT_THAT(error->message, HasSubstr(c.message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadChatTest,
    ::testing::Values(
        BadField{R"("model":5)", "model", "invalid_type", "must be a string, not an integer"},
        BadField{R"("stream":"yes")", "stream", "invalid_type", "must be true or false, not a string"},
        BadField{R"("stream_options":{"include_usage":true})", "stream_options", "invalid_value",
                 "'stream' is true"},
        BadField{R"("stream":true,"stream_options":{"include_usage":1})", "stream_options.include_usage",
                 "invalid_type", "true or false"},
        BadField{R"("temperature":-0.1)", "temperature", "out_of_range", "must be from 0 to 2, not -0.1"},
        BadField{R"("temperature":2.1)", "temperature", "out_of_range", "must be from 0 to 2"},
        BadField{R"("temperature":1e300)", "temperature", "out_of_range", "must be from 0 to 2"},
        BadField{R"("temperature":"hot")", "temperature", "invalid_type", "must be a number, not a string"},
        BadField{R"("temperature":[1])", "temperature", "invalid_type", "not an array"},
        BadField{R"("top_p":1.5)", "top_p", "out_of_range", "from 0 to 1"},
        BadField{R"("min_p":1)", "min_p", "out_of_range", "less than 1"},
        BadField{R"("top_k":1.5)", "top_k", "invalid_type", "must be an integer, not a number"},
        BadField{R"("top_k":-2)", "top_k", "out_of_range", "from -1 to"},
        BadField{R"("seed":1.5)", "seed", "invalid_type", "integer"},
        BadField{R"("max_tokens":0)", "max_tokens", "out_of_range", "from 1 to 2147483647, not 0"},
        BadField{R"("max_tokens":-5)", "max_tokens", "out_of_range", "not -5"},
        BadField{R"("max_tokens":99999999999)", "max_tokens", "out_of_range", "not 99999999999"},
        BadField{R"("max_tokens":18446744073709551615)", "max_tokens", "out_of_range",
                 "not 18446744073709551615"},
        BadField{R"("max_completion_tokens":true)", "max_completion_tokens", "invalid_type", "not a boolean"},
        BadField{R"("n":0)", "n", "out_of_range", "from 1 to 32"},
        BadField{R"("n":33)", "n", "out_of_range", "from 1 to 32"},
        BadField{R"("stop":5)", "stop", "invalid_type", "a string or an array of strings"},
        BadField{R"("stop":["a",5])", "stop[1]", "invalid_type", "must be a string"},
        BadField{R"("stop":["a",""])", "stop[1]", "invalid_value", "empty"},
        BadField{R"("stop":"")", "stop", "invalid_value", "empty"},
        BadField{R"("stop":["1","2","3","4","5","6","7","8","9","0","1","2","3","4","5","6","7"])", "stop",
                 "out_of_range", "up to 16 strings, not 17"},
        BadField{R"("presence_penalty":3)", "presence_penalty", "out_of_range", "from -2 to 2"},
        BadField{R"("frequency_penalty":-3)", "frequency_penalty", "out_of_range", "from -2 to 2"},
        BadField{R"("repetition_penalty":0)", "repetition_penalty", "out_of_range", "greater than 0"},
        BadField{R"("logprobs":5)", "logprobs", "invalid_type", "true or false"},
        BadField{R"("top_logprobs":3)", "top_logprobs", "invalid_value", "needs 'logprobs'"},
        BadField{R"("logprobs":true,"top_logprobs":21)", "top_logprobs", "out_of_range", "from 0 to 20"},
        BadField{R"("logit_bias":[1])", "logit_bias", "invalid_type", "an object"},
        BadField{R"("logit_bias":{"x":1})", "logit_bias", "invalid_value", "no token id"},
        BadField{R"("logit_bias":{"-1":1})", "logit_bias", "invalid_value", "no token id"},
        BadField{R"("logit_bias":{"5":101})", "logit_bias.5", "out_of_range", "from -100 to 100"},
        BadField{R"("logit_bias":{"5":"x"})", "logit_bias.5", "invalid_type", "a number"},
        BadField{R"("response_format":{"type":"json_object"})", "response_format.type", "unsupported",
                 "json_object"},
        BadField{R"("response_format":{"type":"json_schema"})", "response_format.type", "unsupported",
                 "json_schema"},
        BadField{R"("response_format":{})", "response_format.type", "missing_field", "missing"},
        BadField{R"("response_format":"text")", "response_format", "invalid_type", "an object"},
        BadField{R"("tools":[{"type":"function"}])", "tools", "unsupported", "not supported"},
        BadField{R"("functions":[{}])", "functions", "unsupported", "not supported"},
        BadField{R"("tool_choice":"required")", "tool_choice", "unsupported", "tools are not supported"},
        BadField{R"("chat_template_kwargs":5)", "chat_template_kwargs", "invalid_type", "an object"},
        BadField{R"("messages":null)", "messages", "missing_field", "missing"},
        BadField{R"("messages":[])", "messages", "invalid_value", "empty"},
        BadField{R"("messages":"hi")", "messages", "invalid_type", "must be an array, not a string"},
        BadField{R"("messages":["hi"])", "messages[0]", "invalid_type", "must be an object, not a string"},
        BadField{R"("messages":[{"content":"x"}])", "messages[0].role", "missing_field", "missing"},
        BadField{R"("messages":[{"role":"robot","content":"x"}])", "messages[0].role", "invalid_value",
                 "robot"},
        BadField{R"("messages":[{"role":5,"content":"x"}])", "messages[0].role", "invalid_type", "a string"},
        BadField{R"("messages":[{"role":"user","content":"x"},{"role":"user","content":5}])",
                 "messages[1].content", "invalid_type", "a string or an array of parts, not an integer"},
        BadField{R"("messages":[{"role":"user"}])", "messages[0].content", "missing_field", "missing"},
        BadField{R"("messages":[{"role":"user","content":[5]}])", "messages[0].content[0]", "invalid_type",
                 "object"},
        BadField{R"("messages":[{"role":"user","content":[{"text":"x"}]}])", "messages[0].content[0].type",
                 "missing_field", "missing"},
        BadField{
            R"("messages":[{"role":"user","content":[{"type":"text","text":"x"},{"type":"image_url"}]}])",
            "messages[0].content[1].type", "unsupported", "image_url"},
        BadField{R"("messages":[{"role":"user","content":[{"type":"text","text":7}]}])",
                 "messages[0].content[0].text", "invalid_type", "a string"},
        BadField{R"("messages":[{"role":"user","content":[{"type":"text"}]}])", "messages[0].content[0].text",
                 "missing_field", "missing"},
        BadField{
            R"("messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{}}}]}])",
            "messages[0].tool_calls[0].function.arguments", "invalid_type", "a string"},
        BadField{R"("messages":[{"role":"assistant","tool_calls":[{}]}])",
                 "messages[0].tool_calls[0].function", "missing_field", "missing"}));

CompletionRequest ParseText(const std::string& body) {
  CompletionRequest out;
  const auto error = ParseCompletionRequest(Parse(body), RequestDefaults(), &out);
  EXPECT_FALSE(error.has_value()) << (error ? error->message : "");
  return out;
}

TEST(CompletionRequestTest, PromptsOfEveryShape) {
  using Tokens = CompletionRequest::Tokens;
  EXPECT_EQ(std::get<std::string>(ParseText(R"({"prompt":"a"})").prompts.at(0)), "a");
  EXPECT_EQ(ParseText(R"({"prompt":"a"})").max_tokens, 16u);
  EXPECT_EQ(ParseText(R"({"prompt":["a","b"]})").prompts.size(), 2u);
  EXPECT_EQ(std::get<Tokens>(ParseText(R"({"prompt":[1,2]})").prompts.at(0)), (Tokens{1, 2}));
  EXPECT_EQ(std::get<Tokens>(ParseText(R"({"prompt":[[1],[2,3]]})").prompts.at(1)), (Tokens{2, 3}));
  const CompletionRequest full =
      ParseText(R"({"prompt":"a","echo":true,"suffix":"","best_of":1,"max_tokens":3})");
  EXPECT_TRUE(full.echo);
  const CompletionRequest logprobs = ParseText(R"({"prompt":"a","logprobs":0})");
  EXPECT_TRUE(logprobs.logprobs);
  EXPECT_EQ(logprobs.top_logprobs, 0u);
}

TEST(CompletionRequestTest, NamesTheFieldAndWhatIsWrong) {
  const BadField cases[] = {
      {R"({})", "prompt", "missing_field", "missing"},
      {R"({"prompt":5})", "prompt", "invalid_type", "token ids, not an integer"},
      {R"({"prompt":[]})", "prompt", "invalid_value", "empty"},
      {R"({"prompt":[1,"a"]})", "prompt[1]", "invalid_type", "a token id"},
      {R"({"prompt":[1,-1]})", "prompt[1]", "out_of_range", "-1"},
      {R"({"prompt":[1,1.5]})", "prompt[1]", "invalid_type", "a token id"},
      {R"({"prompt":[18446744073709551615]})", "prompt[0]", "out_of_range", "18446744073709551615"},
      {R"({"prompt":["a",{}]})", "prompt[1]", "invalid_type", "an object"},
      {R"({"prompt":[["a"]]})", "prompt[0][0]", "invalid_type", "a token id"},
      {R"({"prompt":["a","b","c"],"n":11})", "n", "out_of_range", "not 33"},
      {R"({"prompt":"a","suffix":"b"})", "suffix", "unsupported", "fill in the middle"},
      {R"({"prompt":"a","best_of":2})", "best_of", "unsupported", "'n'"},
      {R"({"prompt":"a","logprobs":true})", "logprobs", "invalid_type", "an integer"},
      {R"({"prompt":"a","logprobs":21})", "logprobs", "out_of_range", "from 0 to 20"},
      {R"({"prompt":"a","logprobs":1,"echo":true})", "logprobs", "unsupported", "'echo'"},
  };
  for (const BadField& c : cases) {
    CompletionRequest out;
    const auto error = ParseCompletionRequest(Parse(c.fields), RequestDefaults(), &out);
    ASSERT_TRUE(error.has_value()) << c.fields;
    EXPECT_EQ(error->param, c.param);
    EXPECT_EQ(error->code, c.code);
    EXPECT_THAT(error->message, HasSubstr(c.message));
  }
}

TEST(JsonBodyTest, ErrorsSayWhere) {
  const std::pair<std::string, const char*> cases[] = {
      {"", "the body is empty"},
      {"[1]", "is a JSON array; expected an object"},
      {"\"x\"", "is a JSON string"},
      {"{\"a\":1,}", "at byte 7 (line 1, column 8)"},
      {"{\n \"a\": nul}", "(line 2, column 10)"},
      {"{\"a\":1", "not valid JSON at byte 6"},
      {"{\"a\":NaN}", "not valid JSON at byte 5"},
      {"{\"a\":Infinity}", "not valid JSON"},
      {"{\"a\":1e999}", "number overflow"},
      {"{\"a\":01}", "not valid JSON"},
      {"{\"a\":\"\xff\"}", "ill-formed UTF-8"},
      {"{\"a\":\"\xc3\"}", "ill-formed UTF-8"},
      {"{\"a\":\"\xed\xa0\x80\"}", "ill-formed UTF-8"},
      {"{\"a\":\"\\ud800\"}", "surrogate"},
      {"{\"a\":\"\n\"}", "control character"},
      {"{} x", "not valid JSON at byte 3"},
      {"{\"a\":" + std::string(100, '[') + std::string(100, ']') + "}", "nested deeper than 64 levels"},
      {std::string(2'000'000, '['), "nested deeper than 64 levels"},
  };
  for (const auto& [body, message] : cases) {
    const auto json = ParseJsonBody(body);
    ASSERT_FALSE(json.ok()) << body.substr(0, 50);
    EXPECT_THAT(std::string(json.status().message()), HasSubstr(message)) << body.substr(0, 50);
  }
  EXPECT_TRUE(ParseJsonBody("{\"a\":" + std::string(63, '[') + std::string(63, ']') + "}").ok());
}

TEST(JsonBodyTest, SizesAreBounded) {
  std::string keys = "{";
  for (size_t i = 0; i <= kMaxJsonKeys; ++i) keys += (i == 0 ? "\"k" : ",\"k") + std::to_string(i) + "\":0";
  EXPECT_THAT(std::string(ParseJsonBody(keys + "}").status().message()), HasSubstr("more than 1024 keys"));
  std::string values = "{\"a\":[0";
  for (size_t i = 0; i < kMaxJsonValues; ++i) values += ",0";
  EXPECT_THAT(std::string(ParseJsonBody(values + "]}").status().message()),
              HasSubstr("more than 1000000 values"));
}

// Mutated bodies: parsing ends with a request or an error, and errors are JSON.
TEST(RequestFuzzTest, MutatedBodies) {
  const std::string seeds[] = {
      R"({"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"é"}]}],"stop":["a"],"seed":5})",
      R"({"prompt":[[1,2],[3]],"logprobs":2,"logit_bias":{"5":1.5},"n":2,"stream":true,"temperature":0.5})"};
  const char* tokens[] = {"null",
                          "[",
                          "]",
                          "{",
                          "}",
                          "\"",
                          ",",
                          ":",
                          "1e5",
                          "-1",
                          "99999999999999999999",
                          "true",
                          "\\u0000",
                          "\xff",
                          "\"n\":",
                          "\"stop\":",
                          "\"content\":"};
  std::mt19937 random(99);
  int parsed = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string body = seeds[random() % 2];
    for (size_t n = 1 + random() % 3; n > 0; --n) {
      const size_t at = random() % (body.size() + 1);
      switch (random() % 4) {
        case 0:
          body.insert(at, tokens[random() % std::size(tokens)]);
          break;
        case 1:
          body.erase(at, 1 + random() % 6);
          break;
        case 2:
          if (at < body.size()) body[at] = static_cast<char>(32 + random() % 95);
          break;
        default:
          body.insert(at, body.substr(random() % body.size(), random() % 20));
      }
    }
    const auto json = ParseJsonBody(body);
    if (!json.ok()) continue;
    ++parsed;
    ChatRequest chat;
    CompletionRequest text;
    for (const auto& error : {ParseChatRequest(*json, RequestDefaults(), &chat),
                              ParseCompletionRequest(*json, RequestDefaults(), &text)}) {
      if (error.has_value()) {
        EXPECT_TRUE(Json::accept(error->ToJson()));
        EXPECT_EQ(error->status, 400);
      }
    }
  }
  EXPECT_GT(parsed, 2000);
}

TEST(ApiErrorTest, ShapesAndCodes) {
  const ApiError bad = BadRequest("no \xff good", "a.b", "c");
  EXPECT_EQ(
      bad.ToJson(),
      "{\"error\":{\"message\":\"no \xef\xbf\xbd good\",\"type\":\"invalid_request_error\",\"param\":\"a.b\","
      "\"code\":\"c\"}}");
  const ApiError busy = FromStatus(absl::ResourceExhaustedError("full"));
  EXPECT_EQ(busy.status, 429);
  EXPECT_EQ(busy.type, "rate_limit_error");
  EXPECT_GT(busy.retry_after, 0);
  const ApiError down = FromStatus(absl::UnavailableError("gone"));
  EXPECT_EQ(down.status, 503);
  EXPECT_GT(down.retry_after, 0);
  EXPECT_EQ(FromStatus(absl::DeadlineExceededError("late")).status, 504);
  EXPECT_EQ(FromStatus(absl::InternalError("x")).status, 500);
  const ApiError range = FromStatus(absl::OutOfRangeError("long"));
  EXPECT_EQ(range.status, 400);
  EXPECT_EQ(range.code, "context_length_exceeded");
}

}  // namespace
}  // namespace tandem::gateway
