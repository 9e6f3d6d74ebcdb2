// The GPU's choices against Sample().
#include "services/attention_gpu/backend/cuda/sampler.h"

#include <cmath>
#include <limits>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using testing::Check;
using testing::DeviceArray;
using Counts = std::unordered_map<int32_t, int32_t>;

constexpr int64_t kVocab = 129280;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  std::vector<float> logits;
  SamplingParams params;
  uint64_t position = 0;
  Counts counts;
};

std::string Describe(const SamplingParams& p) {
  return "temperature " + std::to_string(p.temperature) + " top_k " + std::to_string(p.top_k) + " top_p " +
         std::to_string(p.top_p) + " min_p " + std::to_string(p.min_p) + " seed " + std::to_string(p.seed);
}

std::unique_ptr<Sampler> MakeSampler(int64_t vocab) {
  auto sampler = Sampler::Create(vocab);
  EXPECT_TRUE(sampler.ok()) << sampler.status();
  return *std::move(sampler);
}

// What the GPU chooses for all cases at once.
std::vector<SampledToken> OnGpu(Sampler& sampler, const std::vector<Case>& cases, int64_t vocab) {
  std::vector<float> logits;
  std::vector<Sampler::Request> requests;
  for (const Case& c : cases) {
    logits.insert(logits.end(), c.logits.begin(), c.logits.end());
    requests.push_back({&c.params, c.position, &c.counts});
  }
  const DeviceArray<float> d_logits(logits);
  EXPECT_EQ(logits.size(), cases.size() * static_cast<size_t>(vocab));
  EXPECT_TRUE(sampler.Stage(requests).ok());
  EXPECT_TRUE(sampler.Launch(d_logits.get(), static_cast<int64_t>(cases.size()), nullptr).ok());
  Check(cudaDeviceSynchronize());
  std::vector<SampledToken> out;
  for (size_t i = 0; i < cases.size(); ++i) out.push_back(sampler.Read(static_cast<int64_t>(i)));
  std::vector<int32_t> tokens(cases.size());
  Check(cudaMemcpy(tokens.data(), sampler.device_tokens(), tokens.size() * sizeof(int32_t),
                   cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(tokens[i], out[i].token);
  return out;
}

// NaN and infinite alike; else up to float32's rounding.
void ExpectLogprob(float got, float want, const std::string& what) {
  if (std::isfinite(want)) {
    EXPECT_NEAR(got, want, 1e-6f * (1 + std::abs(want))) << what;
  } else {
    EXPECT_THAT(got, ::testing::NanSensitiveFloatEq(want)) << what;
  }
}

// How many tokens differ from Sample()'s; log-probabilities must agree.
int CountDifferent(Sampler& sampler, const std::vector<Case>& cases, int64_t vocab) {
  const std::vector<SampledToken> got = OnGpu(sampler, cases, vocab);
  int different = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<float> logits = cases[i].logits;
    const SampledToken want = Sample(logits, cases[i].params, cases[i].position, cases[i].counts);
    if (got[i].token != want.token) {
      ++different;
      std::printf("row %zu: %d, Sample() takes %d; %s\n", i, got[i].token, want.token,
                  Describe(cases[i].params).c_str());
      continue;
    }
    EXPECT_EQ(got[i].top.size(), want.top.size());
    if (!cases[i].params.logprobs) continue;
    const std::string row = "row " + std::to_string(i);
    ExpectLogprob(got[i].logprob, want.logprob, row);
    for (size_t k = 0; k < std::min(got[i].top.size(), want.top.size()); ++k) {
      EXPECT_EQ(got[i].top[k].token, want.top[k].token) << row << ", place " << k;
      ExpectLogprob(got[i].top[k].logprob, want.top[k].logprob, row);
    }
  }
  return different;
}

// Logits of many kinds.
std::vector<float> SomeLogits(std::mt19937& rng, int64_t vocab) {
  const int kind = static_cast<int>(rng() % 8);
  const float width = std::exp(std::uniform_real_distribution<float>(-1, 2)(rng));  // 0.4 to 7
  std::normal_distribution<float> normal(0, width);
  std::vector<float> l(static_cast<size_t>(vocab));
  for (float& x : l) x = normal(rng);
  auto any = [&] { return rng() % l.size(); };
  if (kind == 1) {  // a few tokens far above the rest, as a model has them
    for (int i = 0; i < 30; ++i) l[any()] += 10 + normal(rng);
  } else if (kind == 2) {  // many equal values
    for (float& x : l) x = std::round(x * 2) / 2;
  } else if (kind == 3) {  // few equal values
    for (float& x : l) x = std::round(x * 1024) / 1024;
  } else if (kind == 4) {  // most is impossible
    for (float& x : l) x = rng() % 100 < 97 ? -kInf : x;
    l[any()] = 1;
  } else if (kind == 5) {  // some is broken
    for (int i = 0; i < 50; ++i) l[any()] = i % 2 == 0 ? kNan : -kInf;
  } else if (kind == 6) {  // a wide range
    for (float& x : l) x *= 40;
  }
  return l;
}

Case SomeCase(std::mt19937& rng, int64_t vocab) {
  auto real = [&](float low, float high) { return std::uniform_real_distribution<float>(low, high)(rng); };
  auto one_in = [&](int n) { return rng() % n == 0; };
  Case c;
  c.logits = SomeLogits(rng, vocab);
  SamplingParams& p = c.params;
  p.temperature = one_in(12) ? 0 : one_in(6) ? real(2, 50) : real(0.05f, 2);
  if (one_in(2)) p.top_p = one_in(3) ? real(0.99f, 1) : real(0.05f, 1);
  if (one_in(3)) p.top_k = one_in(3) ? 1 + rng() % vocab : 1 + rng() % 100;
  if (one_in(3)) p.min_p = one_in(3) ? real(0, 1e-5f) : real(0, 0.5f);
  p.seed = rng();
  c.position = rng() % 100000;
  if (one_in(4)) p.presence_penalty = real(-2, 2);
  if (one_in(4)) p.frequency_penalty = real(-2, 2);
  if (one_in(4)) p.repetition_penalty = real(0.5f, 2);
  if (one_in(3)) {
    const size_t n = rng() % 500;
    for (size_t i = 0; i < n; ++i)
      c.counts[static_cast<int32_t>(rng() % vocab)] = static_cast<int32_t>(rng() % 20);
  }
  if (one_in(4)) {
    for (int i = 0; i < 20; ++i) {
      p.logit_bias.push_back({static_cast<int32_t>(rng() % vocab), real(-100, 20)});
    }
    p.logit_bias.push_back({p.logit_bias.front().first, 1.5f});  // the same token again
  }
  p.logprobs = one_in(3);
  p.top_logprobs = rng() % 21;
  return c;
}

void RandomCases(uint32_t seed, int64_t vocab, int launches) {
  std::mt19937 rng(seed);
  const auto sampler = MakeSampler(vocab);
  int different = 0, cases = 0;
  for (int i = 0; i < launches; ++i) {
    // From one row to all: the blocks that share a row differ.
    const int rows = i % 4 == 0 ? 1 + static_cast<int>(rng() % 16) : static_cast<int>(Sampler::kMaxRows);
    std::vector<Case> batch;
    for (int r = 0; r < rows; ++r) batch.push_back(SomeCase(rng, vocab));
    different += CountDifferent(*sampler, batch, vocab);
    cases += rows;
  }
  std::printf("vocabulary %lld: %d of %d tokens differ from Sample()'s\n", static_cast<long long>(vocab),
              different, cases);
  EXPECT_EQ(different, 0);
}

TEST(CudaSampler, ChoosesWhatTheCpuChooses) {
  TANDEM_NEEDS_GPU();
  RandomCases(1, kVocab, 8);
}

TEST(CudaSampler, ChoosesWhatTheCpuChoosesAmongFew) {
  TANDEM_NEEDS_GPU();
  RandomCases(2, 5003, 60);  // rows that are not aligned to 16 bytes
  RandomCases(3, 4096, 20);
  RandomCases(4, 7, 10);
  RandomCases(5, 1, 2);
}

// Places far down, which the bins alone do not show.
TEST(CudaSampler, FindsPlacesFarDown) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(7);
  std::normal_distribution<float> normal(0, 1);
  const auto sampler = MakeSampler(kVocab);
  std::vector<float> wide(kVocab), narrow(kVocab), equal(kVocab, 2.5f), steps(kVocab), deep(kVocab);
  for (int64_t i = 0; i < kVocab; ++i) {
    wide[i] = normal(rng);
    narrow[i] = normal(rng) * 1e-3f;  // all in one bin
    steps[i] = static_cast<float>(rng() % 3) * 1e-6f;
    deep[i] = -1000 + normal(rng);  // beyond the last bin, but for one
  }
  deep[77] = 0;
  std::vector<Case> cases;
  for (const auto* logits : {&wide, &narrow, &equal, &steps, &deep}) {
    for (int kind = 0; kind < 10; ++kind) {
      SamplingParams p;
      p.temperature = logits == &deep ? 100 : kind % 2 == 0 ? 1.0f : 3.0f;
      p.seed = rng();
      if (kind == 1) p.top_p = 0.9f;
      if (kind == 2) p.top_p = 0.999f;
      if (kind == 3) p.top_k = 5000;
      if (kind == 4) p.top_k = 100000, p.top_p = 0.7f;
      if (kind == 5) p.min_p = 0.01f;
      if (kind == 6) p.min_p = 1e-7f, p.top_p = 0.95f;
      if (kind == 7) p.min_p = 0.3f, p.top_p = 0.99f, p.top_k = 50000;
      if (kind == 8) p.top_k = 2048;
      if (kind == 9) p.top_k = 2049;
      cases.push_back({*logits, p, static_cast<uint64_t>(kind), {}});
      if (cases.size() == 25) {
        EXPECT_EQ(CountDifferent(*sampler, cases, kVocab), 0);
        cases.clear();
      }
    }
  }
}

