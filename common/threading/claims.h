// Hands the numbers [0, n) out to workers, one at a time, and lets each know one ahead, so that it can ask
// memory for what it will want. A number that a worker knows of but has not begun can be taken by one that
// has nothing left: nobody waits for a worker that is not running.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tandem::threading {

class Claims {
 public:
  explicit Claims(int workers) : held_(static_cast<size_t>(workers)) {}

  // Before the workers start. Worker w begins with number w.
  void Reset(int64_t n) {
    n_ = n;
    const auto workers = static_cast<int64_t>(held_.size());
    for (int64_t w = 0; w < workers; ++w) {
      held_[static_cast<size_t>(w)].number.store(w < n ? w : kNone, std::memory_order_relaxed);
    }
    next_.store(workers, std::memory_order_relaxed);
  }

  // Calls fn(number, expected, next) until nothing is left. `next`: what will come after it unless another
  // worker takes it, or -1; `expected`: whether this number is the `next` of the call before. One call of Run
  // for each worker at a time.
  template <typename Fn>
  void Run(int worker, const Fn& fn) {
    Slot& own = held_[static_cast<size_t>(worker)];
    bool expected = false;
    for (int64_t number = Take(own); number >= 0;) {
      const int64_t next = own.number.load(std::memory_order_relaxed);
      fn(number, expected, next);
      number = Take(own);
      expected = number == next;
    }
  }

 private:
  static constexpr int64_t kNone = -1;
  struct alignas(64) Slot {
    std::atomic<int64_t> number{kNone};
  };

  int64_t Claim() {
    if (next_.load(std::memory_order_relaxed) >= n_) return kNone;
    const int64_t number = next_.fetch_add(1, std::memory_order_relaxed);
    return number < n_ ? number : kNone;
  }
  int64_t Take(Slot& own) {
    int64_t number = own.number.exchange(kNone, std::memory_order_relaxed);
    if (number == kNone) number = Claim();
    if (number != kNone) {
      own.number.store(Claim(), std::memory_order_relaxed);
      return number;
    }
    for (Slot& other : held_) {
      number = other.number.exchange(kNone, std::memory_order_relaxed);
      if (number != kNone) return number;
    }
    return kNone;
  }

  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  std::vector<Slot> held_;
};

}  // namespace tandem::threading
