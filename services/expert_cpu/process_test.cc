// The program as its users see it: exit codes, signals, health.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>

#include "common/rpc/channel.h"
#include "common/testing/process.h"
#include "services/expert_cpu/testing/synthetic_model.h"

namespace tandem::expert {
namespace {

using tandem::testing::Process;
using ::testing::HasSubstr;
using testing::SyntheticModel;
using testing::SyntheticShape;

class ProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("TANDEM_BINARY_DIR") == nullptr) GTEST_SKIP() << "TANDEM_BINARY_DIR is not set";
  }
  std::string socket_ =
      "unix:" + ::testing::TempDir() + "/tandem_expert_" + std::to_string(getpid()) + ".sock";
};

TEST_F(ProcessTest, ServesUntilSigterm) {
  const SyntheticModel model(SyntheticShape{});
  for (const int signal : {SIGTERM, SIGINT}) {
    Process program("tandem-expert", {"--model", model.path(), "--listen", socket_, "--threads", "2"});
    auto channel = rpc::Connect(socket_);
    ASSERT_TRUE(channel.ok());
    const absl::Status serving = rpc::WaitServing(**channel, socket_, absl::Seconds(30));
    EXPECT_TRUE(serving.ok()) << serving << "\n" << program.Output();
    program.Signal(signal);
    EXPECT_EQ(program.Wait(), 0) << program.Output();
    EXPECT_THAT(program.Output(), HasSubstr("loaded synthetic"));
  }
}

TEST_F(ProcessTest, SimulatedNumaNode) {
  const SyntheticModel model(SyntheticShape{});
  Process program("tandem-expert",
                  {"--model", model.path(), "--listen", socket_, "--numa-nodes", "2", "--numa-node", "1"});
  auto channel = rpc::Connect(socket_);
  ASSERT_TRUE(channel.ok());
  EXPECT_TRUE(rpc::WaitServing(**channel, socket_, absl::Seconds(30)).ok()) << program.Output();
  program.Signal(SIGTERM);
  EXPECT_EQ(program.Wait(), 0);
}

TEST_F(ProcessTest, FailuresEndWithOneAndSayWhy) {
  const SyntheticModel model(SyntheticShape{});
  const std::pair<std::vector<std::string>, std::string> cases[] = {
      {{"--model", "/no/such.gguf", "--listen", socket_}, "/no/such.gguf"},
      {{"--model", model.path(), "--listen", socket_, "--slice", "0/2"}, "into at most 1 slice"},
      {{"--model", model.path(), "--listen", socket_, "--experts", "0-5"}, "the model has [0, 4)"},
      {{"--model", model.path(), "--listen", socket_, "--numa-nodes", "2", "--numa-node", "2"},
       "--numa-node 2"},
      {{"--model", model.path(), "--listen", "unix:/no/such/folder/s"}, "/no/such/folder"},
      {{"--model", model.path(), "--listen", "127.0.0.1:0", "--tls-cert", "/no/cert", "--tls-key", "/no/key"},
       "/no/cert"}};
  for (const auto& [args, expected] : cases) {
    Process program("tandem-expert", args);
    EXPECT_EQ(program.Wait(), 1) << expected;
    EXPECT_THAT(program.Output(), HasSubstr(expected));
  }
}

TEST_F(ProcessTest, UnknownFlagEndsWithTwo) {
  Process program("tandem-expert", {"--model", "m", "--modle", "m"});
  EXPECT_EQ(program.Wait(), 2);
  EXPECT_THAT(program.Output(), HasSubstr("--modle"));
}

}  // namespace
}  // namespace tandem::expert
