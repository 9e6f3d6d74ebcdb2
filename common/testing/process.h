// Programs of the build under test, started as a user would start them.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace tandem::testing {

// Generous: the machine may be shared and slow. Nothing waits longer than it has to.
inline constexpr std::chrono::seconds kPatience{60};

// $TANDEM_BINARY_DIR/bin/NAME, with TANDEM_BINARY_DIR as ctest sets it.
std::string BinaryPath(const std::string& name);
// A file of the source tree.
std::string SourcePath(const std::string& path);
std::string DemoModel();

// A folder of its own with a short name (socket paths have to fit 108 bytes), removed at the end.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& file) const { return path_ + "/" + file; }

 private:
  std::string path_;
};

// A child process whose standard output and error are kept. Killed, if it still runs, when the object goes,
// and by the system when the thread that made it ends. TANDEM_* variables of the environment are not handed
// on, those of `environment` ("NAME=VALUE") are. The methods may be called from any thread.
class Process {
 public:
  // `program`: a path, or a name as in BinaryPath.
  Process(const std::string& program, const std::vector<std::string>& args,
          const std::vector<std::string>& environment = {});
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int number);
  // SIGSTOP, and waits until every thread of it has stopped: the signal alone leaves them time to go on a
  // little.
  void Stop();
  // SIGKILL, and waits for the end.
  void Kill();
  // The exit code, or minus the number of the signal that ended it; nullopt: it still runs after `patience`. All
  // that it has written is in Output() then.
  std::optional<int> Wait(std::chrono::milliseconds patience = kPatience);

  double CpuSeconds() const;  // that it has used so far

  std::string Output() const;  // both streams as they came
  std::string Stdout() const;
  // Waits until the output matches `regex` (ECMAScript): the first group, or the whole match where there is
  // none. nullopt: it ended without, or `patience` passed.
  std::optional<std::string> WaitForOutput(const std::string& regex,
                                           std::chrono::milliseconds patience = kPatience);

 private:
  void Read(int out, int error);
  bool Exited();

  pid_t pid_ = -1;
  mutable std::mutex mutex_;
  std::string output_, stdout_;  // guarded by mutex_
  bool output_ended_ = false;    // likewise
  std::mutex wait_mutex_;        // of what follows
  std::optional<int> exit_;
  std::thread reader_;
};

// Polls until `condition` holds: true, or false after `patience`.
template <typename Condition>
bool WaitUntil(Condition condition, std::chrono::milliseconds patience = kPatience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

}  // namespace tandem::testing
