#include "cli/serve/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <deque>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kLongestLine = 16 << 10;
constexpr size_t kKeptLines = 20;
constexpr milliseconds kReadyInterval{100};

// As a shell's exit code for a program that could not be run.
constexpr int kCannotExecute = 127;

std::string Describe(int status) {
  if (WIFEXITED(status)) return absl::StrCat("exit code ", WEXITSTATUS(status));
  if (!WIFSIGNALED(status)) return absl::StrCat("status ", status);
  const char* name = strsignal(WTERMSIG(status));
  return absl::StrCat("signal ", WTERMSIG(status), ", ", name == nullptr ? "unknown" : name);
}

std::string Seconds(milliseconds time) {
  const auto ms = time.count();
  return ms % 1000 == 0 ? absl::StrCat(ms / 1000, " s") : absl::StrCat(ms, " ms");
}

// The last line logged as an error, else the last line.
std::string LastWords(const std::deque<std::string>& lines) {
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    if (line->find(" E ") != std::string::npos || line->find(" C ") != std::string::npos) return *line;
  }
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    if (line->rfind("Run with --help", 0) != 0) return *line;  // what is wrong stands before it
  }
  return std::string();
}

// In the child, between fork and exec: async-signal-safe calls only. Signals are blocked: what is sent to
// this process must neither run the parent's handlers nor be lost.
[[noreturn]] void Become(char* const* argv, int output, pid_t parent) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kCannotExecute);  // it died before the line above
  for (const int signal_number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGCHLD}) signal(signal_number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  execv(argv[0], argv);
  const char* reason = strerrordesc_np(errno);
  if (reason == nullptr) reason = "unknown error";
  for (const char* text : {"E cannot run ", const_cast<const char*>(argv[0]), ": ", reason, "\n"}) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) break;
  }
  _exit(kCannotExecute);
}

}  // namespace

struct Supervisor::Child {
  ChildSpec spec;
  pid_t pid = -1;   // -1: not running
  int output = -1;  // read end of its stdout and stderr
  std::string partial;
  std::deque<std::string> last_lines;
  bool ready = false;
  bool ever_ready = false;
  bool signalled = false;  // SIGTERM sent by AdvanceStop
  bool killed = false;     // SIGKILL
  int misses = 0;          // of `alive`, in a row
  int failures = 0;        // in a row
  bool at_once = false;    // after the first of them it was started again at once
  Clock::time_point ready_at;
  Clock::time_point start_at;  // when to start it (again)
  Clock::time_point next_probe;
};

Supervisor::Supervisor(Options options)
    : options_(std::move(options)), wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

Supervisor::~Supervisor() {
  for (const auto& child : children_) {
    if (child->pid > 0) {
      kill(-child->pid, SIGKILL);
      waitpid(child->pid, nullptr, 0);
    }
    if (child->output >= 0) close(child->output);
  }
  close(wake_fd_);
}

void Supervisor::Add(ChildSpec spec) {
  auto child = std::make_unique<Child>();
  child->spec = std::move(spec);
  children_.push_back(std::move(child));
}

void Supervisor::RequestStop() {
  const int saved = errno;
  const uint64_t one = 1;
  if (write(wake_fd_, &one, sizeof one) < 0) {
    // Only a counter at its maximum refuses, and then a stop has long been asked for.
  }
  errno = saved;
}

void Supervisor::Say(const std::string& message) const {
  if (options_.on_event) options_.on_event(message);
}

void Supervisor::Start(Child& child) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    child.last_lines.push_back(absl::StrCat("E pipe: ", strerror(errno)));
    Failed(child, 0);
    return;
  }
  std::vector<char*> argv;
  for (std::string& word : child.spec.argv) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = fork();
  if (pid == 0) Become(argv.data(), ends[1], parent);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    child.last_lines.push_back(absl::StrCat("E fork: ", strerror(errno)));
    Failed(child, 0);
    return;
  }
  setpgid(pid, pid);  // also here, so that a kill of the group cannot come too early
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  if (child.output >= 0) close(child.output);
  child.pid = pid;
  child.output = ends[0];
  child.partial.clear();
  child.last_lines.clear();
  child.ready = false;
  child.signalled = child.killed = false;
  child.misses = 0;
  child.next_probe = Clock::now();
}

