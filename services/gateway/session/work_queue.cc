#include "services/gateway/session/work_queue.h"

#include <utility>

namespace tandem::gateway {

WorkQueue::WorkQueue(int threads, size_t capacity)
    : capacity_(capacity), most_large_(threads > 1 ? threads - 1 : 1) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
}

WorkQueue::~WorkQueue() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool WorkQueue::TryPush(size_t input_bytes, std::function<void()>&& task) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_ || small_.size() + large_.size() >= capacity_) return false;
    (input_bytes > kLargeInput ? large_ : small_).push_back({++number_, std::move(task)});
  }
  changed_.notify_one();
  return true;
}

std::deque<WorkQueue::Task>* WorkQueue::Next() {
  const bool large = !large_.empty() && large_running_ < most_large_;
  if (large && (small_.empty() || large_.front().number < small_.front().number)) return &large_;
  return small_.empty() ? nullptr : &small_;
}

void WorkQueue::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    std::deque<Task>* queue = nullptr;
    changed_.wait(lock, [&] {
      queue = Next();
      return queue != nullptr || (stopping_ && small_.empty() && large_.empty());
    });
    if (queue == nullptr) return;
    const bool large = queue == &large_;
    Task task = std::move(queue->front());
    queue->pop_front();
    large_running_ += large ? 1 : 0;
    lock.unlock();
    task.run();
    task.run = nullptr;  // with what it holds
    lock.lock();
    large_running_ -= large ? 1 : 0;
    if (large) changed_.notify_all();
  }
}

}  // namespace tandem::gateway
