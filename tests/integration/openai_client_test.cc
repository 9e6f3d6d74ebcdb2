// A stock client against the stack: tests/conformance/openai_client.mjs.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

constexpr int kSkipped = 77;

TEST(OpenAiClientTest, AllAsExpected) {
  const char* modules = std::getenv("TANDEM_NODE_MODULES");
  if (modules == nullptr || *modules == '\0') {
    GTEST_SKIP() << "TANDEM_NODE_MODULES does not name a node_modules folder with the package openai";
  }
  if (std::system("command -v node >/dev/null") != 0) GTEST_SKIP() << "node is not installed";
  Stack stack;
  ASSERT_TRUE(stack.WaitReady());
  const std::string port = stack.gateway().WaitForOutput("HTTP on .*:([0-9]+)").value_or("");
  // Handed on by hand: Process gives its children no TANDEM_ variables.
  Process client("/usr/bin/env",
                 {std::string("TANDEM_NODE_MODULES=") + modules, "node",
                  SourcePath("tests/conformance/openai_client.mjs"), "http://127.0.0.1:" + port + "/v1"});
  const std::optional<int> code = client.Wait();
  if (code == kSkipped) GTEST_SKIP() << client.Output();
  EXPECT_EQ(code, 0) << client.Output();
  EXPECT_TRUE(WaitUntil([&] { return stack.attention_metrics().Metric("tandem_requests_running") == 0; }));
}

}  // namespace
}  // namespace tandem::integration
