#include "common/flags/sources.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>

namespace tandem::flags {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Values {
  std::string text = "default";
  int number = 0;
  bool flag = false;
  std::vector<std::string> list;
};

class SourcesTest : public ::testing::Test {
 protected:
  ~SourcesTest() override {
    for (const char* name :
         {"TANDEM_CONFIG", "TANDEM_SOME_TEXT", "TANDEM_NUMBER", "TANDEM_FLAG", "TANDEM_LIST"}) {
      unsetenv(name);
    }
    std::remove(file_.c_str());
  }

  std::string WriteFile(const std::string& text) {
    std::ofstream(file_) << text;
    return file_;
  }

  // What went wrong; empty: nothing.
  std::string Parse(std::vector<std::string> words) {
    values_ = Values();
    CLI::App app("test");
    app.add_option("--some-text,--alias", values_.text);
    app.add_option("--number", values_.number)->check(CLI::Range(0, 9));
    app.add_flag("--flag", values_.flag);
    app.add_option("--list", values_.list)->delimiter(',');
    AddEnvironmentAndFile(app);
    std::reverse(words.begin(), words.end());  // as CLI11 wants a vector
    try {
      app.parse(words);
    } catch (const CLI::ParseError& error) {
      return std::string(error.what()).empty() ? "?" : error.what();
    }
    return "";
  }

  const std::string file_ = ::testing::TempDir() + "flags_sources_" + std::to_string(getpid());
  Values values_;
};

TEST_F(SourcesTest, TheCommandLineBeatsTheEnvironmentBeatsTheFile) {
  const std::string file =
      WriteFile("some-text = \"file\"\nnumber = 1\nlist = [\"f\", \"g\"]\nflag = true\n");
  EXPECT_EQ(Parse({"--config", file}), "");
  EXPECT_EQ(values_.text, "file");
  EXPECT_EQ(values_.number, 1);
  EXPECT_TRUE(values_.flag);
  EXPECT_THAT(values_.list, ElementsAre("f", "g"));

  setenv("TANDEM_SOME_TEXT", "environment", 1);
  setenv("TANDEM_NUMBER", "2", 1);
  setenv("TANDEM_LIST", "e", 1);
  setenv("TANDEM_FLAG", "false", 1);
  EXPECT_EQ(Parse({"--config", file}), "");
  EXPECT_EQ(values_.text, "environment");
  EXPECT_EQ(values_.number, 2);
  EXPECT_FALSE(values_.flag);
  EXPECT_THAT(values_.list, ElementsAre("e")) << "lists of two sources are not joined";

  EXPECT_EQ(Parse({"--config", file, "--alias", "line", "--number", "3", "--flag", "--list", "l,m"}), "");
  EXPECT_EQ(values_.text, "line");
  EXPECT_EQ(values_.number, 3);
  EXPECT_TRUE(values_.flag);
  EXPECT_THAT(values_.list, ElementsAre("l", "m"));
}

TEST_F(SourcesTest, AnEmptyVariableIsNotSet) {
  setenv("TANDEM_NUMBER", "", 1);
  EXPECT_EQ(Parse({"--config", WriteFile("number = 4\n")}), "");
  EXPECT_EQ(values_.number, 4);
}

TEST_F(SourcesTest, TheFileMayBeNamedByTheEnvironment) {
  setenv("TANDEM_CONFIG", WriteFile("number = 5\n").c_str(), 1);
  EXPECT_EQ(Parse({}), "");
  EXPECT_EQ(values_.number, 5);
  setenv("TANDEM_CONFIG", "/nonexistent/file", 1);
  EXPECT_THAT(Parse({}), HasSubstr("/nonexistent/file"));
  EXPECT_EQ(Parse({"--config", file_}), "") << "the command line names another";
  EXPECT_EQ(values_.number, 5);
}

TEST_F(SourcesTest, TheFileMayBeginWithAByteOrderMarkAndHaveSingleQuotes) {
  EXPECT_EQ(Parse({"--config", WriteFile("\xEF\xBB\xBFnumber = 6\nsome-text = 'a b'\n")}), "");
  EXPECT_EQ(values_.number, 6);
  EXPECT_EQ(values_.text, "a b");
}

TEST_F(SourcesTest, MistakesInTheFileAreErrors) {
  EXPECT_THAT(Parse({"--config", "/nonexistent/file"}), HasSubstr("/nonexistent/file"));
  EXPECT_THAT(Parse({"--config", WriteFile("numbre = 4\n")}), HasSubstr("numbre"));
  EXPECT_THAT(Parse({"--config", WriteFile("number = 40\n")}), HasSubstr("--number"));
  setenv("TANDEM_NUMBER", "many", 1);
  EXPECT_THAT(Parse({}), HasSubstr("many"));
}

TEST(EnvironmentNameTest, IsTheFlagInCapitals) {
  EXPECT_EQ(EnvironmentName("max-batch-size"), "TANDEM_MAX_BATCH_SIZE");
}

}  // namespace
}  // namespace tandem::flags
