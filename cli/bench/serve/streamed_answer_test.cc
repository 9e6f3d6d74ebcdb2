#include "cli/bench/serve/streamed_answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatNear;
using ::testing::HasSubstr;
using Clock = StreamedAnswer::Clock;
using std::chrono::milliseconds;

std::string Event(const std::string& data) { return "data: " + data + "\n\n"; }
std::string Text(const std::string& text) {
  return Event(R"({"id":"c","choices":[{"index":0,"text":")" + text + R"(","finish_reason":null}]})");
}
std::string End(const std::string& reason) {
  return Event(R"({"id":"c","choices":[{"index":0,"text":"","finish_reason":")" + reason + R"("}]})");
}
std::string Usage(int prompt, int completion, int cached = 0) {
  return Event(R"({"id":"c","choices":[],"usage":{"prompt_tokens":)" + std::to_string(prompt) +
               R"(,"completion_tokens":)" + std::to_string(completion) + R"(,"total_tokens":)" +
               std::to_string(prompt + completion) + R"(,"prompt_tokens_details":{"cached_tokens":)" +
               std::to_string(cached) + "}}}");
}
const std::string kDone = Event("[DONE]");

ExpectedAnswer Expected(int64_t max_tokens = 3) {
  return {.chat = false, .max_tokens = max_tokens, .exact = true, .prompt_tokens = 10};
}

std::string Kind(const std::string& stream, ExpectedAnswer expected = Expected(), bool whole = true) {
  StreamedAnswer answer(expected);
  answer.Feed(stream, Clock::now());
  const auto fault = answer.Finish(whole);
  return fault.has_value() ? fault->kind + ": " + fault->detail : "good";
}

const std::string kGood = Text("a") + Text("b") + Text("c") + End("length") + Usage(10, 3, 8) + kDone;

TEST(StreamedAnswer, PiecesMayBeCutAnywhere) {
  for (const char* end_of_line : {"\n", "\r\n"}) {
    std::string stream;
    for (const char c : kGood) stream += c == '\n' ? std::string(end_of_line) : std::string(1, c);
    for (size_t size = 1; size <= stream.size(); ++size) {
      StreamedAnswer answer(Expected());
      for (size_t i = 0; i < stream.size(); i += size) {
        answer.Feed(std::string_view(stream).substr(i, size), Clock::now());
      }
      const auto fault = answer.Finish(true);
      EXPECT_FALSE(fault.has_value()) << fault->detail;
      EXPECT_EQ(answer.text(), "abc");
      EXPECT_EQ(answer.prompt_tokens(), 10);
      EXPECT_EQ(answer.cached_tokens(), 8);
      EXPECT_EQ(answer.completion_tokens(), 3);
    }
  }
}

TEST(StreamedAnswer, Times) {
  StreamedAnswer answer(Expected());
  const Clock::time_point start = Clock::now();
  answer.Feed(": the server is busy\n\n", start);
  EXPECT_FALSE(answer.first().has_value());
  answer.Feed(Text("a"), start + milliseconds(5));
  answer.Feed(Text("b").substr(0, 20), start + milliseconds(7));
  answer.Feed(Text("b").substr(20), start + milliseconds(15));  // the moment it is whole counts
  answer.Feed(Text(""), start + milliseconds(16));              // no text, no moment
  answer.Feed(Text("c") + End("length") + Usage(10, 3) + kDone, start + milliseconds(45));
  EXPECT_FALSE(answer.Finish(true).has_value());
  EXPECT_EQ(answer.first(), start + milliseconds(5));
  EXPECT_EQ(answer.last(), start + milliseconds(45));
  EXPECT_THAT(answer.gaps(), ElementsAre(FloatNear(0.010f, 1e-6f), FloatNear(0.030f, 1e-6f)));
}

TEST(StreamedAnswer, AnAnswerWithoutTextHasItsEnd) {
  StreamedAnswer answer(Expected(1));
  answer.Feed(End("length") + Usage(10, 1) + kDone, Clock::now());
  EXPECT_FALSE(answer.Finish(true).has_value());
  EXPECT_TRUE(answer.first().has_value());
}

TEST(StreamedAnswer, Chat) {
  ExpectedAnswer expected = Expected();
  expected.chat = true;
  const auto delta = [](const std::string& part) {
    return Event(R"({"id":"c","choices":[{"index":0,"delta":)" + part + R"(,"finish_reason":null}]})");
  };
  const std::string end =
      Event(R"({"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"length"}],"usage":null})");
  StreamedAnswer answer(expected);
  answer.Feed(delta(R"({"role":"assistant","content":null})") + delta(R"({"reasoning_content":"hm"})") +
                  delta(R"({"content":"yes"})") + end + Usage(11, 3) + kDone,
              Clock::now());
  EXPECT_FALSE(answer.Finish(true).has_value());
  EXPECT_EQ(answer.text(), "hmyes");
  EXPECT_EQ(answer.gaps().size(), 1u);
  EXPECT_THAT(Kind(Text("a"), expected), HasSubstr("without \"delta\""));
}

