// The REST interface against a scripted engine.
#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "services/gateway/testing/gateway_fixture.h"

namespace tandem::gateway {
namespace {

using ::testing::EndsWith;
using testing::FakeEngine;
using ::testing::HasSubstr;
using testing::HttpReply;
using testing::Json;
using testing::RawClient;
using ::testing::StartsWith;
using testing::Streamed;

class RestTest : public testing::GatewayFixture {};

TEST_F(RestTest, ChatAnswers) {
  Start();
  const HttpReply reply = Chat(R"("temperature":0,"max_tokens":50)");
  ASSERT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.headers.at("content-type"), "application/json");
  const Json json = Parse(reply);
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_THAT(json["id"].get<std::string>(), StartsWith("chatcmpl-"));
  EXPECT_EQ(json["model"], "tinyr1");
  EXPECT_EQ(json["system_fingerprint"], "tandem-0123456789abcdef");
  const Json& choice = json["choices"][0];
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Hello there.");
  EXPECT_EQ(choice["message"]["reasoning_content"], "hm");
  EXPECT_EQ(choice["finish_reason"], "stop");
  const v1::GenerateRequest sent = engine_->requests().at(0);
  EXPECT_EQ(sent.sampling().temperature(), 0);
  EXPECT_EQ(sent.max_new_tokens(), 50u);
  EXPECT_EQ(sent.resumed_tokens(), 0u);
  EXPECT_EQ(
      std::count(sent.prompt_tokens().begin(), sent.prompt_tokens().end(), engine_->tokenizer().bos_id()), 1);
  EXPECT_GT(sent.stop_token_ids_size(), 0);
  const size_t generated = engine_->tokenizer().Encode(FakeEngine::Script().text).size() + 1;
  EXPECT_EQ(json["usage"]["prompt_tokens"], sent.prompt_tokens_size());
  EXPECT_EQ(json["usage"]["completion_tokens"], generated);
  EXPECT_EQ(json["usage"]["total_tokens"], sent.prompt_tokens_size() + generated);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
  EXPECT_GT(json["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_LT(json["usage"]["completion_tokens_details"]["reasoning_tokens"], generated);
}

TEST_F(RestTest, ChatStreams) {
  Start();
  const HttpReply reply = Chat(R"("stream":true,"stream_options":{"include_usage":true})");
  ASSERT_EQ(reply.status, 200);
  EXPECT_THAT(reply.headers.at("content-type"), StartsWith("text/event-stream"));
  const Streamed stream = ParseStream(reply);
  EXPECT_EQ(stream.chunks.front()["choices"][0]["delta"],
            Json::parse(R"({"role":"assistant","content":""})"));
  EXPECT_EQ(stream.reasoning, "hm");
  EXPECT_EQ(stream.content, "Hello there.");
  EXPECT_EQ(stream.finish, "stop");
  EXPECT_TRUE(stream.done);
  EXPECT_EQ(stream.usage["prompt_tokens"], engine_->requests().at(0).prompt_tokens_size());
  EXPECT_TRUE(stream.chunks.back()["choices"].empty());
  for (size_t i = 0; i < stream.chunks.size(); ++i) {
    EXPECT_EQ(stream.chunks[i]["object"], "chat.completion.chunk");
    EXPECT_EQ(stream.chunks[i]["id"], stream.chunks[0]["id"]);
    EXPECT_TRUE(stream.chunks[i].contains("usage"));
  }
  EXPECT_EQ(ParseStream(Chat(R"("stream":true)")).usage, Json());
}

TEST_F(RestTest, AnswersWithoutReasoningAndReasoningWithoutAnswer) {
  Start();
  FakeEngine::Script script;
  script.text = "</think>Just this.";
  engine_->SetScript(script);
  Json message = Parse(Chat())["choices"][0]["message"];
  EXPECT_EQ(message["content"], "Just this.");
  EXPECT_FALSE(message.contains("reasoning_content"));
  script.text = "never done";
  engine_->SetScript(script);
  message = Parse(Chat())["choices"][0]["message"];
  EXPECT_EQ(message["content"], "");
  EXPECT_EQ(message["reasoning_content"], "never done");
}

TEST_F(RestTest, StopStringsAcrossTokensAreNeverSent) {
  Start();
  FakeEngine::Script script;
  script.text = "</think>one two three four";
  script.tokens_per_event = 1;
  engine_->SetScript(script);
  for (const char* mode : {"false", "true"}) {
    const HttpReply reply = Chat(R"("stop":["o thr","zzz"],"stream":)" + std::string(mode));
    if (std::string(mode) == "true") {
      const Streamed stream = ParseStream(reply);
      EXPECT_EQ(stream.content, "one tw");
      EXPECT_EQ(stream.finish, "stop");
      EXPECT_TRUE(stream.done);
    } else {
      EXPECT_EQ(Parse(reply)["choices"][0]["message"]["content"], "one tw");
      EXPECT_EQ(Parse(reply)["choices"][0]["finish_reason"], "stop");
    }
  }
  // The engine's work ends with the text.
  script.delay = std::chrono::milliseconds(5);
  script.text = "</think>stop here";
  for (int i = 0; i < 400; ++i) script.text += " and on";
  engine_->SetScript(script);
  const Json json = Parse(Chat(R"("stop":" here")"));
  EXPECT_EQ(json["choices"][0]["message"]["content"], "stop");
  EXPECT_TRUE(engine_->WaitCancelled(1));
}

TEST_F(RestTest, LengthIsTheFinishReasonAtMaxTokens) {
  Start();
  FakeEngine::Script script;
  script.text = "</think>one two three four";
  engine_->SetScript(script);
  const Json json = Parse(Chat(R"("max_completion_tokens":2)"));
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(json["usage"]["completion_tokens"], 2);
}

TEST_F(RestTest, MaxTokensAreCutToTheContext) {
  Start();
  ASSERT_EQ(Chat(R"("max_tokens":2000000000)").status, 200);
  const v1::GenerateRequest sent = engine_->requests().at(0);
  EXPECT_EQ(sent.max_new_tokens(), 4096u - static_cast<uint32_t>(sent.prompt_tokens_size()));
}

TEST_F(RestTest, SeedsAreKeptOrDrawnAnew) {
  Start();
  Chat(R"("seed":1234)");
  Chat();
  Chat();
  const auto requests = engine_->requests();
  EXPECT_EQ(requests[0].sampling().seed(), 1234u);
  EXPECT_NE(requests[1].sampling().seed(), requests[2].sampling().seed());
}

TEST_F(RestTest, SeveralChoices) {
  Start();
  const Json json = Parse(Chat(R"("n":3,"seed":10)"));
  ASSERT_EQ(json["choices"].size(), 3u);
  std::set<uint64_t> seeds;
  for (const auto& request : engine_->requests()) seeds.insert(request.sampling().seed());
  EXPECT_EQ(seeds.size(), 3u);
  EXPECT_TRUE(seeds.contains(10));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(json["choices"][i]["index"], i);
    EXPECT_EQ(json["choices"][i]["message"]["content"], "Hello there.");
  }
  EXPECT_EQ(json["usage"]["prompt_tokens"], engine_->requests()[0].prompt_tokens_size());
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 3);  // of the prompt, which counts once

