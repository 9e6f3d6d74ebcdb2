// For tests: a backend whose next token is a hash of all tokens before it, read back from its paged "cache".
// Whatever the scheduler mixes up (pages, positions, order, a lost or doubled token, a page given to two)
// changes the answer.
#pragma once

#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "services/attention_gpu/scheduler/scheduler.h"

namespace tandem::attention {

constexpr int32_t kHashVocab = 1000;
constexpr int32_t kHashPageTokens = 4;
constexpr int32_t kHashStepTokens = 64;

inline int32_t HashToken(const std::vector<int32_t>& tokens) {
  uint64_t h = 1469598103934665603u;
  for (int32_t t : tokens) h = (h ^ static_cast<uint64_t>(t + 1)) * 1099511628211u;
  return static_cast<int32_t>((h >> 20) % (kHashVocab - 1)) + 1;
}

// What a sequence of this prompt is to answer.
inline std::vector<int32_t> HashAnswer(std::vector<int32_t> tokens, int n) {
  std::vector<int32_t> out;
  for (int i = 0; i < n; ++i) {
    out.push_back(HashToken(tokens));
    tokens.push_back(out.back());
  }
  return out;
}

// What the backend is to do, and what it saw. Thread-safe.
class HashScript {
 public:
  // The next steps end with these, the last one first.
  void FailSteps(std::vector<absl::Status> from_the_back) {
    const std::lock_guard lock(mutex_);
    step_errors_ = std::move(from_the_back);
  }
  // From now on, each `every`th step fails as if experts were gone; 0: none.
  void LoseEvery(int every) {
    const std::lock_guard lock(mutex_);
    lose_every_ = every;
  }
  void SetRecovery(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    recovery_ = status;
  }
  // Pages cannot be copied to or from the host from now on.
  void FailCopies(bool fail) {
    const std::lock_guard lock(mutex_);
    fail_copies_ = fail;
  }
  // Steps wait while it is held.
  void Hold() {
    const std::lock_guard lock(mutex_);
    held_ = true;
  }
  void Go() {
    const std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  // Long steps made beside others are done after so many looks; and the errors that the next ones end with.
  void SetLong(int looks, std::vector<absl::Status> from_the_back = {}) {
    const std::lock_guard lock(mutex_);
    long_looks_ = looks;
    long_errors_ = std::move(from_the_back);
  }
  int64_t long_steps() const { return Read(long_steps_); }
  int64_t long_tokens() const { return Read(long_tokens_); }
  int64_t steps_beside() const { return Read(steps_beside_); }  // while a long one was under way
  int64_t dropped() const { return Read(dropped_); }
  int max_sequences() const { return Read(max_sequences_); }
  int max_tokens() const { return Read(max_tokens_); }
  int64_t tokens() const { return Read(tokens_); }
  int64_t steps() const { return Read(steps_); }

 private:
  friend class HashBackend;
  template <typename T>
  T Read(const T& value) const {
    const std::lock_guard lock(mutex_);
    return value;
  }
  absl::Status OnStep(const StepBatch& batch) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !held_; });
    ++steps_;
    max_sequences_ = std::max(max_sequences_, static_cast<int>(batch.sequences.size()));
    max_tokens_ = std::max(max_tokens_, static_cast<int>(batch.tokens.size()));
    if (!step_errors_.empty()) {
      absl::Status s = step_errors_.back();
      step_errors_.pop_back();
      if (!s.ok()) return s;
    }
    if (lose_every_ > 0 && steps_ % lose_every_ == 0) return absl::UnavailableError("expert gone");
    tokens_ += static_cast<int64_t>(batch.tokens.size());
    return absl::OkStatus();
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<absl::Status> step_errors_;
  absl::Status recovery_;
  int lose_every_ = 0;
  bool fail_copies_ = false;
  bool held_ = false;
  int max_sequences_ = 0, max_tokens_ = 0;
  int64_t tokens_ = 0, steps_ = 0;
  int long_looks_ = 0;
  std::vector<absl::Status> long_errors_;
  int64_t long_steps_ = 0, long_tokens_ = 0, steps_beside_ = 0, dropped_ = 0;
};

class HashBackend : public Backend {
 public:
  HashBackend(int32_t pages, HashScript& script) : cache_(pages * kHashPageTokens, -1), script_(script) {}
  std::string name() const override { return "hash"; }
  int32_t page_tokens() const override { return kHashPageTokens; }
  int32_t page_count() const override { return static_cast<int32_t>(cache_.size()) / kHashPageTokens; }
  int32_t max_step_tokens() const override { return most_tokens; }
  int32_t max_long_tokens() const override { return kHashStepTokens; }
  int32_t long_prompt_tokens() const override { return long_prompt; }
  int32_t long_step_tokens(int64_t prompt_tokens, bool others_decode) const override {
    return long_step ? long_step(prompt_tokens, others_decode) : max_long_tokens();
  }
  int32_t most_tokens = kHashStepTokens;  // of a step that is not of long prompts
  int32_t long_prompt = 0;
  std::function<int32_t(int64_t prompt_tokens, bool others_decode)> long_step;
  bool beside = false;  // long steps are made beside others

