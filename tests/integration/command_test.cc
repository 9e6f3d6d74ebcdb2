// The `tandem` command as users meet it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "common/testing/process.h"
#include "tests/integration/rest_client.h"

namespace tandem::integration {
namespace {

using testing::BinaryPath;
using testing::DemoModel;
using testing::Process;
using testing::TempFolder;
using testing::WaitUntil;

using ::testing::AnyOf;
using ::testing::Eq;
using ::testing::HasSubstr;

// Processes that were started with `word` in an argument, by pid and name.
std::vector<std::pair<pid_t, std::string>> ProcessesWith(const std::string& word) {
  std::vector<std::pair<pid_t, std::string>> out;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string pid = entry.path().filename().string();
    if (!std::all_of(pid.begin(), pid.end(), [](unsigned char c) { return std::isdigit(c) != 0; })) continue;
    std::ostringstream line;
    line << std::ifstream(entry.path() / "cmdline", std::ios::binary).rdbuf();
    const std::string arguments = line.str();
    if (arguments.find(word) == std::string::npos) continue;
    const std::string program = arguments.substr(0, arguments.find('\0'));
    out.emplace_back(std::stoi(pid), std::filesystem::path(program).filename().string());
  }
  return out;
}

pid_t PidOf(const std::string& program, const std::string& word) {
  for (const auto& [pid, name] : ProcessesWith(word)) {
    if (name == program) return pid;
  }
  return -1;
}

// `tandem serve` on free ports. The model's path is one of its own, by which all of its processes are known.
class Server {
 public:
  explicit Server(const std::string& model_flag = "--model", const std::vector<std::string>& more = {}) {
    std::filesystem::create_symlink(DemoModel(), model());
    std::vector<std::string> args = {
        "serve", model_flag, model(), "--port", "0", "--grpc-port", "0", "--metrics-base-port", "0"};
    args.insert(args.end(), more.begin(), more.end());
    process_ = std::make_unique<Process>("tandem", args);
  }
  ::testing::AssertionResult WaitReady() {
    const auto port = process_->WaitForOutput("Tandem is ready .* at http://[^ ]*:([0-9]+),");
    if (!port.has_value()) return ::testing::AssertionFailure() << "not ready\n" << process_->Output();
    port_ = std::atoi(port->c_str());
    return ::testing::AssertionSuccess();
  }
  RestClient rest() const { return RestClient(port_); }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  Process& process() { return *process_; }
  std::string model() const { return folder_ / "model.gguf"; }
  std::vector<std::pair<pid_t, std::string>> processes() const { return ProcessesWith(folder_.path()); }
  // Of the expert and attention processes; the gateway has no model.
  pid_t Pid(const std::string& program) const { return PidOf(program, folder_.path()); }

