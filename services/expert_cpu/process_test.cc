// The program as its users see it: exit codes, signals, health.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "common/rpc/channel.h"
#include "services/expert_cpu/testing/synthetic_model.h"

namespace tandem::expert {
namespace {

using ::testing::HasSubstr;
using testing::SyntheticModel;
using testing::SyntheticShape;

// A child process with its standard error in a file.
class Program {
 public:
  explicit Program(std::vector<std::string> args) {
    static int count = 0;
    log_ = ::testing::TempDir() + "/tandem_expert_log_" + std::to_string(getpid()) + "_" +
           std::to_string(count++);
    const std::string binary = std::string(std::getenv("TANDEM_BINARY_DIR")) + "/bin/tandem-expert";
    args.insert(args.begin(), binary);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    child_ = fork();
    if (child_ == 0) {
      if (freopen(log_.c_str(), "w", stderr) == nullptr) _exit(99);
      execv(binary.c_str(), argv.data());
      _exit(98);
    }
  }
  ~Program() {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    std::filesystem::remove(log_);
  }
  void Signal(int signal) { kill(child_, signal); }
  int ExitCode() {
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  std::string Log() const {
    std::ostringstream text;
    text << std::ifstream(log_).rdbuf();
    return text.str();
  }

 private:
  std::string log_;
  pid_t child_ = -1;
};

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
    Program program({"--model", model.path(), "--listen", socket_, "--threads", "2"});
    auto channel = rpc::Connect(socket_);
    ASSERT_TRUE(channel.ok());
    const absl::Status serving = rpc::WaitServing(**channel, socket_, absl::Seconds(30));
    EXPECT_TRUE(serving.ok()) << serving << "\n" << program.Log();
    program.Signal(signal);
    EXPECT_EQ(program.ExitCode(), 0) << program.Log();
    EXPECT_THAT(program.Log(), HasSubstr("loaded synthetic"));
  }
}

TEST_F(ProcessTest, SimulatedNumaNode) {
  const SyntheticModel model(SyntheticShape{});
  Program program({"--model", model.path(), "--listen", socket_, "--numa-nodes", "2", "--numa-node", "1"});
  auto channel = rpc::Connect(socket_);
  ASSERT_TRUE(channel.ok());
  EXPECT_TRUE(rpc::WaitServing(**channel, socket_, absl::Seconds(30)).ok()) << program.Log();
  program.Signal(SIGTERM);
  EXPECT_EQ(program.ExitCode(), 0);
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
    Program program(args);
    EXPECT_EQ(program.ExitCode(), 1) << expected;
    EXPECT_THAT(program.Log(), HasSubstr(expected));
  }
}

TEST_F(ProcessTest, UnknownFlagEndsWithTwo) {
  Program program({"--model", "m", "--modle", "m"});
  EXPECT_EQ(program.ExitCode(), 2);
  EXPECT_THAT(program.Log(), HasSubstr("--modle"));
}

}  // namespace
}  // namespace tandem::expert
