#include "cli/flags/command_line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>

#include "cli/chat/options.h"
#include "cli/inspect/inspect.h"
#include "cli/serve/options.h"

namespace tandem::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class CommandLineTest : public ::testing::Test {
 protected:
  CommandLineTest() : line_("A test", "9.8.7") {
    AddServeFlags(line_.Add("serve", "Serve"), &serve_);
    AddChatFlags(line_.Add("chat", "Chat"), &chat_);
    AddInspectFlags(line_.Add("inspect", "Inspect"), &inspect_);
  }

  std::optional<int> Parse(const std::vector<std::string>& args) {
    return line_.Parse(
        args,
        [this](const char* name) -> const char* {
          const auto it = environment_.find(name);
          return it == environment_.end() ? nullptr : it->second.c_str();
        },
        out_, err_);
  }

  ~CommandLineTest() override { std::remove(config_.c_str()); }

  std::string WriteConfig(const std::string& text) {
    config_ = ::testing::TempDir() + "command-line-" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::ofstream(config_) << text;
    return config_;
  }

  std::string config_;

  ServeOptions serve_;
  ChatOptions chat_;
  InspectOptions inspect_;
  std::map<std::string, std::string> environment_;
  std::ostringstream out_, err_;
  CommandLine line_;
};

TEST_F(CommandLineTest, Flags) {
  ASSERT_EQ(Parse({"serve", "--model", "a.gguf", "--port=8000", "--precision", "reference", "--numa", "2"}),
            std::nullopt)
      << err_.str();
  EXPECT_EQ(line_.command(), "serve");
  EXPECT_EQ(serve_.model, "a.gguf");
  EXPECT_EQ(serve_.port, 8000);
  EXPECT_EQ(serve_.grpc_port, 10003);
  EXPECT_EQ(serve_.precision, "reference");
  EXPECT_EQ(serve_.numa, "2");
}

TEST_F(CommandLineTest, KTransformersSpellings) {
  ASSERT_EQ(
      Parse({"serve", "--gguf_path", "dir/", "--model_path", "deepseek-ai/DeepSeek-R1", "--cpu_infer", "65",
             "--port", "10002", "--web", "True", "--cache_lens", "4096", "--optimize_config_path", "x.yaml"}),
      std::nullopt)
      << err_.str();
  EXPECT_EQ(serve_.model, "dir/");
  EXPECT_EQ(serve_.model_path, "deepseek-ai/DeepSeek-R1");
  EXPECT_EQ(serve_.cpu_infer, 65);
  EXPECT_EQ(serve_.context, 4096);
  EXPECT_THAT(line_.ignored(), ElementsAre("--web", "--optimize-config-path"));
}

TEST_F(CommandLineTest, Switches) {
  ASSERT_EQ(Parse({"serve", "--no-memory-check"}), std::nullopt) << err_.str();
  EXPECT_FALSE(serve_.memory_check);
  ASSERT_EQ(Parse({"serve", "--memory_check", "True"}), std::nullopt) << err_.str();
  EXPECT_TRUE(serve_.memory_check);
  ASSERT_EQ(Parse({"serve", "--memory-check=off"}), std::nullopt) << err_.str();
  EXPECT_FALSE(serve_.memory_check);
  ASSERT_EQ(Parse({"chat", "--no-think-display", "-p", "-5 + 7?"}), std::nullopt) << err_.str();
  EXPECT_FALSE(chat_.think_display);
  EXPECT_EQ(chat_.prompt, "-5 + 7?");
}

TEST_F(CommandLineTest, ValuesMayBeEmptyOrLookLikeFlags) {
  ASSERT_EQ(Parse({"chat", "--system=", "--prompt", "--what"}), std::nullopt) << err_.str();
  EXPECT_EQ(chat_.system, "");
  EXPECT_EQ(chat_.prompt, "--what");
}

TEST_F(CommandLineTest, TheLastOfARepeatedFlagCounts) {
  ASSERT_EQ(Parse({"serve", "--port", "1", "--port", "2"}), std::nullopt) << err_.str();
  EXPECT_EQ(serve_.port, 2);
}

