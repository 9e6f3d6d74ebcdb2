// Threads for what must not run on a server's I/O threads: parsing, templates, tokenizing.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem::gateway {

// Thread-safe. Tasks run in the order of their coming, but for large ones (of more than kLargeInput bytes to
// look at): one thread of several is kept for the others.
class WorkQueue {
 public:
  WorkQueue(int threads, size_t capacity);
  ~WorkQueue();  // runs what was accepted, then ends

  static constexpr size_t kLargeInput = 256 << 10;
  // False: full. The task is then untouched.
  bool TryPush(size_t input_bytes, std::function<void()>&& task);

 private:
  struct Task {
    uint64_t number = 0;
    std::function<void()> run;
  };
  void Run();
  // With mutex_ held: the queue whose first task comes next; null: none may.
  std::deque<Task>* Next();

  const size_t capacity_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> small_, large_;
  uint64_t number_ = 0;
  int large_running_ = 0, most_large_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tandem::gateway