TEST(StreamedAnswer, WhatIsWrongIsSaid) {
  EXPECT_EQ(Kind(kGood), "good");
  const std::string begin = Text("a") + Text("b") + Text("c"), end = End("length") + Usage(10, 3) + kDone;
  EXPECT_THAT(Kind(begin + "data: {oops\n\n" + end), HasSubstr("malformed stream: an event is no JSON"));
  EXPECT_THAT(Kind(begin + Event("[1]") + end), HasSubstr("malformed stream"));
  EXPECT_THAT(Kind(begin + Event(R"({"id":"other","choices":[]})") + end), HasSubstr("another id"));
  EXPECT_THAT(Kind(begin + Event(R"({"id":"c"})") + end), HasSubstr("\"choices\""));
  EXPECT_THAT(Kind(begin + Event(R"({"id":"c","choices":[{"text":5}]})") + end),
              HasSubstr("text that is none"));
  EXPECT_THAT(Kind(Text("a") + Event(R"({"error":{"message":"it broke"}})") + kDone),
              HasSubstr("error event: it broke"));
  EXPECT_THAT(Kind(begin + End("length") + Text("d") + Usage(10, 3) + kDone),
              HasSubstr("text after finish_reason"));
  EXPECT_THAT(Kind(begin + End("length") + end), HasSubstr("comes twice"));
  EXPECT_THAT(Kind(begin + end + Text("d")), HasSubstr("after [DONE]"));
  EXPECT_THAT(Kind(begin + end + kDone), HasSubstr("after [DONE]"));
  EXPECT_THAT(Kind(begin + Usage(10, 3) + kDone),
              HasSubstr("wrong end: the stream ended without finish_reason"));
  EXPECT_THAT(Kind(begin + End("length") + Usage(10, 3)),
              HasSubstr("wrong end: the stream ended without [DONE]"));
  EXPECT_THAT(Kind(begin + End("tired") + Usage(10, 3) + kDone), HasSubstr("finish_reason is tired"));
  EXPECT_THAT(Kind(begin, Expected(), /*whole=*/false), HasSubstr("cut off: the connection ended after 3"));
  EXPECT_THAT(Kind(kGood.substr(0, kGood.size() - 1)),
              HasSubstr("without [DONE]"));  // its empty line is missing
}

TEST(StreamedAnswer, CountsMustAgree) {
  const std::string begin = Text("a") + Text("b") + Text("c"), length = End("length");
  EXPECT_THAT(Kind(begin + length + kDone), HasSubstr("wrong usage: none"));
  EXPECT_EQ(Kind(begin + length + Usage(11, 3) + kDone), "good");  // with a BOS
  EXPECT_THAT(Kind(begin + length + Usage(12, 3) + kDone), HasSubstr("10 prompt tokens were sent and 12"));
  EXPECT_THAT(Kind(begin + length + Usage(9, 3) + kDone), HasSubstr("and 9 counted"));
  EXPECT_THAT(Kind(begin + length + Usage(10, 3, 12) + kDone), HasSubstr("12 of 10 tokens were cached"));
  EXPECT_THAT(Kind(begin + length + Usage(10, 4) + kDone), HasSubstr("4 tokens came where 3"));
  EXPECT_THAT(Kind(begin + length + Usage(10, 1) + kDone), HasSubstr("3 pieces of text came and 1"));
  EXPECT_THAT(Kind(begin + length + Usage(10, 2) + kDone), HasSubstr("finish_reason is length after 2 of 3"));
  EXPECT_THAT(Kind(begin + End("stop") + Usage(10, 2) + kDone),
              HasSubstr("finish_reason is stop after 2 of 3"));
  ExpectedAnswer may_stop = Expected();
  may_stop.exact = false;
  EXPECT_EQ(Kind(begin + End("stop") + Usage(10, 2) + kDone, may_stop), "good");
  EXPECT_THAT(Kind(begin + length + Usage(10, 2) + kDone, may_stop), HasSubstr("length after 2"));
  EXPECT_THAT(
      Kind(
          begin + length +
          Event(
              R"({"id":"c","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":3,"total_tokens":9}})") +
          kDone),
      HasSubstr("the total is not the sum"));
  EXPECT_THAT(Kind(begin + length + Event(R"({"id":"c","choices":[],"usage":{"prompt_tokens":-1}})") + kDone),
              HasSubstr("it lacks counts"));
}

}  // namespace
}  // namespace tandem::cli
