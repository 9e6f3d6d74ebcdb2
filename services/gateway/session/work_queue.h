// Threads for what must not run on a server's I/O threads: parsing, templates, tokenizing.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem::gateway {

// Thread-safe. Tasks run in the order of their coming.
class WorkQueue {
 public:
  WorkQueue(int threads, size_t capacity);
  ~WorkQueue();  // runs what was accepted, then ends

  // False: full. The task is then untouched.
  bool TryPush(std::function<void()>&& task);

 private:
  void Run();

  const size_t capacity_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tandem::gateway