TEST(CudaSampler, BrokenLogitsEndLikeOnTheCpu) {
  TANDEM_NEEDS_GPU();
  const int64_t vocab = 1000;
  const auto sampler = MakeSampler(vocab);
  std::vector<std::vector<float>> kinds(6, std::vector<float>(vocab, 0.25f));
  kinds[0].assign(vocab, kNan);
  kinds[1].assign(vocab, -kInf);
  kinds[2][500] = kinds[2][900] = kInf;
  kinds[3].assign(vocab, kInf);
  kinds[4].assign(vocab, kNan);
  kinds[4][999] = -3;
  for (int64_t i = 0; i < vocab; ++i) kinds[5][i] = i % 2 == 0 ? 3e38f : -3e38f;
  std::vector<Case> cases;
  for (const auto& logits : kinds) {
    for (int k = 0; k < 5; ++k) {
      Case c;
      c.logits = logits;
      c.params.temperature = k == 0 ? 0.0f : 1.0f;
      if (k == 2) c.params.top_p = 0.5f;
      if (k == 3) c.params.top_k = 5;
      if (k == 4) c.params.min_p = 0.1f;
      c.params.seed = static_cast<uint64_t>(k);
      cases.push_back(c);
    }
  }
  EXPECT_EQ(CountDifferent(*sampler, cases, vocab), 0);
  // Log-probabilities of such logits are NaN or infinite, on both sides.
  for (Case& c : cases) c.params.logprobs = true, c.params.top_logprobs = 3;
  const std::vector<SampledToken> got = OnGpu(*sampler, cases, vocab);
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<float> logits = cases[i].logits;
    const SampledToken want = Sample(logits, cases[i].params, 0, {});
    EXPECT_EQ(got[i].token, want.token);
    ExpectLogprob(got[i].logprob, want.logprob, "row " + std::to_string(i));
    ASSERT_EQ(got[i].top.size(), 3u);
    for (size_t k = 0; k < 3; ++k) {
      EXPECT_EQ(got[i].top[k].token, want.top[k].token) << "row " << i;
      ExpectLogprob(got[i].top[k].logprob, want.top[k].logprob, "row " + std::to_string(i));
    }
  }
}