void Supervisor::TakeLines(Child& child, bool rest) {
  const auto take = [&](std::string line) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) return;
    child.last_lines.push_back(line);
    if (child.last_lines.size() > kKeptLines) child.last_lines.pop_front();
    if (options_.on_line) options_.on_line(child.spec.name, line);
  };
  size_t begin = 0;
  for (size_t end; (end = child.partial.find('\n', begin)) != std::string::npos; begin = end + 1) {
    take(child.partial.substr(begin, end - begin));
  }
  child.partial.erase(0, begin);
  if (rest || child.partial.size() > kLongestLine) {
    take(child.partial);
    child.partial.clear();
  }
}

void Supervisor::ReadOutput(Child& child) {
  char buffer[8192];
  // Bounded, so that a child that never stops talking cannot keep the loop from its other duties.
  for (int round = 0; round < 64 && child.output >= 0; ++round) {
    const ssize_t n = read(child.output, buffer, sizeof buffer);
    if (n > 0) {
      child.partial.append(buffer, static_cast<size_t>(n));
      TakeLines(child, false);
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    TakeLines(child, true);
    close(child.output);
    child.output = -1;
  }
}

void Supervisor::Failed(Child& child, int status) {
  const Clock::time_point now = Clock::now();
  if (child.ready && now - child.ready_at >= options_.steady_after) child.failures = 0;
  ++child.failures;
  if (child.failures == 1) child.at_once = child.ready;
  child.ready = false;
  const bool called_wrongly = WIFEXITED(status) && WEXITSTATUS(status) == 2;
  if (!child.ever_ready && (child.failures >= options_.attempts || called_wrongly)) {
    const std::string words = LastWords(child.last_lines);
    Say(absl::StrCat(child.spec.name, " ended (", Describe(status), ") ",
                     called_wrongly ? "" : absl::StrCat(child.failures, " times "),
                     "before it was ready: giving up.",
                     words.empty() ? " It said nothing." : " It said: ", words));
    exit_code_ = 1;
    stopping_ = true;
    return;
  }
  const int waits = child.failures - (child.at_once ? 1 : 0);
  milliseconds wait = waits == 0 ? milliseconds(0) : options_.first_backoff;
  for (int i = 1; i < waits && wait < options_.max_backoff; ++i) wait *= 2;
  wait = std::min(wait, child.ever_ready ? std::min(options_.max_backoff_once_ready, options_.max_backoff)
                                         : options_.max_backoff);
  child.start_at = now + wait;
  Say(absl::StrCat(child.spec.name, " ended (", Describe(status), "); starting it again ",
                   waits == 0 ? "at once" : "in " + Seconds(wait)));
}

void Supervisor::Reap(Child& child) {
  if (child.pid <= 0) return;
  int status = 0;
  const pid_t got = waitpid(child.pid, &status, WNOHANG);
  if (got == 0 || (got < 0 && errno == EINTR)) return;
  kill(-child.pid, SIGKILL);  // what it may have left behind in its group
  ReadOutput(child);
  TakeLines(child, true);
  child.pid = -1;
  if (stopping_) {
    child.ready = false;
    return;
  }
  Failed(child, status);
}

void Supervisor::CheckReady() {
  const Clock::time_point now = Clock::now();
  bool all = true;
  for (const auto& child : children_) {
    if (child->pid > 0 && !child->ready && now >= child->next_probe) {
      if (!child->spec.ready || child->spec.ready()) {
        child->ready = true;
        child->ready_at = Clock::now();
        child->next_probe = Clock::now() + options_.alive_interval;
        if (child->ever_ready) Say(absl::StrCat(child->spec.name, " is back"));
        child->ever_ready = true;
      } else {
        child->next_probe = Clock::now() + kReadyInterval;
      }
    }
    all = all && child->ready;
  }
  if (all && !announced_) {
    announced_ = true;
    if (options_.on_all_ready) options_.on_all_ready();
  }
}

void Supervisor::CheckAlive() {
  for (const auto& child : children_) {
    if (child->pid <= 0 || !child->ready || !child->spec.alive || Clock::now() < child->next_probe) continue;
    child->misses = child->spec.alive() ? 0 : child->misses + 1;
    child->next_probe = Clock::now() + options_.alive_interval;
    if (child->misses < options_.hangs_after) continue;
    child->misses = 0;
    Say(absl::StrCat(child->spec.name, " has not answered ", options_.hangs_after, " times in a row, ",
                     Seconds(options_.alive_interval), " apart: killed"));
    kill(-child->pid, SIGKILL);
  }
}

void Supervisor::AdvanceStop() {
  const Clock::time_point now = Clock::now();
  int lowest = INT_MAX;
  for (const auto& child : children_) {
    if (child->pid > 0) lowest = std::min(lowest, child->spec.stop_order);
  }
  if (lowest == INT_MAX) return;
  for (const auto& child : children_) {
    if (child->pid <= 0) continue;
    if (stops_ >= 2) {
      kill(-child->pid, SIGKILL);
    } else if (child->spec.stop_order == lowest) {
      if (!child->signalled) {
        if (stop_order_ != lowest || stop_deadline_ == Clock::time_point()) {
          stop_order_ = lowest;
          stop_deadline_ = now + options_.stop_patience;
        }
        child->signalled = true;
        kill(child->pid, SIGTERM);
      } else if (now >= stop_deadline_ && !child->killed) {
        child->killed = true;
        Say(absl::StrCat(child->spec.name, " did not stop within ", Seconds(options_.stop_patience),
                         ": killed"));
        kill(-child->pid, SIGKILL);
      }
    }
  }
}

int Supervisor::PollTimeout() const {
  if (stopping_) return 20;
  const Clock::time_point now = Clock::now();
  milliseconds wait{1000};
  for (const auto& child : children_) {
    if (child->pid <= 0) {
      wait = std::min(wait, std::chrono::duration_cast<milliseconds>(child->start_at - now));
    } else if (!child->ready || child->spec.alive) {
      wait = std::min(wait, std::chrono::duration_cast<milliseconds>(child->next_probe - now));
    } else if (child->output < 0) {
      wait = std::min(wait, milliseconds(100));  // closed its output: its end shows in waitpid alone
    }
  }
  return static_cast<int>(std::max<int64_t>(0, wait.count())) + 1;
}

int Supervisor::Run() {
  for (const auto& child : children_) child->start_at = Clock::now();
  while (true) {
    if (!stopping_) {
      for (const auto& child : children_) {
        if (child->pid <= 0 && !stopping_ && Clock::now() >= child->start_at) Start(*child);
      }
    }
    std::vector<pollfd> fds = {{wake_fd_, POLLIN, 0}};
    for (const auto& child : children_) {
      if (child->output >= 0) fds.push_back({child->output, POLLIN, 0});
    }
    poll(fds.data(), fds.size(), PollTimeout());
    uint64_t asked = 0;
    if (read(wake_fd_, &asked, sizeof asked) == sizeof asked) {
      stops_ += asked;
      stopping_ = true;
    }
    for (const auto& child : children_) ReadOutput(*child);
    for (const auto& child : children_) Reap(*child);
    if (stopping_) {
      AdvanceStop();
      const bool gone =
          std::all_of(children_.begin(), children_.end(), [](const auto& c) { return c->pid <= 0; });
      if (gone) return exit_code_;
    } else {
      CheckReady();
      CheckAlive();
    }
  }
}

}  // namespace tandem::cli