  const Streamed stream = ParseStream(Chat(R"("n":2,"stream":true)"));
  std::string contents[2];
  int finished = 0;
  for (const Json& chunk : stream.chunks) {
    const Json& choice = chunk["choices"][0];
    contents[choice["index"].get<int>()] += choice["delta"].value("content", "");
    finished += choice["finish_reason"].is_string() ? 1 : 0;
  }
  EXPECT_EQ(contents[0], "Hello there.");
  EXPECT_EQ(contents[1], "Hello there.");
  EXPECT_EQ(finished, 2);
  EXPECT_TRUE(stream.done);
}

TEST_F(RestTest, ChatLogprobs) {
  Start();
  FakeEngine::Script script;
  script.text = "I see.</think>\n\nHello there.";
  engine_->SetScript(script);
  const Json logprobs = Parse(Chat(R"("logprobs":true,"top_logprobs":2)"))["choices"][0]["logprobs"];
  std::string text, thought;
  for (const auto& [list, to] : {std::pair("content", &text), std::pair("reasoning_content", &thought)}) {
    for (const Json& token : logprobs[list]) {
      *to += token["token"].get<std::string>();
      EXPECT_FLOAT_EQ(token["logprob"], -0.25f);
      EXPECT_EQ(token["top_logprobs"].size(), 2u);
      EXPECT_EQ(token["bytes"].size(), token["token"].get<std::string>().size());
    }
  }
  EXPECT_EQ(text, "Hello there.");           // as in the message
  EXPECT_EQ(thought, "I see.</think>\n\n");  // and every other token that was generated
  // Streamed, with a stop string: the tokens of the stop string stay away.
  const Streamed stream = ParseStream(Chat(R"("logprobs":true,"stream":true,"stop":"there")"));
  text.clear();
  for (const Json& chunk : stream.chunks) {
    const Json& part = chunk["choices"][0]["logprobs"];
    if (part.is_object()) {
      for (const Json& token : part["content"]) text += token["token"].get<std::string>();
    }
  }
  EXPECT_THAT(text, StartsWith("Hello"));
  EXPECT_EQ(text.find("there"), std::string::npos);
}

// Streamed or not, with tokens that are cut within a character, and held back for a stop string.
TEST_F(RestTest, TextOffsetsAreOfCharacters) {
  Start();
  FakeEngine::Script script;
  script.text = "né 日本 🙂 the thé thing";
  engine_->SetScript(script);
  for (const char* stop : {"", R"(,"stop":["thing"])", R"(,"stop":["th"])"}) {
    const std::string body = absl::StrCat(R"({"prompt":"a","max_tokens":100,"logprobs":2)", stop);
    const Json whole = Parse(Call("POST", "/v1/completions", body + "}"))["choices"][0];
    const std::string text = whole["text"];
    std::vector<size_t> starts;  // of the text's characters, in bytes
    for (size_t i = 0; i < text.size(); ++i) {
      if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) starts.push_back(i);
    }
    const Json& logprobs = whole["logprobs"];
    ASSERT_GT(logprobs["tokens"].size(), 5u);
    size_t bytes = 0;
    for (size_t i = 0; i < logprobs["tokens"].size(); ++i) {
      const std::string token = logprobs["tokens"][i];
      // The character that the token is of, or goes on with.
      const auto next = std::upper_bound(starts.begin(), starts.end(), bytes);
      EXPECT_EQ(logprobs["text_offset"][i], next - starts.begin() - 1) << token;
      bytes += token.starts_with("bytes:") ? (token.size() - 6) / 4 : token.size();
      EXPECT_TRUE(logprobs["top_logprobs"][i].contains(token)) << token;
    }
    Json offsets = Json::array();
    for (const Json& chunk :
         ParseStream(Call("POST", "/v1/completions", body + R"(,"stream":true})")).chunks) {
      const Json& part = chunk["choices"][0]["logprobs"];
      if (!part.is_object()) continue;
      for (const Json& at : part["text_offset"]) offsets.push_back(at);
    }
    EXPECT_EQ(offsets, logprobs["text_offset"]);
  }
}

