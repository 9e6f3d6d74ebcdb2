// Expert deferral in the CPU backend, over the bundled model: what is asked of the experts and when their
// answers count, and how far the answers of generated tokens move.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/attention_gpu/experts/deferral.h"
#include "tests/golden/spied_model.h"

namespace tandem::golden {
namespace {

using attention::StepBatch;
using attention::StepResult;
using testing::Each;
using testing::Ge;

constexpr int32_t kPages = 128;
constexpr int32_t kTopK = 4;  // of the bundled model
constexpr size_t kMoeLayers = 5;
class Model {
 public:
  explicit Model(int32_t defer_experts) : model_(defer_experts, kPages) {
    for (int32_t p = 0; p < kPages; ++p) pages_.push_back(p);
  }

  // Tokens at `position` of a sequence whose prompt has `prompt` tokens.
  StepResult Run(const std::vector<int32_t>& tokens, int32_t position, int32_t prompt) {
    StepBatch batch = OneSequence(tokens, position, pages_);
    batch.want_logits = true;
    batch.sequences[0].generated_from = prompt;
    StepResult r;
    model_.spy.calls.clear();
    const absl::Status status = model_.backend->Step(batch, &r);
    EXPECT_TRUE(status.ok()) << status;
    return r;
  }
  // The token after the prompt.
  int32_t Prefill(const std::vector<int32_t>& tokens) {
    int32_t next = 0;
    for (size_t at = 0; at < tokens.size(); at += 256) {
      const std::vector<int32_t> chunk(tokens.begin() + at,
                                       tokens.begin() + std::min(at + 256, tokens.size()));
      next = Run(chunk, static_cast<int32_t>(at), static_cast<int32_t>(tokens.size())).sampled[0].token;
    }
    return next;
  }
  Spy& spy() { return model_.spy; }
  int64_t vocab() const { return model_.config.vocab_size; }

 private:
  SpiedModel model_;
  std::vector<int32_t> pages_;
};

TEST(Deferral, APromptIsOneCallALayerAGeneratedTokenTwoButForTheLast) {
  Model m(2);
  const Prompt p = Prompts()[2];
  const auto size = static_cast<int32_t>(p.tokens.size());
  const int32_t next = m.Prefill(p.tokens);
  ASSERT_EQ(m.spy().calls.size(), kMoeLayers);
  for (const Spy::Call& call : m.spy().calls) EXPECT_THAT(call.ids, Each(Ge(0)));

  const StepResult r = m.Run({next}, size, size);
  const auto& calls = m.spy().calls;
  ASSERT_EQ(calls.size(), 2 * kMoeLayers - 1);
  for (size_t l = 0; l < kMoeLayers; ++l) {
    const auto& whole = r.routing[l];
    EXPECT_EQ(calls[2 * l].layer, whole.layer);
    if (l + 1 == kMoeLayers) {
      EXPECT_EQ(calls[2 * l].ids, whole.expert_ids) << "nothing is deferred beyond the last layer";
      break;
    }
    attention::SplitRouting split;
    split.Assign(whole.expert_ids.data(), whole.expert_weights.data(), std::vector<int32_t>{1}, kTopK, 2);
    EXPECT_EQ(calls[2 * l].ids, split.ids);
    EXPECT_EQ(calls[2 * l].weights, split.weights);
    EXPECT_EQ(calls[2 * l + 1].layer, whole.layer);
    EXPECT_EQ(calls[2 * l + 1].ids, split.later_ids);
    EXPECT_EQ(calls[2 * l + 1].weights, split.later_weights);
    EXPECT_EQ(calls[2 * l + 1].activations, calls[2 * l].activations);
  }
}

TEST(Deferral, WhatIsDeferredReachesTheLayerAfterTheNext) {
  Model m(1);
  const Prompt p = Prompts()[1];
  const auto size = static_cast<int32_t>(p.tokens.size());
  const int32_t next = m.Prefill(p.tokens);
  std::vector<float> plain;
  ExpectDeferredALayerLater(m.spy(), [&] {
    const StepResult r = m.Run({next}, size, size);
    if (plain.empty()) plain = r.logits;
    EXPECT_EQ(r.logits == plain, m.spy().change < 0) << "an answer is lost";
  });
}

TEST(Deferral, TooManyAreRefused) {
  auto file = gguf::File::Open(SourceDir() + "/models/tinyr1-Q4_K_M.gguf");
  const auto config = model::ReadModelConfig(**file);
  attention::CpuBackendOptions o;
  o.page_count = 4;
  o.defer_experts = 4;
  const absl::Status s = attention::CreateCpuBackend(**file, *config, o, nullptr).status();
  EXPECT_TRUE(absl::IsInvalidArgument(s));
  EXPECT_THAT(std::string(s.message()), testing::HasSubstr("goes to 4 experts, of which 0 to 3"));
}

// Of `got` from `want`, nats.
double Divergence(const float* got, const float* want, int64_t vocab) {
  const auto log_sum = [vocab](const float* l) {
    const float top = *std::max_element(l, l + vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double{l[i]} - top);
    return top + std::log(sum);
  };
  const double a = log_sum(got), b = log_sum(want);
  double kl = 0;
  for (int64_t i = 0; i < vocab; ++i) kl += std::exp(want[i] - b) * ((want[i] - b) - (got[i] - a));
  return kl;
}

// Along the text that nothing deferred gives: how often the next token is the same, and how far the
// distributions are apart. And freely: how much of the text is the same up to its first difference.
TEST(Deferral, MovesAnswersALittle) {
  Model plain(0);
  for (int32_t defer = 1; defer < kTopK; ++defer) {
    Model m(defer);
    size_t alike = 0, all = 0, free_alike = 0, free_all = 0;
    double kl = 0;
    for (const Prompt& p : Prompts()) {
      const auto size = static_cast<int32_t>(p.tokens.size());
      EXPECT_EQ(plain.Prefill(p.tokens), p.greedy[0]);
      EXPECT_EQ(m.Prefill(p.tokens), p.greedy[0]) << "prompts defer nothing";
      for (size_t i = 0; i + 1 < p.greedy.size(); ++i) {
        const auto at = size + static_cast<int32_t>(i);
        const StepResult want = plain.Run({p.greedy[i]}, at, size), got = m.Run({p.greedy[i]}, at, size);
        alike += got.sampled[0].token == want.sampled[0].token ? 1 : 0;
        ++all;
        kl += Divergence(got.logits.data(), want.logits.data(), m.vocab());
      }
      int32_t token = p.greedy[0];
      bool same = true;
      for (size_t i = 0; i + 1 < p.greedy.size() && same; ++i) {
        token = m.Run({token}, size + static_cast<int32_t>(i), size).sampled[0].token;
        same = token == p.greedy[i + 1];
        free_alike += same ? 1 : 0;
      }
      free_all += p.greedy.size() - 1;
    }
    std::cout << "of " << kTopK << " experts " << defer << " deferred: " << alike << " of " << all
              << " next tokens the same, mean KL " << kl / static_cast<double>(all) << " nats; " << free_alike
              << " of " << free_all << " tokens of free texts up to the first difference\n";
    if (defer == 1) {
      EXPECT_GT(alike, all * 9 / 10);
    }
    EXPECT_GT(kl, 0);
  }
}

}  // namespace
}  // namespace tandem::golden
