// What the CPU backend leaves out in the last layer, over the bundled model: tokens of which no logits are
// asked for end with their latents in the cache. The others get the same bits as if all had been asked for.
#include <cstring>

#include <gtest/gtest.h>

#include "tests/golden/spied_model.h"

namespace tandem::golden {
namespace {

using attention::SampledToken;
using attention::StepBatch;
using attention::StepResult;
using attention::StepSequence;

constexpr int32_t kTopK = 4;  // of the bundled model
constexpr size_t kMoeLayers = 5;
const std::vector<int32_t> kPages[] = {{9, 3}, {17, 30}, {40, 2}};

class Model {
 public:
  explicit Model(int32_t defer_experts) : model_(defer_experts, 64) {
    params_.logprobs = true;
    params_.top_logprobs = 20;
  }

  // Tokens [from, from + count) of the text in sequence `number`, of which those from `prompt` on count as
  // generated.
  void Add(int number, int32_t from, int32_t count, int32_t prompt, bool sample) {
    static const std::vector<int32_t> text = Prompts()[2].tokens;
    StepSequence s;
    s.first = static_cast<int32_t>(batch_.tokens.size());
    s.count = count;
    s.position = from;
    s.pages = kPages[number];
    s.generated_from = prompt;
    s.sample = sample;
    s.params = &params_;
    s.counts = &counts_;
    batch_.tokens.insert(batch_.tokens.end(), text.begin() + from, text.begin() + from + count);
    batch_.sequences.push_back(s);
  }
  std::vector<SampledToken> Run(bool all_logits) {
    batch_.want_logits = all_logits;
    model_.spy.calls.clear();
    StepResult r;
    const absl::Status status = model_.backend->Step(batch_, &r);
    EXPECT_TRUE(status.ok()) << status;
    batch_ = StepBatch();
    return r.sampled;
  }
  // Tokens in the step's calls for the MoE layers, in order.
  std::vector<size_t> TokensOfCalls() const {
    std::vector<size_t> tokens;
    for (const Spy::Call& call : model_.spy.calls) tokens.push_back(call.ids.size() / kTopK);
    return tokens;
  }

 private:
  SpiedModel model_;
  attention::SamplingParams params_;
  std::unordered_map<int32_t, int32_t> counts_;
  StepBatch batch_;
};

void ExpectSame(const SampledToken& a, const SampledToken& b) {
  EXPECT_EQ(a.token, b.token);
  EXPECT_EQ(std::memcmp(&a.logprob, &b.logprob, sizeof a.logprob), 0);
  ASSERT_EQ(a.top.size(), 20u);
  ASSERT_EQ(b.top.size(), 20u);
  for (size_t i = 0; i < a.top.size(); ++i) {
    EXPECT_EQ(a.top[i].token, b.top[i].token);
    EXPECT_EQ(std::memcmp(&a.top[i].logprob, &b.top[i].logprob, sizeof(float)), 0);
  }
}

class LastLayer : public testing::TestWithParam<int32_t> {};

TEST_P(LastLayer, GivesWhatIsAskedForTheSameBits) {
  Model all(GetParam()), asked(GetParam());
  const auto run = [&](bool all_logits) {
    Model& m = all_logits ? all : asked;
    m.Add(0, 0, 33, 33, false);  // to be a stream
    m.Run(all_logits);
    m.Add(1, 0, 20, 40, false);  // the first part of a prompt
    m.Add(0, 33, 1, 33, true);   // a stream
    m.Add(2, 0, 30, 30, true);   // a whole prompt
    std::vector<SampledToken> sampled = m.Run(all_logits);
    m.Add(1, 20, 20, 40, true);
    m.Add(0, 34, 1, 33, true);
    for (const SampledToken& s : m.Run(all_logits)) sampled.push_back(s);
    return sampled;
  };
  const std::vector<SampledToken> want = run(true), got = run(false);
  ASSERT_EQ(want.size(), 5u);
  ASSERT_EQ(got.size(), 5u);
  for (const size_t i : {1, 2, 3, 4}) {
    SCOPED_TRACE(i);
    ExpectSame(want[i], got[i]);
  }
}
INSTANTIATE_TEST_SUITE_P(Deferred, LastLayer, testing::Values(0, 2));

TEST(LastLayer, HasOnlyTheTokensThatAreAskedFor) {
  Model m(0);
  m.Add(0, 0, 33, 33, false);
  m.Run(false);
  EXPECT_EQ(m.TokensOfCalls(), std::vector<size_t>(kMoeLayers - 1, 33)) << "no call for the last layer";
  m.Add(1, 0, 20, 20, true);
  m.Add(0, 33, 2, 40, false);
  m.Run(false);
  std::vector<size_t> tokens(kMoeLayers, 22);
  tokens.back() = 1;
  EXPECT_EQ(m.TokensOfCalls(), tokens);
}

}  // namespace
}  // namespace tandem::golden