  absl::Status Step(const StepBatch& batch, StepResult* result) override {
    const auto n = static_cast<int32_t>(batch.tokens.size());
    EXPECT_TRUE(n <= most_tokens || (long_prompt > 0 && n >= long_prompt)) << "a step of " << n << " tokens";
    if (long_) {
      const std::lock_guard lock(script_.mutex_);
      ++script_.steps_beside_;
      for (const StepSequence& s : batch.sequences) {
        for (const StepSequence& l : long_->sequences) EXPECT_NE(s.params, l.params) << "in both steps";
      }
    }
    return Compute(batch, script_.OnStep(batch), result);
  }

  bool long_beside_others() const override { return beside; }
  absl::Status BeginLong(const StepBatch& batch) override {
    EXPECT_FALSE(long_) << "one at a time";
    EXPECT_GE(static_cast<int32_t>(batch.tokens.size()), long_prompt);
    const std::lock_guard lock(script_.mutex_);
    long_ = batch;
    looks_ = 0;
    ++script_.long_steps_;
    return absl::OkStatus();
  }
  absl::StatusOr<bool> AwaitLong(absl::Duration most, StepResult* result) override {
    EXPECT_TRUE(long_);
    if (++looks_ < script_.Read(script_.long_looks_)) {
      absl::SleepFor(std::min(most, absl::Milliseconds(1)));
      return false;
    }
    const StepBatch batch = *std::exchange(long_, std::nullopt);
    absl::Status status;
    {
      const std::lock_guard lock(script_.mutex_);
      if (!script_.long_errors_.empty()) {
        status = script_.long_errors_.back();
        script_.long_errors_.pop_back();
      }
      if (status.ok()) script_.long_tokens_ += static_cast<int64_t>(batch.tokens.size());
    }
    const absl::Status computed = Compute(batch, status, result);
    if (!computed.ok()) return computed;
    return true;
  }
  void DropLong() override {
    if (!long_) return;
    const StepBatch batch = *std::exchange(long_, std::nullopt);
    StepResult none;
    (void)Compute(batch, absl::CancelledError("dropped"), &none);
    const std::lock_guard lock(script_.mutex_);
    ++script_.dropped_;
  }

  // A step that ends with `status`.
  absl::Status Compute(const StepBatch& batch, const absl::Status& status, StepResult* result) {
    EXPECT_LE(batch.tokens.size(), static_cast<size_t>(kHashStepTokens));
    EXPECT_FALSE(batch.sequences.empty());
    CheckWrites(batch);
    // A failed step leaves rubbish where it was to write.
    for (const StepSequence& s : batch.sequences) {
      for (int32_t i = 0; i < s.count; ++i) {
        Entry(s, s.position + i) = status.ok() ? batch.tokens[s.first + i] : -7;
      }
    }
    if (!status.ok()) return status;
    result->sampled.assign(batch.sequences.size(), {});
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const StepSequence& s = batch.sequences[i];
      std::vector<int32_t> all;
      for (int32_t p = 0; p < s.position + s.count; ++p) all.push_back(Entry(s, p));
      if (!s.sample) continue;
      result->sampled[i].token = HashToken(all);
      result->sampled[i].top.resize(s.params->top_logprobs, {kHashVocab - 1, -1.5f});
    }
    return absl::OkStatus();
  }

  int64_t page_bytes() const override { return kHashPageTokens * sizeof(int32_t); }
  absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) override {
    if (script_.Read(script_.fail_copies_)) return absl::InternalError("copy");
    EXPECT_EQ(static_cast<int64_t>(to.size()), page_bytes());
    std::memcpy(to.data(), &cache_[page * kHashPageTokens], to.size());
    return absl::OkStatus();
  }
  absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) override {
    if (script_.Read(script_.fail_copies_)) return absl::InternalError("copy");
    EXPECT_EQ(static_cast<int64_t>(from.size()), page_bytes());
    std::memcpy(&cache_[page * kHashPageTokens], from.data(), from.size());
    return absl::OkStatus();
  }
  absl::Status RecoverExperts(absl::Duration) override {
    EXPECT_FALSE(long_) << "dropped before";
    return script_.Read(script_.recovery_);
  }

  // What lies in a page.
  int32_t& At(int32_t page, int32_t i) { return cache_[page * kHashPageTokens + i]; }

 private:
  int32_t& Entry(const StepSequence& s, int32_t position) {
    return At(s.pages[position / kHashPageTokens], position % kHashPageTokens);
  }

  // A page that a step writes is in one sequence's list only.
  void CheckWrites(const StepBatch& batch) {
    std::map<int32_t, int> uses;
    for (const StepSequence& s : batch.sequences) {
      for (int32_t page : s.pages) ++uses[page];
    }
    for (const StepSequence& s : batch.sequences) {
      const int32_t last = (s.position + s.count - 1) / kHashPageTokens;
      ASSERT_LT(last, static_cast<int32_t>(s.pages.size()));
      for (int32_t i = s.position / kHashPageTokens; i <= last; ++i) {
        EXPECT_EQ(uses[s.pages[i]], 1) << "page " << s.pages[i] << " is written and shared";
      }
    }
  }

  std::vector<int32_t> cache_;
  HashScript& script_;
  std::optional<StepBatch> long_;
  int looks_ = 0;
};

}  // namespace tandem::attention
