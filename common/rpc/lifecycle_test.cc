#include "common/rpc/lifecycle.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

namespace tandem::rpc {
namespace {

// Runs `body` in a child process of its own, whose result is its exit status.
template <typename Body>
int ExitStatusOf(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST(LifecycleTest, ReportsTheSignalAndGoesOn) {
  for (const int signal : {SIGTERM, SIGINT}) {
    EXPECT_EQ(ExitStatusOf([signal] {
                StopSignal stop;
                if (stop.Received() || stop.WaitFor(absl::Milliseconds(20)).has_value()) return 1;
                kill(getpid(), signal);
                if (stop.Wait() != signal || !stop.Received()) return 2;
                return stop.WaitFor(absl::ZeroDuration()) == signal ? 0 : 3;
              }),
              0);
  }
}

TEST(LifecycleTest, ThreadsStartedLaterAreNotInterrupted) {
  EXPECT_EQ(ExitStatusOf([] {
              StopSignal stop;
              std::thread busy([&] { stop.Wait(); });
              pthread_kill(busy.native_handle(), 0);
              kill(getpid(), SIGTERM);
              busy.join();
              return 0;
            }),
            0);
}

TEST(LifecycleTest, SecondSignalEndsTheProcess) {
  EXPECT_EQ(ExitStatusOf([] {
              StopSignal stop;
              kill(getpid(), SIGTERM);
              stop.Wait();
              kill(getpid(), SIGINT);
              sleep(15);
              return 0;
            }),
            128 + SIGINT);
}

// Of a whole group's stop, that the supervisor has passed on as well.
TEST(LifecycleTest, ASecondSigtermRightAfterTheFirstIsTheSameStop) {
  EXPECT_EQ(ExitStatusOf([] {
              StopSignal stop;
              kill(getpid(), SIGTERM);
              stop.Wait();
              kill(getpid(), SIGTERM);
              usleep(200'000);
              return 7;
            }),
            7);
}

TEST(LifecycleTest, ClosedStandardDescriptorsAreNotReused) {
  EXPECT_EQ(ExitStatusOf([] {
              close(STDIN_FILENO);
              close(STDERR_FILENO);
              PrepareProcess();
              const int next = dup(STDOUT_FILENO);
              char c = 0;
              if (next <= STDERR_FILENO) return 1;
              return read(STDIN_FILENO, &c, 1) == 0 && write(STDERR_FILENO, "x", 1) == 1 ? 0 : 2;
            }),
            0);
}

TEST(LifecycleTest, BrokenPipesAreErrorsNotSignals) {
  EXPECT_EQ(ExitStatusOf([] {
              StopSignal stop;
              int fds[2];
              if (pipe(fds) != 0) return 1;
              close(fds[0]);
              return write(fds[1], "x", 1) == -1 ? 0 : 2;
            }),
            0);
}

TEST(LifecycleTest, EndsWithoutASignal) {
  EXPECT_EQ(ExitStatusOf([] {
              { StopSignal stop; }
              return 0;
            }),
            0);
}

}  // namespace
}  // namespace tandem::rpc