TEST_F(RestTest, SeedsOfChoicesAreFarApart) {
  Start();
  std::vector<uint64_t> seeds;
  for (const int seed : {5, 6}) {
    Chat(absl::StrCat(R"("n":2,"seed":)", seed));
    const auto requests = engine_->requests();
    ASSERT_EQ(requests.size(), seeds.size() + 2);
    for (size_t i = requests.size() - 2; i < requests.size(); ++i)
      seeds.push_back(requests[i].sampling().seed());
  }
  std::sort(seeds.begin(), seeds.end());
  EXPECT_EQ(seeds[0], 5u);  // the first choice is what the request would be alone
  EXPECT_EQ(seeds[1], 6u);
  EXPECT_GT(seeds[2], 1u << 20);
  EXPECT_NE(seeds[2], seeds[3]);
  // Each prompt's first choice likewise.
  Call("POST", "/v1/completions", R"({"prompt":["a","b"],"seed":9,"max_tokens":1})");
  EXPECT_EQ(engine_->requests().back().sampling().seed(), 9u);
}

// Nothing comes for a while: the head, then comments, and the answer as ever.
TEST_F(RestTest, StreamsShowSignsOfLife) {
  options_.stream_head_after = absl::Milliseconds(50);
  options_.stream_comment_after = absl::Milliseconds(50);
  Start();
  FakeEngine::Script script;
  script.text = "</think>Hi";
  script.delay = std::chrono::milliseconds(300);
  engine_->SetScript(script);
  const HttpReply reply = Chat(R"("stream":true)");
  EXPECT_EQ(reply.status, 200);
  const size_t role = reply.body.find(R"("role":"assistant")"), comment = reply.body.find(": keep-alive\n\n");
  EXPECT_LT(role, comment);
  ASSERT_NE(comment, std::string::npos);
  EXPECT_LT(comment, reply.body.find("Hi"));
  EXPECT_THAT(reply.body, EndsWith("data: [DONE]\n\n"));
}

