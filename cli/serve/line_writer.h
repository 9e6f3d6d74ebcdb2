// Lines for a file descriptor, written by a thread of its own: a reader that stops reading (a terminal with
// Ctrl-S, a pager, a log collector that hangs) must stop nobody else. What it does not take is lost then, and
// said when it reads again.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace tandem::cli {

// Thread-safe.
class LineWriter {
 public:
  explicit LineWriter(int fd, size_t most_lines = 10000);
  // Gives what is left two seconds. If nobody reads then, the thread stays behind with the descriptor.
  ~LineWriter();
  LineWriter(const LineWriter&) = delete;
  LineWriter& operator=(const LineWriter&) = delete;

  // Never waits. `line` without the newline at its end.
  void Add(std::string line);

 private:
  struct State {
    int fd;
    size_t most;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::string> lines;
    size_t lost = 0;
    bool ending = false, done = false;
  };
  static void Run(State& state);

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace tandem::cli
