#include "common/testing/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <regex>
#include <stdexcept>

extern char** environ;

namespace tandem::testing {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) throw std::runtime_error(std::string(name) + " is not set; ctest sets it");
  return value;
}

std::vector<char*> Pointers(std::vector<std::string>& words) {
  std::vector<char*> out;
  for (std::string& word : words) out.push_back(word.data());
  out.push_back(nullptr);
  return out;
}

int ExitOf(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status); }

}  // namespace

std::string BinaryPath(const std::string& name) { return Environment("TANDEM_BINARY_DIR") + "/bin/" + name; }
std::string SourcePath(const std::string& path) { return Environment("TANDEM_SOURCE_DIR") + "/" + path; }
std::string DemoModel() { return SourcePath("models/tinyr1-Q4_K_M.gguf"); }

TempFolder::TempFolder() {
  char name[] = "/tmp/tandem_XXXXXX";
  if (mkdtemp(name) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

Process::Process(const std::string& program, const std::vector<std::string>& args,
                 const std::vector<std::string>& environment) {
  const std::string path = program.find('/') == std::string::npos ? BinaryPath(program) : program;
  std::vector<std::string> words = {path};
  words.insert(words.end(), args.begin(), args.end());
  std::vector<std::string> variables = environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::string(*entry).rfind("TANDEM_", 0) != 0) variables.emplace_back(*entry);
  }
  std::vector<char*> argv = Pointers(words), envp = Pointers(variables);
  int out[2], error[2];
  if (pipe2(out, O_CLOEXEC) != 0 || pipe2(error, O_CLOEXEC) != 0) throw std::runtime_error("pipe2 failed");
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    dup2(out[1], STDOUT_FILENO);
    dup2(error[1], STDERR_FILENO);
    execve(path.c_str(), argv.data(), envp.data());
    _exit(127);
  }
  close(out[1]);
  close(error[1]);
  if (pid_ < 0) throw std::runtime_error("fork failed");
  reader_ = std::thread([this, from = out[0], error_from = error[0]] { Read(from, error_from); });
}

Process::~Process() {
  Kill();
  reader_.join();
}

void Process::Read(int out, int error) {
  pollfd ends[2] = {{out, POLLIN, 0}, {error, POLLIN, 0}};
  int open_ends = 2;
  // The pipes may outlive the program in a grandchild: once it is gone, what is in them is all. That it was gone
  // has to be seen before they are found empty.
  bool gone = false;
  while (open_ends > 0) {
    const int ready = poll(ends, 2, gone ? 0 : 50);
    if (ready == 0) {
      if (gone) break;
      gone = Exited();
    }
    for (int i = 0; i < 2 && ready > 0; ++i) {
      if (ends[i].fd < 0 || ends[i].revents == 0) continue;
      char chunk[16384];
      const ssize_t n = read(ends[i].fd, chunk, sizeof chunk);
      if (n <= 0) {
        ends[i].fd = -1;
        --open_ends;
        continue;
      }
      const std::lock_guard lock(mutex_);
      output_.append(chunk, static_cast<size_t>(n));
      if (i == 0) stdout_.append(chunk, static_cast<size_t>(n));
    }
  }
  close(out);
  close(error);
  const std::lock_guard lock(mutex_);
  output_ended_ = true;
}

void Process::Signal(int number) {
  const std::lock_guard lock(wait_mutex_);
  if (!exit_.has_value()) kill(pid_, number);
}

void Process::Stop() {
  const std::lock_guard lock(wait_mutex_);
  if (exit_.has_value()) return;
  kill(pid_, SIGSTOP);
  int status = 0;
  if (waitpid(pid_, &status, WUNTRACED) == pid_ && !WIFSTOPPED(status)) exit_ = ExitOf(status);
}

void Process::Kill() {
  Signal(SIGKILL);
  Wait();
}

bool Process::Exited() {
  const std::lock_guard lock(wait_mutex_);
  if (exit_.has_value()) return true;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) != pid_) return false;
  exit_ = ExitOf(status);
  return true;
}

std::optional<int> Process::Wait(std::chrono::milliseconds patience) {
  if (!WaitUntil([this] { return Exited(); }, patience)) return std::nullopt;
  WaitUntil([this] {
    const std::lock_guard lock(mutex_);
    return output_ended_;
  });
  const std::lock_guard lock(wait_mutex_);
  return exit_;
}

double Process::CpuSeconds() const {
  // utime and stime are the 14th and 15th field; the 2nd, the name, has no spaces in our programs.
  std::ifstream stat("/proc/" + std::to_string(pid_) + "/stat");
  std::string field;
  double ticks = 0;
  for (int i = 1; i <= 15 && stat >> field; ++i) {
    if (i >= 14) ticks += std::strtod(field.c_str(), nullptr);
  }
  return ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

std::string Process::Output() const {
  const std::lock_guard lock(mutex_);
  return output_;
}

std::string Process::Stdout() const {
  const std::lock_guard lock(mutex_);
  return stdout_;
}

std::optional<std::string> Process::WaitForOutput(const std::string& regex,
                                                  std::chrono::milliseconds patience) {
  const std::regex pattern(regex);
  std::optional<std::string> found;
  WaitUntil(
      [&] {
        bool ended;
        std::string text;
        {
          const std::lock_guard lock(mutex_);
          ended = output_ended_;
          text = output_;
        }
        std::smatch match;
        if (std::regex_search(text, match, pattern)) found = match[match.size() > 1 ? 1 : 0].str();
        return found.has_value() || ended;
      },
      patience);
  return found;
}

}  // namespace tandem::testing