TEST_F(RestTest, CompletionsOfStringsAndTokens) {
  Start();
  FakeEngine::Script script;
  script.text = "<think>x</think> y";
  engine_->SetScript(script);
  Json json = Parse(Call("POST", "/v1/completions", R"({"prompt":"Say y:","max_tokens":100})"));
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_THAT(json["id"].get<std::string>(), StartsWith("cmpl-"));
  EXPECT_EQ(json["choices"][0]["text"], "<think>x</think> y");
  EXPECT_EQ(engine_->requests()[0].prompt_tokens(0), engine_->tokenizer().bos_id());

  json = Parse(Call("POST", "/v1/completions", R"({"prompt":["a","b"],"echo":true,"max_tokens":100})"));
  ASSERT_EQ(json["choices"].size(), 2u);
  EXPECT_EQ(json["choices"][0]["text"], "a<think>x</think> y");
  EXPECT_EQ(json["choices"][1]["text"], "b<think>x</think> y");

  const HttpReply tokens =
      Call("POST", "/v1/completions", R"({"prompt":[5,6,7],"logprobs":1,"max_tokens":2})");
  json = Parse(tokens);
  const v1::GenerateRequest sent = engine_->requests().back();
  EXPECT_EQ(std::vector<int32_t>(sent.prompt_tokens().begin(), sent.prompt_tokens().end()),
            (std::vector<int32_t>{5, 6, 7}));
  EXPECT_EQ(json["choices"][0]["logprobs"]["tokens"].size(), 2u);
  EXPECT_EQ(json["choices"][0]["logprobs"]["text_offset"][0], 0);

  const Streamed stream = ParseStream(
      Call("POST", "/v1/completions", R"({"prompt":"q","echo":true,"stream":true,"max_tokens":100})"));
  EXPECT_EQ(stream.text, "q<think>x</think> y");
  EXPECT_TRUE(stream.done);
}

TEST_F(RestTest, UnicodeArrivesWholeHoweverTokensCutIt) {
  Start();
  FakeEngine::Script script;
  const std::string text = "Grüße 日本語 🙂🙃 кириллица ελληνικά 한국어 ẞ";
  script.text = "</think>" + text;
  engine_->SetScript(script);
  EXPECT_EQ(ParseStream(Chat(R"("stream":true)")).content, text);
  EXPECT_EQ(Parse(Chat())["choices"][0]["message"]["content"], text);
}

TEST_F(RestTest, ModelsAndHelpers) {
  Start();
  Json json = Parse(Call("GET", "/v1/models"));
  EXPECT_EQ(json["data"][0]["id"], "tinyr1");
  EXPECT_EQ(Parse(Call("GET", "/v1/models/tinyr1"))["id"], "tinyr1");
  EXPECT_EQ(Parse(Call("GET", "/v1/models/TinyR%31"))["id"], "tinyr1");
  ExpectError(Call("GET", "/v1/models/gpt-4"), 404, "invalid_request_error", "model", "model_not_found",
              "served is 'tinyr1'");

  json = Parse(Call("POST", "/tokenize",
                    R"({"content":"Hello <｜User｜>","add_special":true,"parse_special":false})"));
  std::vector<int32_t> tokens = json["tokens"];
  EXPECT_EQ(tokens.at(0), engine_->tokenizer().bos_id());
  tokens.erase(tokens.begin());
  json = Parse(Call("POST", "/detokenize", Json({{"tokens", tokens}}).dump()));
  EXPECT_EQ(json["content"], "Hello <｜User｜>");
  json = Parse(Call("POST", "/apply-template", R"({"messages":[{"role":"user","content":"hi"}]})"));
  EXPECT_THAT(json["prompt"].get<std::string>(), HasSubstr("<｜User｜>hi<｜Assistant｜>"));

  ExpectError(Call("POST", "/tokenize", "{}"), 400, "invalid_request_error", "content", "missing_field",
              "missing");
  ExpectError(Call("POST", "/tokenize", R"({"content":5})"), 400, "invalid_request_error", "content",
              "invalid_type", "a string");
  ExpectError(Call("POST", "/detokenize", R"({"tokens":[1,99999]})"), 400, "invalid_request_error",
              "tokens[1]", "out_of_range", "not 99999");
  ExpectError(Call("POST", "/detokenize", R"({"tokens":["a"]})"), 400, "invalid_request_error", "tokens[0]",
              "invalid_type", "a token id");
  ExpectError(Call("POST", "/apply-template", R"({"messages":[]})"), 400, "invalid_request_error", "messages",
              "invalid_value", "empty");

  EXPECT_EQ(Call("GET", "/health").body, R"({"status":"ok"})");
  EXPECT_EQ(Call("GET", "/ready").status, 200);
  EXPECT_EQ(Call("HEAD", "/health").status, 200);
  EXPECT_THAT(Call("GET", "/").body, HasSubstr("<code>tinyr1</code>"));
}

