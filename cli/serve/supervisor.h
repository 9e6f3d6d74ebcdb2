// Starts child processes, forwards their output, starts again what dies, stops all of them in order.
//
// One thread, one poll loop. Children run in process groups of their own (a terminal's Ctrl-C reaches the
// supervisor alone, which then stops them in order) and get SIGKILL from the kernel when the supervisor dies.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tandem::cli {

struct ChildSpec {
  std::string name;               // "expert0": in messages and in front of its lines
  std::vector<std::string> argv;  // argv[0] is the path of the program
  // Asked again and again until it says true, from the supervisor's loop: must answer within some 100 ms.
  std::function<bool()> ready = nullptr;
  // Asked every now and then once it is ready; false: no answer. Null: not asked.
  std::function<bool()> alive = nullptr;
  int stop_order = 0;  // 0 is stopped first, the next ones when it is gone
};

class Supervisor {
 public:
  struct Options {
    // Doubled with every failure in a row. What was ready is started again at once after the first.
    std::chrono::milliseconds first_backoff{1000};
    std::chrono::milliseconds max_backoff{30000};
    // Of a child that was ready before: clients wait for it.
    std::chrono::milliseconds max_backoff_once_ready{3000};
    std::chrono::milliseconds steady_after{60000};  // ready for that long: the backoff begins anew
    int attempts = 5;  // failures before it was ever ready until the supervisor gives up
    std::chrono::milliseconds stop_patience{30000};  // SIGTERM, that long, SIGKILL
    // A child that was ready and does not answer so many times, so far apart, hangs: it is killed, and
    // started again.
    std::chrono::milliseconds alive_interval{5000};
    int hangs_after = 6;  // the engine is back before clients are given up (--resume-timeout)
    std::function<void(const std::string& child, const std::string& line)> on_line;  // a child's output
    std::function<void(const std::string& message)> on_event;  // what the supervisor does
    std::function<void()> on_all_ready;                        // once
  };
  explicit Supervisor(Options options);
  ~Supervisor();  // kills what still runs
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  void Add(ChildSpec spec);  // before Run

  // Runs until a stop is asked for (returns 0) or a child is given up (stops the others, returns 1; the
  // message with the child's last error line goes to on_event). A child that exits with status 2 before it
  // was ever ready was called wrongly: it is not tried again.
  int Run();

  // Async-signal-safe and thread-safe. The first call stops in order, the second one kills.
  void RequestStop();

 private:
  struct Child;
  void Start(Child& child);
  void Reap(Child& child);
  void ReadOutput(Child& child);
  void TakeLines(Child& child, bool rest);
  void Failed(Child& child, int status);
  void CheckReady();
  void CheckAlive();
  void AdvanceStop();
  void Say(const std::string& message) const;
  int PollTimeout() const;

  const Options options_;
  std::vector<std::unique_ptr<Child>> children_;
  int wake_fd_ = -1;  // eventfd: the number of stops asked for
  uint64_t stops_ = 0;
  bool stopping_ = false;
  bool announced_ = false;
  int exit_code_ = 0;
  int stop_order_ = 0;  // of the children being stopped
  std::chrono::steady_clock::time_point stop_deadline_;
};

}  // namespace tandem::cli
