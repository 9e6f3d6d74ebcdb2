// `tandem bench serve` against the real server: what it reports is what was asked for, and all of it is
// right.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

using ::testing::HasSubstr;

class BenchServeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { stack_ = std::make_unique<Stack>(); }
  static void TearDownTestSuite() { stack_.reset(); }
  void SetUp() override { ASSERT_TRUE(stack_->WaitReady()); }

  // Runs it to its end and takes the first line, the summary.
  int Bench(std::vector<std::string> args) {
    const std::string url = "http://127.0.0.1:" + std::to_string(stack_->rest_port());
    args.insert(args.begin(), {"bench", "serve", "--url", url, "--json"});
    Process bench("tandem", args);
    const std::optional<int> code = bench.Wait();
    output_ = bench.Output();
    const std::string out = bench.Stdout();
    summary_ = Json::parse(out.substr(0, out.find('\n')), nullptr, /*allow_exceptions=*/false);
    return code.value_or(-1);
  }

  static std::unique_ptr<Stack> stack_;
  std::string output_;
  Json summary_;
};
std::unique_ptr<Stack> BenchServeTest::stack_;

TEST_F(BenchServeTest, ClosedLoopOfTokens) {
  ASSERT_EQ(Bench({"--concurrency", "8", "--requests", "40", "--prompt-tokens", "100", "--output-tokens",
                   "20", "--distinct-prompts", "10", "--verify", "10", "--idle-connections", "200"}),
            0)
      << output_;
  EXPECT_EQ(summary_["good"], 40);
  EXPECT_EQ(summary_["prompt_tokens"], 4000);
  EXPECT_EQ(summary_["output_tokens"], 800);
  EXPECT_EQ(summary_["repeated"], 30);
  EXPECT_EQ(summary_["repeated_differing"], 0);
  EXPECT_EQ(summary_["asked_again_differing"], 0);
  EXPECT_EQ(summary_["ideal_cached_tokens"], 30 * 96);
  EXPECT_EQ(summary_["idle_open"], 200);
}

TEST_F(BenchServeTest, ChatWithSeeds) {
  ASSERT_EQ(Bench({"--api", "chat", "--concurrency", "4", "--requests", "12", "--prompt-tokens", "120",
                   "--output-tokens", "30", "--temperature", "1", "--verify", "6"}),
            0)
      << output_;
  EXPECT_EQ(summary_["good"], 12);
  EXPECT_NEAR(summary_["prompt_tokens"].get<double>() / 12, 120, 12);
  EXPECT_EQ(summary_["asked_again"], 6);
  EXPECT_EQ(summary_["asked_again_differing"], 0);
}

TEST_F(BenchServeTest, OpenLoopOfATrace) {
  const TempFolder folder;
  std::ofstream(folder / "trace.csv") << "TIMESTAMP,ContextTokens,GeneratedTokens\n"
                                         "2023-11-16 18:15:46.6805900,374,44\n"
                                         "2023-11-16 18:15:46.9951690,396,109\n"
                                         "2023-11-16 18:15:47.2224670,879,55\n"
                                         "2023-11-16 18:15:47.3910170,9100,16\n";
  ASSERT_EQ(Bench({"--trace", folder / "trace.csv", "--length-scale", "0.5", "--verify", "4"}), 0) << output_;
  EXPECT_EQ(summary_["good"], 4);
  // The last one is cut to the model's context of 4096 less its answer.
  EXPECT_EQ(summary_["prompt_tokens"], 187 + 198 + 440 + 4088);
  EXPECT_EQ(summary_["output_tokens"], 22 + 55 + 28 + 8);
}

TEST_F(BenchServeTest, ErrorsAreToldAndCounted) {
  EXPECT_EQ(Bench({}), 2);
  EXPECT_THAT(output_, HasSubstr("--concurrency"));
  EXPECT_EQ(
      Bench({"--concurrency", "2", "--requests", "4", "--max-context", "10000", "--prompt-tokens", "5000"}),
      1);
  EXPECT_EQ(summary_["failures"]["http 400"], 4) << output_;
}

TEST(BenchServeLossTest, ARefusedClientPauses) {
  StackOptions options;
  options.gateway = {"--resume-timeout", "0"};
  Stack stack(options);
  ASSERT_TRUE(stack.WaitReady());
  const std::string url = "http://127.0.0.1:" + std::to_string(stack.rest_port());
  Process bench("tandem", {"bench", "serve", "--url", url, "--json", "--concurrency", "2", "--duration", "2",
                           "--prompt-tokens", "20", "--output-tokens", "50"});
  const RestClient rest = stack.rest();
  ASSERT_TRUE(WaitUntil([&] { return rest.Metric("tandem_requests_running") >= 1; })) << bench.Output();
  stack.attention().Kill();
  EXPECT_EQ(bench.Wait(), 1) << bench.Output();
  const std::string out = bench.Stdout();
  const Json summary = Json::parse(out.substr(0, out.find('\n')), nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(summary.is_object()) << bench.Output();
  ASSERT_TRUE(summary["failures"].contains("http 503")) << bench.Output();
  EXPECT_LE(summary["failures"]["http 503"], 2 * 21) << "each of two clients in 2 s, 0.1 s apart";
}

}  // namespace
}  // namespace tandem::integration
