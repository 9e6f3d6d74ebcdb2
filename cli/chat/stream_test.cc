#include "cli/chat/stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;

struct Heard {
  std::string reasoning, answer;
};

std::string Event(const std::string& json) { return "data: " + json + "\n\n"; }

std::string Delta(const std::string& key, const std::string& text) {
  return Event(nlohmann::json({{"choices", {{{"index", 0}, {"delta", {{key, text}}}}}}}).dump());
}

AnswerStream Listen(Heard& heard) {
  return AnswerStream([&heard](AnswerStream::Part part, const std::string& text) {
    (part == AnswerStream::Part::kReasoning ? heard.reasoning : heard.answer) += text;
  });
}

TEST(ChatStream, ReasoningAndAnswerApart) {
  Heard heard;
  AnswerStream stream([&heard](AnswerStream::Part part, const std::string& text) {
    (part == AnswerStream::Part::kReasoning ? heard.reasoning : heard.answer) += text;
  });
  stream.Feed(Event(R"({"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]})"));
  stream.Feed(Delta("reasoning_content", "1 + 1") + Delta("reasoning_content", " is 2"));
  stream.Feed(Delta("content", "2"));
  stream.Feed(Event(R"({"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null})"));
  stream.Feed(Event(R"({"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9,"total_tokens":16}})"));
  stream.Feed("data: [DONE]\n\n");
  EXPECT_EQ(heard.reasoning, "1 + 1 is 2");
  EXPECT_EQ(heard.answer, "2");
  EXPECT_EQ(stream.answer(), "2");
  EXPECT_EQ(stream.finish_reason(), "stop");
  EXPECT_EQ(stream.prompt_tokens(), 7);
  EXPECT_EQ(stream.completion_tokens(), 9);
  EXPECT_EQ(stream.error(), "");
  EXPECT_THAT(stream.Speed(), HasSubstr("9 tokens"));
  EXPECT_THAT(stream.Speed(), HasSubstr("prompt 7 tokens"));
}

TEST(ChatStream, AnErrorInTheStream) {
  Heard heard;
  AnswerStream stream = Listen(heard);
  stream.Feed(Event(R"({"error":{"message":"experts are gone","type":"server_error"}})"));
  EXPECT_EQ(stream.error(), "experts are gone");
}

TEST(ChatStream, NonsenseIsAnErrorOrNothing) {
  for (const char* nonsense : {"[1]", "{", "3", "null", "\"x\""}) {
    Heard heard;
    AnswerStream stream = Listen(heard);
    stream.Feed(Event(nonsense));
    EXPECT_NE(stream.error(), "") << nonsense;
  }
  for (const char* odd : {"{}", R"({"choices":3})", R"({"choices":[3]})", R"({"choices":[{"delta":3}]})",
                          R"({"choices":[{"delta":{"content":3}}]})", R"({"usage":{"prompt_tokens":"x"}})"}) {
    Heard heard;
    AnswerStream stream = Listen(heard);
    stream.Feed(Event(odd));
    EXPECT_EQ(stream.error(), "") << odd;
    EXPECT_EQ(heard.answer, "") << odd;
  }
}

TEST(ChatRequest, SendsOnlyWhatWasSet) {
  const auto plain = nlohmann::json::parse(ChatRequest({{"user", "hi"}}, {}));
  EXPECT_EQ(plain["messages"][0]["content"], "hi");
  EXPECT_TRUE(plain["stream"]);
  EXPECT_TRUE(plain["stream_options"]["include_usage"]);
  EXPECT_FALSE(plain.contains("temperature"));
  EXPECT_FALSE(plain.contains("max_tokens"));
  ChatParameters parameters;
  parameters.model = "m";
  parameters.temperature = 0;
  parameters.seed = 5;
  parameters.max_tokens = 12;
  const auto full = nlohmann::json::parse(ChatRequest({{"system", "s"}, {"user", "hi"}}, parameters));
  EXPECT_EQ(full["temperature"], 0.0);
  EXPECT_EQ(full["seed"], 5);
  EXPECT_EQ(full["max_tokens"], 12);
  EXPECT_EQ(full["model"], "m");
  EXPECT_EQ(full["messages"].size(), 2u);
}

TEST(ChatRequest, BrokenUtf8IsReplaced) {
  const auto request = nlohmann::json::parse(ChatRequest({{"user", "a\xFF"}}, {}));
  EXPECT_EQ(request["messages"][0]["content"], "a\xEF\xBF\xBD");
}

TEST(ErrorMessage, OfAnyShape) {
  EXPECT_EQ(ErrorMessage(R"({"error":{"message":"too long"}})"), "too long");
  EXPECT_EQ(ErrorMessage(R"({"error":"flat"})"), "flat");
  EXPECT_EQ(ErrorMessage("<html>"), "<html>");
  EXPECT_EQ(ErrorMessage(""), "no message");
}

}  // namespace
}  // namespace tandem::cli
