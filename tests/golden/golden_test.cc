// The model against an independent implementation: golden data of Hugging Face transformers
// (tests/golden/demo, see its README). The Q4_K_M file is in the repository; the BF16, Q8_0 and old-layout
// files are looked for in TANDEM_SHARED or ../shared and their tests are skipped where they are not.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "common/kernels/kernels.h"
#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "tests/golden/golden_prompts.h"
#include "tests/golden/local_experts.h"

namespace tandem::golden {
namespace {

using attention::Backend;
using attention::StepBatch;
using attention::StepResult;
using attention::StepSequence;
using kernels::Precision;

constexpr int32_t kPageTokens = 32;
constexpr int32_t kContext = 4096;
std::string SharedModel(const std::string& name) {
  const char* shared = std::getenv("TANDEM_SHARED");
  return (shared != nullptr ? std::string(shared) : SourceDir() + "/../shared") + "/demo_model/" + name;
}

template <typename T>
std::vector<T> ReadArray(const std::string& name) {
  std::ifstream in(SourceDir() + "/tests/golden/demo/" + name, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

struct Golden {
  int64_t vocab = 0, top = 0, k = 0, moe_layers = 0;
  std::vector<Prompt> prompts;
};

const Golden& GoldenData() {
  static const Golden golden = [] {
    std::ifstream in(SourceDir() + "/tests/golden/demo/golden.json");
    const auto j = nlohmann::json::parse(in);
    Golden g;
    g.vocab = j["vocab_size"];
    g.top = j["top"];
    g.k = j["experts_per_token"];
    g.moe_layers = j["moe_layers"];
    g.prompts = Prompts();
    return g;
  }();
  return golden;
}

struct RunOptions {
  std::string path;
  Precision precision = Precision::kFast;
  int threads = 2;
  bool weights_too = false;  // the weights of the routed experts must agree
  int chunk = 192;
  std::string groups = "auto";
  std::vector<expert::ShardRequest> shards = {{}};
};

class Model {
 public:
  explicit Model(const RunOptions& s) : options_(s) {
    auto file = gguf::File::Open(s.path);
    if (!file.ok()) throw std::runtime_error(file.status().ToString());
    file_ = std::move(*file);
    auto config = model::ReadModelConfig(*file_, s.groups);
    if (!config.ok()) throw std::runtime_error(config.status().ToString());
    auto experts = MakeLocalExperts(s.path, s.shards, s.precision, s.threads);
    if (!experts.ok()) throw std::runtime_error(experts.status().ToString());
    attention::CpuBackendOptions o;
    o.precision = s.precision;
    o.threads.threads = s.threads;
    o.page_tokens = kPageTokens;
    o.page_count = kContext / kPageTokens;
    auto backend = attention::CreateCpuBackend(*file_, *config, o, std::move(*experts));
    if (!backend.ok()) throw std::runtime_error(backend.status().ToString());
    backend_ = std::move(*backend);
    for (int32_t p = 0; p < o.page_count; ++p) pages_.push_back(p);
  }

  // Runs tokens at `position`; the last of them gets its successor sampled.
  StepResult Run(const std::vector<int32_t>& tokens, int32_t position, bool want_logits) {
    StepBatch batch = OneSequence(tokens, position, pages_);
    batch.want_logits = want_logits;
    StepResult r;
    const absl::Status status = backend_->Step(batch, &r);
    EXPECT_TRUE(status.ok()) << status;
    return r;
  }

  struct Prefilled {
    std::vector<float> logits;                     // [T, vocab]
    std::vector<std::vector<int32_t>> expert_ids;  // a MoE layer: [T, k]
    std::vector<std::vector<float>> expert_weights;
    int32_t next = 0;
  };
  Prefilled Prefill(const std::vector<int32_t>& tokens) {
    Prefilled out;
    for (size_t at = 0; at < tokens.size(); at += options_.chunk) {
      const size_t n = std::min<size_t>(options_.chunk, tokens.size() - at);
      StepResult r =
          Run({tokens.begin() + at, tokens.begin() + at + n}, static_cast<int32_t>(at), /*want_logits=*/true);
      out.logits.insert(out.logits.end(), r.logits.begin(), r.logits.end());
      out.expert_ids.resize(r.routing.size());
      out.expert_weights.resize(r.routing.size());
      for (size_t l = 0; l < r.routing.size(); ++l) {
        const auto& trace = r.routing[l];
        out.expert_ids[l].insert(out.expert_ids[l].end(), trace.expert_ids.begin(), trace.expert_ids.end());
        out.expert_weights[l].insert(out.expert_weights[l].end(), trace.expert_weights.begin(),
                                     trace.expert_weights.end());
      }
      out.next = r.sampled[0].token;
    }
    return out;
  }

  std::vector<int32_t> Greedy(const Prompt& p, int32_t first) {
    std::vector<int32_t> out = {first};
    while (out.size() < p.greedy.size()) {
      out.push_back(
          Run({out.back()}, static_cast<int32_t>(p.tokens.size() + out.size() - 1), false).sampled[0].token);
    }
    return out;
  }

 private:
  RunOptions options_;
  std::unique_ptr<gguf::File> file_;
  std::unique_ptr<Backend> backend_;
  std::vector<int32_t> pages_;
};

struct Agreement {
  double largest = 0;               // difference of a top-20 log-probability at any position
  double largest_last = 0;          // at the last position of a prompt
  std::vector<double> by_position;  // the largest of each
  double Quantile(double q) const {
    std::vector<double> v = by_position;
    std::sort(v.begin(), v.end());
    return v[static_cast<size_t>(q * static_cast<double>(v.size() - 1))];
  }
  double mean_kl = 0;  // over positions, of the golden top-20 against ours, nats
  int64_t positions = 0;
  int64_t routing_differences = 0;  // (layer, token) whose set of experts differs
  int64_t continuations_differ = 0;
};

double LogSumExp(const float* l, int64_t n) {
  const float top = *std::max_element(l, l + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(double{l[i]} - top);
  return top + std::log(sum);
}

void CompareLogprobs(const Prompt& p, const Model::Prefilled& got, Agreement& a) {
  const Golden& g = GoldenData();
  const auto ids = ReadArray<int32_t>(p.name + ".top_ids.i32");
  const auto want = ReadArray<float>(p.name + ".top_logprobs.f32");
  const auto positions = static_cast<int64_t>(p.tokens.size());
  ASSERT_EQ(static_cast<int64_t>(ids.size()), positions * g.top);
  ASSERT_EQ(static_cast<int64_t>(got.logits.size()), positions * g.vocab);
  for (int64_t t = 0; t < positions; ++t) {
    const float* logits = got.logits.data() + t * g.vocab;
    const double total = LogSumExp(logits, g.vocab);
    double kl = 0, worst = 0;
    for (int64_t i = 0; i < g.top; ++i) {
      const double ours = logits[ids[t * g.top + i]] - total;
      const double theirs = want[t * g.top + i];
      const double difference = std::abs(ours - theirs);
      worst = std::max(worst, difference);
      if (t == positions - 1) a.largest_last = std::max(a.largest_last, difference);
      kl += std::exp(theirs) * (theirs - ours);
    }
    a.largest = std::max(a.largest, worst);
    a.by_position.push_back(worst);
    a.mean_kl += kl;
    ++a.positions;
  }
}

void CompareRouting(const Prompt& p, const Model::Prefilled& got, Agreement& a, bool weights_too) {
  const Golden& g = GoldenData();
  const auto ids = ReadArray<int32_t>(p.name + ".expert_ids.i32");
  const auto weights = ReadArray<float>(p.name + ".expert_weights.f32");
  if (ids.empty()) return;  // not recorded for the longest prompt
  const auto tokens = static_cast<int64_t>(p.tokens.size());
  ASSERT_EQ(static_cast<int64_t>(ids.size()), g.moe_layers * tokens * g.k);
  for (int64_t l = 0; l < g.moe_layers; ++l) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::map<int32_t, float> want, ours;
      for (int64_t i = 0; i < g.k; ++i) {
        want[ids[(l * tokens + t) * g.k + i]] = weights[(l * tokens + t) * g.k + i];
        ours[got.expert_ids[l][t * g.k + i]] = got.expert_weights[l][t * g.k + i];
      }
      bool same = want.size() == ours.size();
      for (const auto& [id, w] : want) {
        const auto it = ours.find(id);
        same = same && it != ours.end();
        if (same && weights_too) {
          EXPECT_NEAR(it->second, w, 1e-4) << p.name << " layer " << l << " token " << t;
        }
      }
      a.routing_differences += !same;
    }
  }
}

Agreement Compare(const RunOptions& options) {
  Model model(options);
  Agreement a;
  for (const Prompt& p : GoldenData().prompts) {
    const Model::Prefilled got = model.Prefill(p.tokens);
    CompareLogprobs(p, got, a);
    CompareRouting(p, got, a, options.weights_too);
    const auto continuation = model.Greedy(p, got.next);
    if (continuation != p.greedy) {
      ++a.continuations_differ;
      std::cout << p.name << ": the greedy continuation differs\n";
    }
  }
  a.mean_kl /= static_cast<double>(a.positions);
  std::cout << std::filesystem::path(options.path).filename().string()
            << (options.precision == Precision::kReference ? " reference" : " fast") << ", "
            << kernels::IsaName(kernels::ActiveIsa()) << ": largest difference " << a.largest << " (median "
            << a.Quantile(0.5) << ", 90 % below " << a.Quantile(0.9) << ", at last positions "
            << a.largest_last << "), mean KL " << a.mean_kl << " nats over " << a.positions
            << " positions, routing differs at " << a.routing_differences << "\n";
  return a;
}

std::string Bundled() { return SourceDir() + "/models/tinyr1-Q4_K_M.gguf"; }

#define TANDEM_NEED_MODEL(path)       \
  if (!std::filesystem::exists(path)) \
  GTEST_SKIP() << path << " is not there (it is not part of the repository)"

TEST(Golden, Bf16Reference) {
  const std::string path = SharedModel("tinyr1-bf16.gguf");
  TANDEM_NEED_MODEL(path);
  const Agreement a = Compare({.path = path, .precision = Precision::kReference, .weights_too = true});
  EXPECT_LE(a.largest, 1e-3);
  EXPECT_EQ(a.routing_differences, 0);
  EXPECT_EQ(a.continuations_differ, 0);
}

TEST(Golden, Bf16Fast) {
  const std::string path = SharedModel("tinyr1-bf16.gguf");
  TANDEM_NEED_MODEL(path);
  const Agreement a = Compare({.path = path});
  EXPECT_LE(a.largest, 0.05);
  EXPECT_EQ(a.routing_differences, 0);
  EXPECT_EQ(a.continuations_differ, 0);
}

TEST(Golden, Q8Fast) {
  const std::string path = SharedModel("tinyr1-Q8_0.gguf");
  TANDEM_NEED_MODEL(path);
  const Agreement a = Compare({.path = path});
  EXPECT_LE(a.largest_last, 0.2);
  EXPECT_LE(a.Quantile(0.5), 0.2);
  EXPECT_EQ(a.continuations_differ, 0);
}

// What float32 arithmetic over the same file's weights gives: the file's own distance from the golden data.
TEST(Golden, Q8Reference) {
  const std::string path = SharedModel("tinyr1-Q8_0.gguf");
  TANDEM_NEED_MODEL(path);
  const Agreement a = Compare({.path = path, .precision = Precision::kReference});
  EXPECT_LE(a.largest_last, 0.2);
  EXPECT_EQ(a.continuations_differ, 0);
}

TEST(Golden, BundledQ4) {
  const Agreement a = Compare({.path = Bundled()});
  EXPECT_LE(a.mean_kl, 0.1);
  EXPECT_EQ(a.continuations_differ, 0);
}

TEST(Golden, BundledQ4Reference) {
  const Agreement a = Compare({.path = Bundled(), .precision = Precision::kReference});
  EXPECT_LE(a.mean_kl, 0.1);
  EXPECT_EQ(a.continuations_differ, 0);
}

TEST(Golden, OldLayout) {
  const std::string path = SharedModel("tinyr1-Q4_K_M-oldlayout.gguf");
  TANDEM_NEED_MODEL(path);
  const Agreement a = Compare({.path = path});
  EXPECT_LE(a.mean_kl, 0.1);
  EXPECT_EQ(a.continuations_differ, 0);
}

// Wrong routing must be seen: the same model with the group limit switched off.
TEST(Golden, WithoutGroupsTheComparisonFails) {
  const Agreement a = Compare({.path = Bundled(), .groups = "off"});
  EXPECT_GT(a.routing_differences, 100);
  EXPECT_GT(a.largest, 0.5);
}

// The logits of every position are the same bits, however the work is shared out.
class SameBits : public testing::Test {
 protected:
  static std::vector<float> Logits(const RunOptions& options) {
    Model model(options);
    const Prompt& p = GoldenData().prompts[2];
    return model.Prefill(p.tokens).logits;
  }
  static bool Equal(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !a.empty() &&
           std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

TEST_F(SameBits, ForAnyNumberOfThreads) {
  const auto one = Logits({.path = Bundled(), .threads = 1});
  EXPECT_TRUE(Equal(one, Logits({.path = Bundled(), .threads = 2})));
  EXPECT_TRUE(Equal(one, Logits({.path = Bundled(), .threads = 5})));
}

TEST_F(SameBits, ForAnyChunkOfThePrompt) {
  const auto whole = Logits({.path = Bundled(), .chunk = 512});
  for (int chunk : {1, 2, 7, 16, 40}) {
    EXPECT_TRUE(Equal(whole, Logits({.path = Bundled(), .chunk = chunk}))) << "chunk " << chunk;
  }
}

TEST_F(SameBits, ForAnyShardsOfTheExperts) {
  const auto one = Logits({.path = Bundled()});
  const std::vector<expert::ShardRequest> halves = {{0, 1, 0, 8}, {0, 1, 8, 16}};
  const std::vector<expert::ShardRequest> uneven = {{0, 1, 0, 3}, {0, 1, 3, 4}, {0, 1, 4, 16}};
  EXPECT_TRUE(Equal(one, Logits({.path = Bundled(), .shards = halves})));
  EXPECT_TRUE(Equal(one, Logits({.path = Bundled(), .shards = uneven})));
}

TEST_F(SameBits, ForEveryInstructionSet) {
  const kernels::Isa active = kernels::ActiveIsa();
  const auto best = Logits({.path = Bundled()});
  for (kernels::Isa isa : kernels::AvailableIsas()) {
    kernels::SetActiveIsaForTesting(isa);
    EXPECT_TRUE(Equal(best, Logits({.path = Bundled()}))) << kernels::IsaName(isa);
  }
  kernels::SetActiveIsaForTesting(active);
}

// Sequences that run together in one step give each the logits that it gives alone.
TEST_F(SameBits, InABatchAndAlone) {
  const Prompt& a = GoldenData().prompts[1];
  const Prompt& b = GoldenData().prompts[2];
  Model model({.path = Bundled()});
  const auto alone_a = model.Prefill(a.tokens).logits;
  const auto alone_b = model.Prefill(b.tokens).logits;

  auto file = gguf::File::Open(Bundled());
  ASSERT_TRUE(file.ok());
  auto config = model::ReadModelConfig(**file);
  auto experts = MakeLocalExperts(Bundled(), {{}}, Precision::kFast, 2);
  attention::CpuBackendOptions o;
  o.threads.threads = 2;
  o.page_tokens = kPageTokens;
  o.page_count = 64;
  auto backend = attention::CreateCpuBackend(**file, *config, o, std::move(*experts));
  ASSERT_TRUE(backend.ok());
  const std::vector<int32_t> pages_a = {9, 3, 17, 30}, pages_b = {40, 2, 8, 1};
  StepBatch batch;
  batch.want_logits = true;
  batch.tokens = a.tokens;
  batch.tokens.insert(batch.tokens.end(), b.tokens.begin(), b.tokens.end());
  StepSequence sa, sb;
  sa.count = static_cast<int32_t>(a.tokens.size());
  sa.pages = pages_a;
  sb.first = sa.count;
  sb.count = static_cast<int32_t>(b.tokens.size());
  sb.pages = pages_b;
  batch.sequences = {sa, sb};
  StepResult r;
  ASSERT_TRUE((*backend)->Step(batch, &r).ok());
  std::vector<float> want = alone_a;
  want.insert(want.end(), alone_b.begin(), alone_b.end());
  EXPECT_TRUE(Equal(r.logits, want));
}

}  // namespace
}  // namespace tandem::golden
