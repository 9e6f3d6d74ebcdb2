// For tests: what a sequence gives to whom it was made for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "services/attention_gpu/scheduler/scheduler.h"

namespace tandem::attention {

// What one sequence received. Thread-safe.
class Sink {
 public:
  EventCallback callback() {
    return [this](SequenceEvent e) {
      const std::lock_guard lock(mutex_);
      EXPECT_FALSE(ended_) << "an event after the last one";
      for (SampledToken& t : e.tokens) tokens_.push_back(std::move(t));
      last_ = std::move(e);
      ended_ = last_.finish != FinishReason::kNone || !last_.status.ok();
      changed_.notify_all();
    };
  }
  // Until it has ended.
  void Wait() {
    WaitFor([this] { return ended_; });
  }
  void WaitForTokens(size_t n) {
    WaitFor([this, n] { return tokens_.size() >= n || ended_; });
  }
  std::vector<SampledToken> sampled() const { return Read(tokens_); }
  std::vector<int32_t> tokens() const {
    std::vector<int32_t> out;
    for (const SampledToken& t : sampled()) out.push_back(t.token);
    return out;
  }
  bool ended() const { return Read(ended_); }
  // The last event.
  absl::Status status() const { return Read(last_.status); }
  FinishReason finish() const { return Read(last_.finish); }
  SequenceStatistics statistics() const { return Read(last_.statistics); }

 private:
  template <typename Condition>
  void WaitFor(const Condition& condition) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(120), condition));
  }
  template <typename T>
  T Read(const T& value) const {
    const std::lock_guard lock(mutex_);
    return value;
  }
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<SampledToken> tokens_;
  SequenceEvent last_;
  bool ended_ = false;
};

}  // namespace tandem::attention