 private:
  TempFolder folder_;
  std::unique_ptr<Process> process_;
  int port_ = 0;
};

TEST(ServeTest, AnswersHealsAndStops) {
  Server server;
  ASSERT_TRUE(server.WaitReady());
  const RestClient rest = server.rest();
  const Answer first = rest.Ask(Question("What is 12 + 34?"));
  ASSERT_EQ(first.content, "12 + 34 = 46.") << first.ToString();
  const std::string sockets =
      server.process().WaitForOutput("engine unix:([^ ]*)/attention.sock").value_or("");
  EXPECT_TRUE(std::filesystem::is_directory(sockets)) << sockets;

  const Answer undisturbed = rest.Stream(LongQuestion(1000));
  ASSERT_TRUE(undisturbed.ok()) << undisturbed.ToString();
  for (const std::string name : {"expert", "attention"}) {
    bool killed = false;
    const Answer answer = rest.Stream(LongQuestion(1000), [&](int events) {
      if (!killed && events > 10) killed = kill(server.Pid("tandem-" + name), SIGKILL) == 0;
      return true;
    });
    EXPECT_TRUE(killed) << name;
    EXPECT_TRUE(answer.ok()) << answer.ToString();
    EXPECT_EQ(answer.content, undisturbed.content) << name;
    EXPECT_TRUE(server.process().WaitForOutput(name + "[0-9]* is back").has_value()) << name;
  }
  const pid_t gateway = PidOf("tandem-gateway", sockets);
  ASSERT_GT(gateway, 0);
  ASSERT_EQ(kill(gateway, SIGKILL), 0);
  EXPECT_TRUE(server.process().WaitForOutput("gateway is back").has_value());
  EXPECT_EQ(rest.Ask(Question("What is 12 + 34?")).content, "12 + 34 = 46.") << "at the same port";

  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Output();
  EXPECT_TRUE(server.processes().empty());
  EXPECT_EQ(PidOf("tandem-gateway", sockets), -1);
  EXPECT_FALSE(std::filesystem::exists(sockets)) << sockets;
}

TEST(ServeTest, ASignalToAllOfItsProcessesLetsStreamsFinish) {
  Server server;
  ASSERT_TRUE(server.WaitReady());
  const RestClient rest = server.rest();
  const Answer undisturbed = rest.Stream(LongQuestion(600));
  const std::string sockets =
      server.process().WaitForOutput("engine unix:([^ ]*)/attention.sock").value_or("");
  bool stopped = false;
  const Answer answer = rest.Stream(LongQuestion(600), [&](int events) {
    if (!stopped && events > 10) {
      stopped = true;
      // The gateway has no model in its arguments, the others have; children before their parent.
      EXPECT_EQ(kill(PidOf("tandem-gateway", sockets), SIGTERM), 0);
      for (const char* name : {"tandem-expert", "tandem-attention", "tandem"}) {
        EXPECT_EQ(kill(server.Pid(name), SIGTERM), 0) << name;
      }
    }
    return true;
  });
  EXPECT_TRUE(stopped);
  EXPECT_TRUE(answer.ok()) << answer.ToString();
  EXPECT_EQ(answer.content, undisturbed.content);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Output();
  EXPECT_THAT(server.process().Output(), ::testing::Not(HasSubstr("is back")));
  EXPECT_TRUE(server.processes().empty());
}

TEST(ServeTest, SpellingsOfKTransformers) {
  Server server("--gguf_path",
                {"--model_path", "deepseek-ai/DeepSeek-R1", "--cpu_infer", "2", "--web", "True",
                 "--max_new_tokens", "100", "--optimize_config_path", "/no/such.yaml"});
  ASSERT_TRUE(server.WaitReady());
  EXPECT_EQ(server.rest().Ask(Question("What is 12 + 34?")).content, "12 + 34 = 46.");
  EXPECT_THAT(server.process().Output(), HasSubstr("--optimize-config-path has no meaning here"));
  server.process().Signal(SIGINT);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Output();
}

TEST(ServeTest, TwoExpertProcesses) {
  Server server("--model", {"--expert-processes", "2"});
  ASSERT_TRUE(server.WaitReady());
  EXPECT_EQ(server.rest().Ask(Question("What is 12 + 34?")).content, "12 + 34 = 46.");
  const auto processes = server.processes();
  EXPECT_EQ(std::count_if(processes.begin(), processes.end(),
                          [](const auto& p) { return p.second == "tandem-expert"; }),
            2);
  // Nothing outlives a supervisor that had no time to stop it.
  server.process().Kill();
  EXPECT_TRUE(WaitUntil([&] { return server.processes().empty(); }));
}

TEST(ServeTest, StopsWhileStarting) {
  Server server;
  ASSERT_TRUE(server.process().WaitForOutput("expert process").has_value()) << server.process().Output();
  server.process().Signal(SIGINT);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Output();
  EXPECT_TRUE(server.processes().empty());
}

TEST(ChatTest, OneQuestionAndManyTurns) {
  Server server;
  ASSERT_TRUE(server.WaitReady());
  Process once("tandem", {"chat", "--url", server.url(), "--temperature", "0", "-p", "What is 12 + 34?"});
  EXPECT_EQ(once.Wait(), 0) << once.Output();
  EXPECT_THAT(once.Stdout(), HasSubstr("12 + 34 = 46."));
  EXPECT_THAT(once.Output(), HasSubstr("tokens/s"));

  Process turns("/bin/sh", {"-c", "printf 'What is 12 + 30?\\nNow add 5 to that.\\n' | " +
                                      BinaryPath("tandem") + " chat --temperature 0 --url " + server.url()});
  EXPECT_EQ(turns.Wait(), 0) << turns.Output();
  EXPECT_THAT(turns.Stdout(), HasSubstr("42"));
  EXPECT_THAT(turns.Stdout(), HasSubstr("47")) << "the second question needs the first";

  Process probe("tandem", {"chat", "--probe", "--url", server.url()});
  EXPECT_EQ(probe.Wait(), 0);
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(), 0);
  Process nobody("tandem", {"chat", "--url", server.url(), "-p", "hi"});
  EXPECT_EQ(nobody.Wait(), 1);
  EXPECT_THAT(nobody.Output(), HasSubstr(server.url()));
}