TEST_F(CommandLineTest, UnknownFlagNamesTheNearest) {
  EXPECT_EQ(Parse({"serve", "--prot", "10002"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("unknown flag --prot; did you mean --port?"));
}

TEST_F(CommandLineTest, UnknownCommandNamesTheNearest) {
  EXPECT_EQ(Parse({"sevre"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("unknown command \"sevre\"; did you mean serve?"));
  EXPECT_EQ(Parse({"--port", "3"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("unknown flag --port"));
}

TEST_F(CommandLineTest, BadValues) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"serve", "--port", "65536"},
                                             {"serve", "--port", "-1"},
                                             {"serve", "--port", "x"},
                                             {"serve", "--port", ""},
                                             {"serve", "--port", "99999999999999999999"},
                                             {"serve", "--port"},
                                             {"serve", "--precision", "sloppy"},
                                             {"serve", "--memory-check=perhaps"},
                                             {"serve", "stray"},
                                             {"chat", "--temperature", "nan"},
                                             {"chat", "--temperature", "2.5"},
                                             {"chat", "--max-tokens", "0"},
                                             {"inspect"},
                                             {"inspect", "a", "b"}}) {
    err_.str("");
    EXPECT_EQ(Parse(args), 2) << args.back();
    EXPECT_THAT(err_.str(), HasSubstr("tandem " + args[0]));
    if (args.size() > 1 && args[1].starts_with("--")) {
      EXPECT_THAT(err_.str(), HasSubstr(args[1].substr(0, args[1].find('='))));
    }
  }
}

TEST_F(CommandLineTest, WhatIsWrongWithANumberIsSaid) {
  EXPECT_EQ(Parse({"serve", "--port", "abc"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("--port: \"abc\" is not a whole number from 0 to 65535"));
  err_.str("");
  EXPECT_EQ(Parse({"serve", "--port", "65536"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("--port: 65536 is not in the range from 0 to 65535"));
}

// What tandem-attention and tandem-expert take, so that nothing starts only to be refused.
TEST_F(CommandLineTest, ServeRefusesWhatItsServicesWould) {
  for (const auto& [flag, good, bad] :
       std::vector<std::array<std::string, 3>>{{"--cpu-infer", "4096", "4097"},
                                               {"--ctx", "16777216", "16777217"},
                                               {"--max-batch-size", "4096", "4097"},
                                               {"--chunk-size", "65536", "65537"},
                                               {"--max-waiting", "1048576", "1048577"},
                                               {"--kv-tokens", "1073741824", "1073741825"},
                                               {"--stream-chunk-size", "65536", "65537"},
                                               {"--numa", "64", "65"},
                                               {"--numa", "auto", "0"},
                                               {"--arena", "shared-huge", "sharedhuge"},
                                               {"--stream-prefill", "off", "0"},
                                               {"--stream-prefill", "700", "many"},
                                               {"--stream-share", "100", "101"},
                                               {"--stream-share", "auto", "40%"}}) {
    err_.str("");
    EXPECT_EQ(Parse({"serve", flag, good}), std::nullopt) << err_.str();
    EXPECT_EQ(Parse({"serve", flag, bad}), 2) << flag << " " << bad;
    EXPECT_THAT(err_.str(), HasSubstr(flag + ": "));
  }
  EXPECT_THAT(err_.str(), HasSubstr("--stream-share: 40%: auto, off or a number from 0 to 100 is expected"));
}

TEST_F(CommandLineTest, EnvironmentBelowTheCommandLine) {
  environment_ = {{"TANDEM_PORT", "7000"},
                  {"TANDEM_GRPC_PORT", "7001"},
                  {"TANDEM_MEMORY_CHECK", "false"},
                  {"TANDEM_HOST", ""}};
  ASSERT_EQ(Parse({"serve", "--port", "8000"}), std::nullopt) << err_.str();
  EXPECT_EQ(serve_.port, 8000);
  EXPECT_EQ(serve_.grpc_port, 7001);
  EXPECT_FALSE(serve_.memory_check);
  EXPECT_EQ(serve_.host, "127.0.0.1");
}

TEST_F(CommandLineTest, ABadVariableIsNamed) {
  environment_ = {{"TANDEM_PORT", "many"}};
  EXPECT_EQ(Parse({"serve"}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("TANDEM_PORT"));
}

TEST_F(CommandLineTest, ConfigFileBelowTheEnvironment) {
  const std::string config =
      WriteConfig("port = 1\ngrpc-port = 2\ncpu_infer = 3\n[serve]\nnuma = 4\n[chat]\nsystem = x\n");
  environment_ = {{"TANDEM_GRPC_PORT", "20"}, {"TANDEM_CONFIG", config}};
  ASSERT_EQ(Parse({"serve", "--port", "10"}), std::nullopt) << err_.str();
  EXPECT_EQ(serve_.port, 10);
  EXPECT_EQ(serve_.grpc_port, 20);
  EXPECT_EQ(serve_.cpu_infer, 3);
  EXPECT_EQ(serve_.numa, "4");
}

TEST_F(CommandLineTest, ConfigForAllCommandsSkipsOthersFlags) {
  const std::string config = WriteConfig("numa = 4\nsystem = \"be brief\"\n");
  ASSERT_EQ(Parse({"chat", "--config", config}), std::nullopt) << err_.str();
  EXPECT_EQ(chat_.system, "be brief");
}

TEST_F(CommandLineTest, ConfigErrorsNameFileAndLine) {
  const std::string config = WriteConfig("port = 1\nprot = 2\n");
  EXPECT_EQ(Parse({"serve", "--config", config}), 2);
  EXPECT_THAT(err_.str(), HasSubstr(config + ":2: unknown flag prot; did you mean --port?"));
  WriteConfig("\nport = x\n");
  err_.str("");
  EXPECT_EQ(Parse({"serve", "--config", config}), 2);
  EXPECT_THAT(err_.str(), HasSubstr(config + ":2"));
  WriteConfig("[sevre]\nport = 1\n");
  err_.str("");
  EXPECT_EQ(Parse({"serve", "--config", config}), 2);
  EXPECT_THAT(err_.str(), HasSubstr("did you mean serve?"));
  EXPECT_EQ(Parse({"serve", "--config", "/nonexistent"}), 2);
}

TEST_F(CommandLineTest, HelpAndVersion) {
  EXPECT_EQ(Parse({"--version"}), 0);
  EXPECT_EQ(out_.str(), "tandem 9.8.7\n");
  EXPECT_EQ(Parse({"--help"}), 0);
  EXPECT_THAT(out_.str(), HasSubstr("inspect"));
  out_.str("");
  EXPECT_EQ(Parse({"serve", "--port", "1", "--help"}), 0);
  EXPECT_THAT(out_.str(), HasSubstr("--cpu-infer"));
  EXPECT_EQ(Parse({}), 2);
}

}  // namespace
}  // namespace tandem::cli