TEST_F(RestTest, BadRequestsAreExplainedAndTheServerServesOn) {
  Start();
  const std::string chat = "/v1/chat/completions";
  ExpectError(Call("POST", chat, R"({"messages":[)"), 400, "invalid_request_error", "", "invalid_json",
              "not valid JSON at byte 13 (line 1, column 14)");
  ExpectError(Call("POST", chat, ""), 400, "invalid_request_error", "", "invalid_json", "empty");
  ExpectError(Call("POST", chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}"), 400,
              "invalid_request_error", "", "invalid_json", "ill-formed UTF-8");
  ExpectError(Chat(R"("model":"gpt-4")"), 404, "invalid_request_error", "model", "model_not_found",
              "'gpt-4'");
  EXPECT_EQ(Chat(R"("model":"TinyR1")").status, 200);
  ExpectError(Chat(R"("max_tokens":-1)"), 400, "invalid_request_error", "max_tokens", "out_of_range",
              "not -1");
  ExpectError(Chat(R"("logit_bias":{"99999":1})"), 400, "invalid_request_error", "logit_bias", "out_of_range",
              "99999");
  std::string lots;
  for (int i = 0; i < 5000; ++i) lots += "many words ";
  ExpectError(Call("POST", chat, R"({"messages":[{"role":"user","content":")" + lots + "\"}]}"), 400,
              "invalid_request_error", "messages", "context_length_exceeded", "context is 4096 tokens");
  ExpectError(Call("POST", "/v1/completions", R"({"prompt":[99999]})"), 400, "invalid_request_error",
              "prompt", "invalid_value", "token 0 of the prompt is 99999");
  ExpectError(Call("POST", "/v1/completions", R"({"prompt":[[]]})"), 400, "invalid_request_error", "prompt",
              "invalid_value", "the prompt is empty");
  ExpectError(Call("GET", "/nothing"), 404, "invalid_request_error", "", "not_found", "GET /nothing");
  const HttpReply method = Call("GET", chat);
  ExpectError(method, 405, "invalid_request_error", "", "method_not_allowed", "allowed: POST");
  EXPECT_EQ(method.headers.at("allow"), "POST");
  EXPECT_EQ(Call("DELETE", "/v1/models").headers.at("allow"), "GET, HEAD");
  RawClient raw(gateway_->http_port());
  raw.Send("nonsense\r\n\r\n");
  ExpectError(raw.ReadReply(), 400, "invalid_request_error", "", "bad_request", "malformed HTTP request");
  EXPECT_EQ(Chat().status, 200);
}

TEST_F(RestTest, ApiKeyAndCors) {
  options_.api_key = "sesame";
  options_.cors = true;
  Start();
  const HttpReply none = Chat();
  ExpectError(none, 401, "invalid_request_error", "", "invalid_api_key", "an API key is needed");
  EXPECT_EQ(none.headers.at("access-control-allow-origin"), "*");
  ExpectError(Chat("", "Authorization: Bearer sesam\r\n"), 401, "invalid_request_error", "",
              "invalid_api_key", "wrong");
  ExpectError(Chat("", "Authorization: Bearer sesamesesame\r\n"), 401, "invalid_request_error", "",
              "invalid_api_key", "wrong");
  EXPECT_EQ(Chat("", "Authorization: Bearer sesame\r\n").status, 200);
  EXPECT_EQ(Chat("", "Authorization: bearer  sesame\r\n").status, 200);
  EXPECT_EQ(Call("GET", "/health").status, 200);
  const HttpReply preflight =
      Call("OPTIONS", "/v1/chat/completions", "", "Access-Control-Request-Headers: authorization\r\n");
  EXPECT_EQ(preflight.status, 204);
  EXPECT_EQ(preflight.headers.at("access-control-allow-headers"), "authorization");
}

TEST_F(RestTest, OneConnectionManyKindsOfRequests) {
  Start();
  RawClient client(gateway_->http_port());
  std::string wire;
  for (int i = 0; i < 5; ++i) {
    wire += Wire("POST", "/v1/chat/completions", ChatBody(R"("stream":true)"));
    wire += Wire("POST", "/v1/chat/completions", ChatBody(R"("n":0)"));
    wire += Wire("GET", "/health", "");
  }
  client.Send(wire);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(ParseStream(client.ReadReply()).content, "Hello there.");
    EXPECT_EQ(client.ReadReply().status, 400);
    EXPECT_EQ(client.ReadReply().status, 200);
  }
}

}  // namespace
}  // namespace tandem::gateway
