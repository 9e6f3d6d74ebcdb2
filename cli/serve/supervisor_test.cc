#include "cli/serve/supervisor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

namespace tandem::cli {
namespace {

using std::chrono::milliseconds;
using ::testing::Contains;
using ::testing::ElementsAre;

// Waits for a condition; the bound only matters where the test fails.
template <typename Condition>
bool Eventually(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

class SupervisorTest : public ::testing::Test {
 protected:
  // The process that printed the latest "pid N".
  pid_t LatestPid(const std::string& child) {
    pid_t pid = 0;
    for (const std::string& line : log()) {
      const std::string start = child + "|pid ";
      if (line.rfind(start, 0) == 0) pid = std::stoi(line.substr(start.size()));
    }
    return pid;
  }

  SupervisorTest() {
    std::string name = ::testing::TempDir() + "tandem-supervisor-XXXXXX";
    folder_ = mkdtemp(name.data());
    options_.first_backoff = milliseconds(10);
    options_.max_backoff = milliseconds(40);
    options_.stop_patience = milliseconds(20'000);
    options_.on_line = [this](const std::string& child, const std::string& line) { Log(child + "|" + line); };
    options_.on_event = [this](const std::string& message) { Log("event|" + message); };
    options_.on_all_ready = [this] { Log("all ready"); };
  }
  ~SupervisorTest() override {
    if (thread_.joinable()) {
      supervisor_->RequestStop();
      supervisor_->RequestStop();
      thread_.join();
    }
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  void Log(const std::string& text) {
    const std::lock_guard lock(mutex_);
    log_.push_back(text);
  }
  std::vector<std::string> log() {
    const std::lock_guard lock(mutex_);
    return log_;
  }
  size_t Count(const std::string& text) {
    size_t n = 0;
    for (const std::string& line : log()) n += line.find(text) != std::string::npos;
    return n;
  }

  // A shell script as a child; ready when `ready_file` (in folder_) exists, at once if that is empty.
  ChildSpec Script(const std::string& name, const std::string& script, int stop_order = 0,
                   const std::string& ready_file = "") {
    ChildSpec spec;
    spec.name = name;
    spec.argv = {"/bin/sh", "-c", "cd '" + folder_ + "'; " + script};
    spec.stop_order = stop_order;
    if (!ready_file.empty()) {
      spec.ready = [path = folder_ + "/" + ready_file] { return std::filesystem::exists(path); };
    }
    return spec;
  }

  void Start(const std::vector<ChildSpec>& children) {
    supervisor_ = std::make_unique<Supervisor>(options_);
    for (const ChildSpec& child : children) supervisor_->Add(child);
    thread_ = std::thread([this] { code_ = supervisor_->Run(); });
  }
  int Stop() {
    supervisor_->RequestStop();
    return Join();
  }
  int Join() {
    thread_.join();
    return code_;
  }

  std::string folder_;
  Supervisor::Options options_;
  std::unique_ptr<Supervisor> supervisor_;
  std::thread thread_;
  int code_ = -1;
  std::mutex mutex_;
  std::vector<std::string> log_;
};

TEST_F(SupervisorTest, ForwardsLinesFromBothOutputs) {
  Start({Script("a", "echo one; echo two >&2; printf 'no line end'; exec sleep 600", 0, "never")});
  ASSERT_TRUE(Eventually([&] { return Count("a|two") == 1; }));
  EXPECT_EQ(Stop(), 0);
  EXPECT_THAT(log(), Contains("a|one"));
  EXPECT_THAT(log(), Contains("a|no line end"));
}

TEST_F(SupervisorTest, SaysOnceThatAllAreReady) {
  Start({Script("a", "touch a; exec sleep 600", 0, "a"),
         Script("b", "sleep 0.1; touch b; exec sleep 600", 0, "b")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
  EXPECT_TRUE(std::filesystem::exists(folder_ + "/a"));
  EXPECT_TRUE(std::filesystem::exists(folder_ + "/b"));
  EXPECT_EQ(Stop(), 0);
  EXPECT_EQ(Count("all ready"), 1u);
}

TEST_F(SupervisorTest, StartsAgainWhatDies) {
  Start({Script("a", "echo pid $$; touch a; exec sleep 600", 0, "a")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1 && Count("a|pid ") == 1; }));
  const pid_t pid = LatestPid("a");
  ASSERT_GT(pid, 0);
  kill(pid, SIGKILL);
  ASSERT_TRUE(Eventually([&] { return Count("a is back") == 1; }));
  // What it prints comes through a pipe, perhaps after the news that it is back.
  EXPECT_TRUE(Eventually([&] { return Count("a|pid ") == 2; }));
  EXPECT_EQ(Count("signal 9"), 1u);
  EXPECT_EQ(Count("all ready"), 1u);
  EXPECT_EQ(Stop(), 0);
}

TEST_F(SupervisorTest, WhatWasReadyIsStartedAgainAtOnceButNotTwice) {
  options_.first_backoff = options_.max_backoff = options_.max_backoff_once_ready = std::chrono::minutes(10);
  Start({Script("a", "echo pid $$; touch a; exec sleep 600", 0, "a")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1 && Count("a|pid ") == 1; }));
  kill(LatestPid("a"), SIGKILL);
  ASSERT_TRUE(Eventually([&] { return Count("a is back") == 1 && Count("a|pid ") == 2; }));
  EXPECT_EQ(Count("starting it again at once"), 1u);
  kill(LatestPid("a"), SIGKILL);
  ASSERT_TRUE(Eventually([&] { return Count("starting it again in 600") == 1; }));
  EXPECT_EQ(Stop(), 0);
}

TEST_F(SupervisorTest, WhatWasReadyNeverWaitsLong) {
  options_.first_backoff = options_.max_backoff = std::chrono::minutes(10);
  options_.max_backoff_once_ready = milliseconds(30);
  Start({Script("a", "echo pid $$; touch a; exec sleep 600", 0, "a")});
  for (size_t i = 1; i <= 5; ++i) {
    ASSERT_TRUE(Eventually([&] { return Count("a|pid ") == i && Count("a is back") == i - 1; }));
    if (i == 1) {
      ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
    }
    kill(LatestPid("a"), SIGKILL);
  }
  ASSERT_TRUE(Eventually([&] { return Count("a is back") == 5; }));
  EXPECT_EQ(Count("starting it again in 30 ms"), 4u);
  EXPECT_EQ(Stop(), 0);
}

TEST_F(SupervisorTest, WhatHangsIsKilledAndStartedAgain) {
  options_.alive_interval = milliseconds(5);
  options_.hangs_after = 3;
  ChildSpec child = Script("a", "echo pid $$; touch a; exec sleep 600", 0, "a");
  std::atomic<int> asked{0};
  child.alive = [&] { return ++asked != 2 && (asked < 10 || asked > 12); };  // one miss alone is none
  Start({child});
  ASSERT_TRUE(Eventually([&] { return Count("a is back") == 1; }));
  EXPECT_EQ(Count("a has not answered 3 times in a row, 5 ms apart: killed"), 1u);
  ASSERT_TRUE(Eventually([&] { return asked > 30; }));
  EXPECT_EQ(Count("signal 9"), 1u);
  EXPECT_EQ(Stop(), 0);
}

// SIGTERM comes through as the first thing that a child gets, however early.
TEST_F(SupervisorTest, AStopRightAfterTheStartIsNotLost) {
  for (int i = 0; i < 30; ++i) {
    Start({Script("a", "exec sleep 600", 0, "never"), Script("b", "exec sleep 600", 1, "never")});
    if (i % 2 == 1) std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
    EXPECT_EQ(Stop(), 0);
  }
  EXPECT_EQ(Count("did not stop within"), 0u);
}

TEST_F(SupervisorTest, WaitsLongerAfterEachFailureUpToABound) {
  options_.attempts = 6;
  Start({Script("a", "exit 3", 0, "never")});
  EXPECT_EQ(Join(), 1);
  std::vector<std::string> waits;
  for (const std::string& line : log()) {
    const size_t in = line.find("again in ");
    if (in != std::string::npos) waits.push_back(line.substr(in + 9));
  }
  EXPECT_THAT(waits, ElementsAre("10 ms", "20 ms", "40 ms", "40 ms", "40 ms"));
}

TEST_F(SupervisorTest, GivesUpAndShowsTheLastError) {
  Start({Script("good", "exec sleep 600", 1),
         Script("bad", "echo '2026-01-31 12:00:00.000 E bad: no such model'; echo bye; exit 1", 0, "never")});
  EXPECT_EQ(Join(), 1);
  EXPECT_EQ(Count("bad|bye"), 5u);
  EXPECT_EQ(
      Count("exit code 1) 5 times before it was ready: giving up. It said: 2026-01-31 12:00:00.000 E bad: no "
            "such model"),
      1u);
}

TEST_F(SupervisorTest, AWrongCallIsNotRepeated) {
  Start({Script("bad", "echo 'unknown flag --x'; exit 2", 0, "never")});
  EXPECT_EQ(Join(), 1);
  EXPECT_EQ(Count("bad|unknown flag"), 1u);
  EXPECT_EQ(Count("It said: unknown flag --x"), 1u);
}

TEST_F(SupervisorTest, AHintAtTheHelpIsNotTheReason) {
  Start({Script("bad", "echo '--x: 7 is too much'; echo 'Run with --help for more information.'; exit 2", 0,
                "never")});
  EXPECT_EQ(Join(), 1);
  EXPECT_EQ(Count("It said: --x: 7 is too much"), 1u);
}

TEST_F(SupervisorTest, AProgramThatIsNotThere) {
  options_.attempts = 2;
  ChildSpec spec;
  spec.name = "ghost";
  spec.argv = {"/nonexistent/program"};
  spec.ready = [] { return false; };
  Start({spec});
  EXPECT_EQ(Join(), 1);
  EXPECT_GE(Count("cannot run /nonexistent/program"), 1u);
}

TEST_F(SupervisorTest, StopsInOrderAndWaitsForEach) {
  const auto child = [this](const std::string& name, int order) {
    // Says goodbye after a while: the next one must not be asked before.
    return Script(
        name, "trap 'sleep 0.2; echo ended; exit 0' TERM; touch " + name + "; while :; do sleep 0.02; done",
        order, name);
  };
  Start({child("expert", 2), child("attention", 1), child("gateway", 0)});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
  EXPECT_EQ(Stop(), 0);
  std::vector<std::string> ends;
  for (const std::string& line : log()) {
    if (line.find("|ended") != std::string::npos) ends.push_back(line);
  }
  EXPECT_THAT(ends, ElementsAre("gateway|ended", "attention|ended", "expert|ended"));
}

TEST_F(SupervisorTest, KillsWhatDoesNotStop) {
  options_.stop_patience = milliseconds(200);
  Start({Script("deaf", "trap '' TERM; touch deaf; while :; do sleep 0.02; done", 0, "deaf")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
  EXPECT_EQ(Stop(), 0);
  EXPECT_EQ(Count("deaf did not stop within 200 ms: killed"), 1u);
}

TEST_F(SupervisorTest, ASecondStopKillsAtOnce) {
  Start({Script("deaf", "trap '' TERM; touch deaf; while :; do sleep 0.02; done", 0, "deaf")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
  supervisor_->RequestStop();
  EXPECT_EQ(Stop(), 0);  // would take 20 s otherwise, and say so
  EXPECT_EQ(Count("did not stop within"), 0u);
}

TEST_F(SupervisorTest, AStopDuringTheBackOffEndsAtOnce) {
  options_.first_backoff = options_.max_backoff = std::chrono::minutes(10);
  Start({Script("a", "exit 1", 0, "never")});
  ASSERT_TRUE(Eventually([&] { return Count("starting it again") == 1; }));
  EXPECT_EQ(Stop(), 0);
}

TEST_F(SupervisorTest, ChildrenDieWithTheSupervisor) {
  // The supervisor lives in a process of its own, which is killed outright.
  const std::string file = folder_ + "/pid";
  const pid_t parent = fork();
  if (parent == 0) {
    Supervisor supervisor(Supervisor::Options{});
    supervisor.Add(Script("a", "echo $$ > pid.tmp; mv pid.tmp pid; exec sleep 600"));
    supervisor.Run();
    _exit(0);
  }
  ASSERT_GT(parent, 0);
  ASSERT_TRUE(Eventually([&] { return std::filesystem::exists(file); }));
  pid_t child = 0;
  std::ifstream(file) >> child;
  ASSERT_GT(child, 0);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  const auto gone = [child] {
    if (kill(child, 0) != 0 && errno == ESRCH) return true;
    std::ifstream stat("/proc/" + std::to_string(child) +
                       "/stat");  // a zombie that init has yet to reap is dead too
    std::string text;
    std::getline(stat, text);
    return text.empty() || text.find(") Z ") != std::string::npos;
  };
  EXPECT_TRUE(Eventually(gone));
}

TEST_F(SupervisorTest, EndlessOutputDoesNotBlockAStop) {
  Start({Script("loud", "touch loud; exec yes", 0, "loud")});
  ASSERT_TRUE(Eventually([&] { return Count("all ready") == 1; }));
  EXPECT_EQ(Stop(), 0);
}

}  // namespace
}  // namespace tandem::cli
