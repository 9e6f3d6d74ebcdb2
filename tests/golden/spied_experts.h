// For tests of expert deferral: an ExpertGroup that shows what a backend asks, and can change an answer to
// see where it goes.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::golden {

// Notes the calls of a step and adds to the answer of one of them.
struct Spy {
  struct Call {
    int32_t layer;
    std::vector<int32_t> ids;
    std::vector<float> weights, activations;
  };
  std::vector<Call> calls;
  int change = -1;  // the answer of this call
};

class SpiedExperts : public attention::ExpertGroup {
 public:
  SpiedExperts(std::unique_ptr<attention::ExpertGroup> experts, int64_t hidden, Spy& spy)
      : experts_(std::move(experts)), hidden_(hidden), spy_(spy) {}
  absl::Status Start(const attention::ExpertCall& c) override {
    const int64_t pairs = int64_t{c.n_tokens} * c.experts_per_token;
    values_ = c.n_tokens * hidden_;
    spy_.calls.push_back({c.layer,
                          {c.expert_ids, c.expert_ids + pairs},
                          {c.expert_weights, c.expert_weights + pairs},
                          {c.activations, c.activations + values_}});
    return experts_->Start(c);
  }
  absl::Status Finish(float* out) override {
    absl::Status status = experts_->Finish(out);
    if (static_cast<int>(spy_.calls.size()) == spy_.change + 1) {
      for (int64_t i = 0; i < values_; ++i) out[i] += i % 2 == 0 ? 0.5f : -0.5f;
    }
    return status;
  }
  absl::Status Recover(absl::Duration patience) override { return experts_->Recover(patience); }
  int processes() const override { return experts_->processes(); }

 private:
  std::unique_ptr<attention::ExpertGroup> experts_;
  const int64_t hidden_;
  int64_t values_ = 0;
  Spy& spy_;
};

// Runs `step`, which decodes one token with experts deferred in all MoE layers but the last, with each of its
// calls' answers changed in turn. What is due is seen by the next layer's experts, what is deferred by those
// of the layer after it.
inline void ExpectDeferredALayerLater(Spy& spy, const std::function<void()>& step) {
  const auto run = [&](int change) {
    spy.change = change;
    spy.calls.clear();
    step();
    return spy.calls;
  };
  const std::vector<Spy::Call> before = run(-1);
  ASSERT_GE(before.size(), 7u);
  for (size_t change = 0; change < before.size(); ++change) {
    const std::vector<Spy::Call> calls = run(static_cast<int>(change));
    ASSERT_EQ(calls.size(), before.size());
    const size_t first_other = change / 2 + (change % 2 == 0 ? 1 : 2);  // layer
    for (size_t i = 0; i < calls.size(); ++i) {
      EXPECT_EQ(calls[i].activations == before[i].activations, i / 2 < first_other)
          << "change of call " << change << ", call " << i;
    }
  }
  spy.change = -1;
}

}  // namespace tandem::golden
