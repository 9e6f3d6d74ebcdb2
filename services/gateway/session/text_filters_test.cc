#include <gtest/gtest.h>

#include <random>

#include "services/gateway/session/reasoning_splitter.h"
#include "services/gateway/session/stop_matcher.h"

namespace tandem::gateway {
namespace {

// Every way of cutting a text gives the same result.
std::string RunMatcher(const std::vector<std::string>& stops, const std::string& text, size_t piece,
                       bool* stopped) {
  StopMatcher matcher(stops);
  std::string out;
  for (size_t at = 0; at < text.size(); at += piece) {
    out += matcher.Push(text.substr(at, piece));
    if (matcher.stopped()) break;
  }
  if (!matcher.stopped()) out += matcher.Flush();
  *stopped = matcher.stopped();
  return out;
}

struct StopCase {
  std::vector<std::string> stops;
  std::string text;
  std::string expected;
  bool stopped;
};

TEST(StopMatcherTest, CutsBeforeTheFirstStopStringHoweverTheTextArrives) {
  const StopCase cases[] = {
      {{}, "abc", "abc", false},
      {{""}, "abc", "abc", false},
      {{"END"}, "some ENDING", "some ", true},
      {{"END"}, "some EN", "some EN", false},
      {{"END"}, "ENEND", "EN", true},
      {{"aab"}, "aaaab!", "aa", true},
      {{"\n\n"}, "line\nline\n\nrest", "line\nline", true},
      {{"bc", "abcd"}, "xabcdx", "x", true},
      {{"bc", "abcd"}, "xabcx", "xa", true},
      {{"bc", "abcd"}, "xabc", "xa", true},
      {{"END", "STOP"}, "go STOP then END", "go ", true},
      {{"ß"}, "Straße", "Stra", true},
      {{"end"}, "end", "", true},
  };
  for (const StopCase& c : cases) {
    for (size_t piece = 1; piece <= c.text.size() + 1; ++piece) {
      bool stopped = false;
      EXPECT_EQ(RunMatcher(c.stops, c.text, piece, &stopped), c.expected) << c.text << " by " << piece;
      EXPECT_EQ(stopped, c.stopped) << c.text << " by " << piece;
    }
  }
}

TEST(StopMatcherTest, GivesOutEverythingThatCannotBeAStop) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.Push("aE"), "a");
  EXPECT_EQ(matcher.held_bytes(), 1u);
  EXPECT_EQ(matcher.Push("x"), "Ex");
  EXPECT_EQ(matcher.held_bytes(), 0u);
  EXPECT_EQ(matcher.Push("END"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.Push("more"), "");
}

TEST(StopMatcherTest, AgreesWithASearchOfTheWholeText) {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    const auto word = [&random](size_t longest) {
      std::string out;
      for (size_t n = 1 + random() % longest; n > 0; --n) out += static_cast<char>('a' + random() % 2);
      return out;
    };
    std::vector<std::string> stops;
    for (size_t n = 1 + random() % 3; n > 0; --n) stops.push_back(word(4));
    const std::string text = word(24);
    size_t first = std::string::npos;
    for (const std::string& stop : stops) first = std::min(first, text.find(stop));
    bool stopped = false;
    const std::string out = RunMatcher(stops, text, 1 + random() % 4, &stopped);
    ASSERT_EQ(out, text.substr(0, first)) << text;
    ASSERT_EQ(stopped, first != std::string::npos);
  }
}

struct SplitCase {
  bool starts_inside;
  std::string text;
  std::string reasoning;
  std::string content;
};

TEST(ReasoningSplitterTest, SplitsHoweverTheTextArrives) {
  const SplitCase cases[] = {
      {false, "Hello", "", "Hello"},
      {false, " Hello \n", "", " Hello \n"},
      {false, "<think>a b</think>c", "a b", "c"},
      {false, "\n<think>\na\n\nb\n</think>\n\nc d\n", "a\n\nb", "c d\n"},
      {false, "<think>never closed ", "never closed", ""},
      {false, "<think></think>only", "", "only"},
      {false, "<thin", "", "<thin"},
      {false, "<thinking>", "", "<thinking>"},
      {false, "Say <think>x</think>", "", "Say <think>x</think>"},
      {false, "<think>a</think>b</think>c", "a", "b</think>c"},
      {false, "", "", ""},
      {false, " \n", "", " \n"},
      {true, "a</think>b", "a", "b"},
      {true, "\na</thin</think> b", "a</thin", "b"},
      {true, "<think>a</think>b", "a", "b"},
      {true, "\n<think>\na</think>b", "a", "b"},
      {true, "<thin", "<thin", ""},
      {true, "all of it", "all of it", ""},
      {true, "cut </thi", "cut </thi", ""},
      {true, "</think>\n\n", "", ""},
      {true, "", "", ""},
      {true, "日本</think>語", "日本", "語"},
  };
  for (const SplitCase& c : cases) {
    for (size_t piece = 1; piece <= c.text.size() + 1; ++piece) {
      ReasoningSplitter splitter(c.starts_inside);
      SplitText all;
      for (size_t at = 0; at < c.text.size(); at += piece) {
        const SplitText part = splitter.Push(c.text.substr(at, piece));
        all.reasoning += part.reasoning;
        all.content += part.content;
      }
      const SplitText last = splitter.Flush();
      EXPECT_EQ(all.reasoning + last.reasoning, c.reasoning) << c.text << " by " << piece;
      EXPECT_EQ(all.content + last.content, c.content) << c.text << " by " << piece;
    }
  }
}

TEST(ReasoningSplitterTest, StreamsWithoutDelay) {
  ReasoningSplitter splitter(true);
  EXPECT_EQ(splitter.Push("think").reasoning, "think");
  EXPECT_EQ(splitter.Push("ing ").reasoning, "ing");
  EXPECT_EQ(splitter.Push("more").reasoning, " more");
  EXPECT_TRUE(splitter.in_reasoning());
  EXPECT_EQ(splitter.Push("</think>").content, "");
  EXPECT_FALSE(splitter.in_reasoning());
  EXPECT_EQ(splitter.Push("\n\nyes").content, "yes");
  EXPECT_EQ(splitter.Push(" <").content, " <");
}

}  // namespace
}  // namespace tandem::gateway
