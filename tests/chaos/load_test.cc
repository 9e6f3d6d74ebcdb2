// The load generator checks every answer while the processes behind it die one after another.
#include <csignal>
#include <iostream>
#include <thread>

#include "tests/chaos/crowd.h"

namespace tandem::integration {
namespace {

TEST(LoadChaosTest, NothingIsLostAndNothingWrong) {
  StackOptions options;
  options.gateway = {"--resume-timeout", "60"};
  Stack stack(options);
  ASSERT_TRUE(stack.WaitReady());
  const std::string url = "http://127.0.0.1:" + std::to_string(stack.rest_port());
  Process bench("tandem", {"bench",  "serve",           "--url", url,
                           "--json", "--concurrency",   "12",    "--duration",
                           "8",      "--prompt-tokens", "100",   "--shared-prefix",
                           "64",     "--output-tokens", "150",   "--distinct-prompts",
                           "40",     "--verify",        "20",    "--idle-connections",
                           "100"});
  const RestClient rest = stack.rest();
  for (int round = 0; round < 2; ++round) {
    // Streams whose engine is lost count as running, too.
    ASSERT_TRUE(WaitUntil([&] {
      return rest.Get("/ready").status == 200 && rest.Metric("tandem_requests_running") >= 4;
    })) << bench.Output();
    stack.expert().Kill();
    stack.StartExpert(0);
    std::this_thread::sleep_for(std::chrono::seconds(1));
    stack.attention().Kill();
    stack.StartAttention();
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  EXPECT_EQ(bench.Wait(), 0) << bench.Output() << stack.Logs();
  const std::string out = bench.Stdout();
  const Json summary = Json::parse(out.substr(0, out.find('\n')), nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(summary.is_object()) << bench.Output();
  EXPECT_EQ(summary["good"], summary["requests"]) << bench.Output();
  EXPECT_GT(summary["good"], 40);
  EXPECT_GT(summary["repeated"], 0);
  EXPECT_EQ(summary["repeated_differing"], 0);
  EXPECT_EQ(summary["asked_again_differing"], 0);
  EXPECT_EQ(summary["idle_dropped"], 0);
  EXPECT_GT(rest.Metric("tandem_stream_resumes_total"), 0) << "the blows have fallen";
  EXPECT_TRUE(WaitIdle(stack));
}

}  // namespace
}  // namespace tandem::integration