// More changed logits than there is room for at first; the captured graph must see the new place.
TEST(CudaSampler, AGraphUsesWhatWasStagedLast) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(9);
  const auto sampler = MakeSampler(kVocab);
  constexpr int kRows = 8;
  const DeviceArray<float> logits(kRows * kVocab);
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_TRUE(sampler->Launch(logits.get(), kRows, stream).ok());
  cudaGraph_t graph;
  cudaGraphExec_t run;
  Check(cudaStreamEndCapture(stream, &graph));
  Check(cudaGraphInstantiate(&run, graph, 0));
  for (int round = 0; round < 6; ++round) {
    std::vector<Case> cases;
    std::vector<float> all;
    std::vector<Sampler::Request> requests;
    for (int r = 0; r < kRows; ++r) {
      cases.push_back(SomeCase(rng, kVocab));
      if (round == 4) {  // every token
        cases.back().params.presence_penalty = 0.5f;
        for (int32_t i = 0; i < kVocab; ++i) cases.back().counts[i] = 1 + i % 5;
      }
      all.insert(all.end(), cases.back().logits.begin(), cases.back().logits.end());
    }
    // Row 3 is idle, and in odd rounds all from 5 on.
    const int staged = round % 2 == 1 ? 5 : kRows;
    for (int r = 0; r < staged; ++r) {
      requests.push_back({r == 3 ? nullptr : &cases[r].params, cases[r].position, &cases[r].counts});
    }
    ASSERT_TRUE(sampler->Stage(requests).ok());
    Check(cudaMemcpy(logits.get(), all.data(), all.size() * sizeof(float), cudaMemcpyHostToDevice));
    Check(cudaGraphLaunch(run, stream));
    Check(cudaStreamSynchronize(stream));
    for (int r = 0; r < staged; ++r) {
      if (r == 3) continue;
      const SampledToken want = Sample(cases[r].logits, cases[r].params, cases[r].position, cases[r].counts);
      EXPECT_EQ(sampler->Read(r).token, want.token) << "round " << round << ", row " << r;
    }
  }
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(CudaSampler, GreedyAlone) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(11);
  const auto sampler = MakeSampler(kVocab);
  constexpr int kRows = 6;
  std::vector<float> all;
  std::vector<int32_t> want;
  for (int r = 0; r < kRows; ++r) {
    std::vector<float> logits = SomeLogits(rng, kVocab);
    if (r == 0) logits[777] = logits[70000] = 1e6f;
    if (r == 1) std::fill(logits.begin(), logits.end(), kNan);
    if (r == 2) logits[kVocab - 1] = 1e6f;
    all.insert(all.end(), logits.begin(), logits.end());
    want.push_back(Sample(logits, {}, 0, {}).token);
  }
  const DeviceArray<float> d_logits(all);
  const SamplingParams greedy;
  ASSERT_TRUE(sampler->Stage(std::vector<Sampler::Request>(kRows, {&greedy, 0, nullptr})).ok());
  EXPECT_TRUE(sampler->greedy());
  for (int again = 0; again < 2; ++again) {
    ASSERT_TRUE(sampler->LaunchGreedy(d_logits.get(), kRows, nullptr).ok());
    Check(cudaDeviceSynchronize());
    for (int r = 0; r < kRows; ++r) EXPECT_EQ(sampler->Read(r).token, want[r]) << "row " << r;
  }
  ASSERT_TRUE(sampler->Launch(const_cast<float*>(d_logits.get()), kRows, nullptr).ok());
  Check(cudaDeviceSynchronize());
  for (int r = 0; r < kRows; ++r) EXPECT_EQ(sampler->Read(r).token, want[r]) << "row " << r;
  SamplingParams warm;
  warm.temperature = 1;
  ASSERT_TRUE(sampler->Stage(std::vector<Sampler::Request>{{&greedy, 0, nullptr}, {&warm, 0, nullptr}}).ok());
  EXPECT_FALSE(sampler->greedy());
}

// Small, for compute-sanitizer.
TEST(CudaSampler, AFewRowsOfAll) {
  TANDEM_NEEDS_GPU();
  RandomCases(13, 3000, 2);
}

TEST(CudaSampler, RefusesWhatItCannotDo) {
  TANDEM_NEEDS_GPU();
  EXPECT_EQ(Sampler::Create(kMostSamplingVocab + 1).status().code(), absl::StatusCode::kInvalidArgument);
  const auto sampler = MakeSampler(100);
  SamplingParams p;
  p.logit_bias = {{100, 1.0f}};
  EXPECT_EQ(sampler->Stage(std::vector<Sampler::Request>{{&p, 0, nullptr}}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(sampler->Stage(std::vector<Sampler::Request>(65)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(sampler->Launch(nullptr, 65, nullptr).ok());
}

}  // namespace
}  // namespace tandem::attention::cuda