TEST(ChatTest, StartsAServerOfItsOwn) {
  const TempFolder folder;
  const std::string model = folder / "model.gguf";
  std::filesystem::create_symlink(DemoModel(), model);
  Process chat("tandem", {"chat", "--model", model, "--temperature", "0", "-p", "What is 12 + 34?"});
  EXPECT_EQ(chat.Wait(), 0) << chat.Output();
  EXPECT_THAT(chat.Stdout(), HasSubstr("12 + 34 = 46."));
  EXPECT_TRUE(WaitUntil([&] { return ProcessesWith(folder.path()).empty(); }));
}

TEST(InspectTest, SaysWhatAFileHolds) {
  Process text("tandem", {"inspect", DemoModel()});
  EXPECT_EQ(text.Wait(), 0) << text.Output();
  for (const char* word : {"TinyR1", "deepseek2", "Q4_K", "Q6_K"})
    EXPECT_THAT(text.Stdout(), HasSubstr(word));
  Process json("tandem", {"inspect", DemoModel(), "--json"});
  EXPECT_EQ(json.Wait(), 0) << json.Output();
  EXPECT_FALSE(Json::parse(json.Stdout(), nullptr, /*allow_exceptions=*/false).is_discarded())
      << json.Stdout();
  Process missing("tandem", {"inspect", "/no/such.gguf"});
  EXPECT_EQ(missing.Wait(), 1);
  EXPECT_THAT(missing.Output(), HasSubstr("/no/such.gguf"));
}

TEST(DoctorTest, Examines) {
  // Whether all is fine depends on the machine; that it is looked at does not.
  Process doctor("tandem", {"doctor", "--model", DemoModel()});
  EXPECT_THAT(doctor.Wait().value_or(-1), AnyOf(Eq(0), Eq(1))) << doctor.Output();
  for (const char* word : {"memory", "huge pages", "GPU"}) EXPECT_THAT(doctor.Stdout(), HasSubstr(word));
  Process wrong("tandem", {"doctor", "--model", "/no/such.gguf"});
  EXPECT_EQ(wrong.Wait(), 1);
  EXPECT_THAT(wrong.Output(), HasSubstr("/no/such.gguf"));
}

TEST(SynthTest, ASignalLeavesNothingBehind) {
  for (const int number : {SIGINT, SIGTERM}) {
    const TempFolder folder;
    Process synth("tandem", {"synth", folder / "m.gguf", "--shape", "v2-lite", "--experts", "8"});
    // Well under way: past what is made before the file.
    const auto file_has_bytes = [&] {
      for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
        std::error_code gone;
        if (entry.file_size(gone) > 1'000'000 && !gone) return true;
      }
      return false;
    };
    ASSERT_TRUE(WaitUntil([&] { return file_has_bytes() || synth.Wait(std::chrono::milliseconds(0)); }));
    synth.Signal(number);
    EXPECT_EQ(synth.Wait(), 128 + number) << synth.Output();
    EXPECT_THAT(synth.Output(), HasSubstr("m.gguf is not written"));
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  }
}

}  // namespace
}  // namespace tandem::integration
