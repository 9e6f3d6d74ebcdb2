// The CUDA backend on the bundled model against the CPU backend and the golden continuations. The experts run
// in this process, on the CPU, for both.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include <gmock/gmock.h>

#include "cli/synth/synth.h"
#include "common/testing/process.h"
#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "tests/golden/golden_prompts.h"
#include "tests/golden/local_experts.h"
#include "tests/golden/spied_experts.h"

namespace tandem::attention {
namespace {

constexpr int32_t kPageTokens = 32, kPages = 192;
constexpr int32_t kLongest = 128;  // pages of a sequence, the model's context

using golden::Prompt;
using golden::Prompts;
using golden::SourceDir;

// What is the same for all backends of this test.
class Model {
 public:
  Model() : path_(SourceDir() + "/models/tinyr1-Q4_K_M.gguf") {
    file_ = std::move(*gguf::File::Open(path_));
    config_ = *model::ReadModelConfig(*file_);
    options_.page_tokens = kPageTokens;
    options_.page_count = kPages;
    options_.max_step_tokens = 256;
    options_.threads.threads = 2;
  }
  std::unique_ptr<ExpertGroup> Experts() const {
    return std::move(*golden::MakeLocalExperts(path_, {{}}, kernels::Precision::kFast, 2));
  }
  std::unique_ptr<Backend> Cuda() const {
    auto b = CreateCudaBackend(*file_, config_, options_, Experts());
    EXPECT_TRUE(b.ok()) << b.status();
    return b.ok() ? std::move(*b) : nullptr;
  }
  // In float32 and double: what both fast backends approach. The experts are the same for all.
  std::unique_ptr<Backend> Cpu(kernels::Precision precision) const {
    CpuBackendOptions o;
    o.defer_experts = options_.defer_experts;
    o.precision = precision;
    o.threads.threads = 2;
    o.page_tokens = kPageTokens;
    o.page_count = kPages;
    auto b = CreateCpuBackend(*file_, config_, o, Experts());
    EXPECT_TRUE(b.ok()) << b.status();
    return std::move(*b);
  }

  const std::string path_;
  std::unique_ptr<gguf::File> file_;
  model::ModelConfig config_;
  CudaBackendOptions options_;
};

// A sequence with pages of its own.
struct Sequence {
  std::vector<int32_t> pages;
  int32_t position = 0;
  int32_t generated_from = std::numeric_limits<int32_t>::max();
  explicit Sequence(int32_t first_page, int32_t count = kLongest) {
    for (int32_t i = 0; i < count; ++i) pages.push_back(first_page + i);
  }
};

struct Part {
  Sequence* sequence;
  std::vector<int32_t> tokens;
};

const SamplingParams kGreedy;
const std::unordered_map<int32_t, int32_t> kNoCounts;

StepResult RunStep(Backend& backend, const std::vector<Part>& parts, bool want_logits,
                   const SamplingParams& params = kGreedy) {
  StepBatch batch;
  batch.want_logits = want_logits;
  for (const Part& p : parts) {
    StepSequence s;
    s.first = static_cast<int32_t>(batch.tokens.size());
    s.count = static_cast<int32_t>(p.tokens.size());
    s.position = p.sequence->position;
    s.pages = p.sequence->pages;
    s.generated_from = p.sequence->generated_from;
    s.sample = true;
    s.params = &params;
    s.counts = &kNoCounts;
    batch.sequences.push_back(s);
    batch.tokens.insert(batch.tokens.end(), p.tokens.begin(), p.tokens.end());
    p.sequence->position += s.count;
  }
  StepResult r;
  const absl::Status status = backend.Step(batch, &r);
  EXPECT_TRUE(status.ok()) << status;
  return r;
}

// The prompt in chunks; the token after it.
int32_t Prefill(Backend& backend, Sequence& s, const std::vector<int32_t>& tokens) {
  int32_t next = 0;
  for (size_t at = 0; at < tokens.size(); at += 192) {
    const std::vector<int32_t> chunk(tokens.begin() + at, tokens.begin() + std::min(at + 192, tokens.size()));
    next = RunStep(backend, {{&s, chunk}}, false).sampled[0].token;
  }
  return next;
}

std::vector<int32_t> Greedy(Backend& backend, Sequence& s, int32_t token, size_t count) {
  std::vector<int32_t> out = {token};
  s.generated_from = s.position;
  while (out.size() < count) out.push_back(RunStep(backend, {{&s, {out.back()}}}, false).sampled[0].token);
  return out;
}

// How two distributions over the vocabulary differ.
struct Distance {
  double largest = 0;  // difference of log-probability among the 20 likeliest tokens of `want`
  double kl = 0;       // of `got` from `want`, nats
};
Distance Compare(const float* got, const float* want, int64_t vocab) {
  auto log_sum = [&](const float* l) {
    const float top = *std::max_element(l, l + vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double{l[i]} - top);
    return top + std::log(sum);
  };
  std::vector<int64_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + 20, order.end(),
                    [&](int64_t a, int64_t b) { return want[a] > want[b]; });
  const double a = log_sum(got), b = log_sum(want);
  Distance d;
  for (int64_t i = 0; i < vocab; ++i) d.kl += std::exp(want[i] - b) * ((want[i] - b) - (got[i] - a));
  for (int i = 0; i < 20; ++i)
    d.largest = std::max(d.largest, std::fabs((got[order[i]] - a) - (want[order[i]] - b)));
  return d;
}

struct Agreement {
  double median = 0;        // of the positions' Distance::largest
  double mean_kl = 0;       // nats
  double routed_alike = 0;  // share of (layer, token) that went to the same experts
};

Agreement Compare(const Model& m, Backend& got_from, Backend& want_from, size_t chunk) {
  const int64_t vocab = m.config_.vocab_size;
  const auto k = static_cast<size_t>(m.config_.num_experts_per_tok);
  std::vector<double> largest;
  double kl = 0, routed = 0, alike = 0;
  for (const Prompt& p : Prompts()) {
    Sequence a(0), b(0);
    for (size_t at = 0; at < p.tokens.size(); at += chunk) {
      const std::vector<int32_t> tokens(p.tokens.begin() + at,
                                        p.tokens.begin() + std::min(at + chunk, p.tokens.size()));
      const StepResult got = RunStep(got_from, {{&a, tokens}}, true),
                       want = RunStep(want_from, {{&b, tokens}}, true);
      for (size_t t = 0; t < tokens.size(); ++t) {
        const Distance d = Compare(got.logits.data() + t * vocab, want.logits.data() + t * vocab, vocab);
        largest.push_back(d.largest);
        kl += d.kl;
        for (size_t l = 0; l < got.routing.size(); ++l) {
          auto chosen = [&](const RoutingTrace& trace) {
            std::vector<int32_t> ids(trace.expert_ids.begin() + t * k,
                                     trace.expert_ids.begin() + (t + 1) * k);
            std::sort(ids.begin(), ids.end());
            return ids;
          };
          ++routed;
          alike += chosen(got.routing[l]) == chosen(want.routing[l]);
        }
      }
    }
  }
  std::sort(largest.begin(), largest.end());
  const Agreement r{largest[largest.size() / 2], kl / static_cast<double>(largest.size()), alike / routed};
  std::printf(
      "%s, chunks of %zu, %zu positions: top-20 log-probabilities differ by %.4f (median of the largest), "
      "%.2f "
      "(worst); mean KL %.5f nats; %.2f %% of the routings alike\n",
      got_from.name().c_str(), chunk, largest.size(), r.median, largest.back(), r.mean_kl,
      r.routed_alike * 100);
  return r;
}

// Chunks of 192 go through the float16 products, chunks of 8 through the int8 ones. A token near a routing
// boundary may go to another expert, which moves its distribution by far more than rounding does: the worst
// one says little, and the bulk is held to what the CPU backend's own fast mode is away from its reference.
TEST(CudaBackend, IsAsNearToTheReferenceAsTheCpuBackendIs) {
  TANDEM_NEEDS_GPU();
  const Model m;
  const auto cuda = m.Cuda(), fast = m.Cpu(kernels::Precision::kFast),
             reference = m.Cpu(kernels::Precision::kReference);
  ASSERT_NE(cuda, nullptr);
  const Agreement cpu = Compare(m, *fast, *reference, 192);
  for (size_t chunk : {192, 8}) {
    const Agreement gpu = Compare(m, *cuda, *reference, chunk);
    EXPECT_LT(gpu.median, 1.5 * cpu.median);
    EXPECT_LT(gpu.mean_kl, 1.5 * cpu.mean_kl);
    EXPECT_GT(gpu.routed_alike, 1 - 1.5 * (1 - cpu.routed_alike));
  }
}

TEST(CudaBackend, GreedyContinuationsAreTheGoldenOnes) {
  TANDEM_NEEDS_GPU();
  const Model m;
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  for (const Prompt& p : Prompts()) {
    Sequence s(0);
    const int32_t first = Prefill(*cuda, s, p.tokens);
    EXPECT_EQ(Greedy(*cuda, s, first, p.greedy.size()), p.greedy) << p.name;
  }
}

// The prompts in one step each, their experts' weights from the arena of the experts in this process.
TEST(CudaBackend, StreamedPrompts) {
  TANDEM_NEEDS_GPU();
  Model m;
  const auto reference = m.Cpu(kernels::Precision::kReference);
  EXPECT_EQ(m.Cuda()->long_prompt_tokens(), 0);
  m.options_.max_step_tokens = 64;
  m.options_.stream_prefill = {StreamPrefill::Mode::kFrom, 32};
  m.options_.stream_step_tokens = 4096;
  m.options_.stream_buffer_bytes = 64 << 20;
  const auto plan = PlanCuda(*m.file_, m.config_, m.options_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GT(plan->stream, m.options_.stream_buffer_bytes);
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  ASSERT_EQ(cuda->long_prompt_tokens(), 32);
  EXPECT_EQ(cuda->max_step_tokens(), 64);
  EXPECT_EQ(cuda->max_long_tokens(), 4096);
  for (const Prompt& p : Prompts()) {
    if (p.tokens.size() <= 33) continue;
    std::vector<int32_t> most = p.tokens;
    const int32_t last = most.back();
    most.pop_back();
    Sequence s(0), want(0);
    RunStep(*cuda, {{&s, most}}, false);
    for (size_t at = 0; at < most.size(); at += 192) {
      RunStep(*reference, {{&want, {most.begin() + at, most.begin() + std::min(at + 192, most.size())}}},
              false);
    }
    Sequence again = s;
    const Distance d =
        Compare(RunStep(*cuda, {{&s, {last}}}, true).logits.data(),
                RunStep(*reference, {{&want, {last}}}, true).logits.data(), m.config_.vocab_size);
    std::printf("%s: %zu tokens streamed, top-20 log-probabilities differ by %.3f at most, KL %.5f nats\n",
                p.name.c_str(), most.size(), d.largest, d.kl);
    EXPECT_LT(d.kl, 0.1);
    const int32_t first = RunStep(*cuda, {{&again, {last}}}, false).sampled[0].token;
    EXPECT_EQ(Greedy(*cuda, again, first, p.greedy.size()), p.greedy) << p.name;
  }
  // The routing of a streamed step cannot be asked for: such steps are limited as ever.
  StepBatch batch;
  batch.want_logits = true;
  batch.tokens.assign(65, 1);
  StepResult result;
  EXPECT_TRUE(absl::IsInvalidArgument(cuda->Step(batch, &result)));
  EXPECT_TRUE(cuda->RecoverExperts(absl::Seconds(1)).ok());
  EXPECT_EQ(cuda->long_prompt_tokens(), 32);
}

// The longest prompt streamed while the others' tokens are made: all are as alone.
TEST(CudaBackend, OthersDecodeBesideAStreamedPrompt) {
  TANDEM_NEEDS_GPU();
  Model m;
  m.options_.max_step_tokens = 64;
  m.options_.stream_prefill = {StreamPrefill::Mode::kFrom, 32};
  m.options_.stream_step_tokens = 4096;
  m.options_.stream_buffer_bytes = 16 << 20;
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  ASSERT_TRUE(cuda->long_beside_others());
  const auto prompts = Prompts();
  const Prompt& other = prompts[2];
  const Prompt& longest = *std::max_element(prompts.begin(), prompts.end(), [](const auto& a, const auto& b) {
    return a.tokens.size() < b.tokens.size();
  });
  Sequence b(0, 100);
  StepBatch batch;
  batch.tokens = longest.tokens;
  StepSequence s;
  s.count = static_cast<int32_t>(longest.tokens.size());
  s.pages = b.pages;
  s.sample = true;
  s.params = &kGreedy;
  s.counts = &kNoCounts;
  batch.sequences.push_back(s);
  b.position = s.count;
  // Dropped at the beginning and in the middle, then to its end.
  for (const int drop_after : {0, 3, -1}) {
    Sequence a(128, 16);
    std::vector<int32_t> tokens;
    for (size_t at = 0; at < other.tokens.size(); at += 50) {
      tokens.assign(other.tokens.begin() + at, other.tokens.begin() + std::min(at + 50, other.tokens.size()));
      tokens = {RunStep(*cuda, {{&a, tokens}}, false).sampled[0].token};
    }
    ASSERT_TRUE(cuda->BeginLong(batch).ok());
    EXPECT_FALSE(cuda->BeginLong(batch).ok());
    bool done = false;
    int beside = 0;
    StepResult result;
    while (tokens.size() < other.greedy.size()) {
      if (drop_after == beside) cuda->DropLong();
      if (!done && (drop_after < 0 || beside < drop_after)) {
        const auto looked = cuda->AwaitLong(absl::ZeroDuration(), &result);
        ASSERT_TRUE(looked.ok()) << looked.status();
        done = *looked;
        if (!done) ++beside;
      }
      tokens.push_back(RunStep(*cuda, {{&a, {tokens.back()}}}, false).sampled[0].token);
      if (done && drop_after >= 0) break;  // too fast to be dropped
    }
    if (drop_after < 0 || !done) {
      EXPECT_EQ(tokens, other.greedy) << drop_after;
    }
    if (drop_after >= 0) {
      cuda->DropLong();
      continue;
    }
    if (!done) {
      const auto awaited = cuda->AwaitLong(absl::InfiniteDuration(), &result);
      ASSERT_TRUE(awaited.ok() && *awaited) << awaited.status();
    }
    std::printf("%d steps beside a streamed prompt of %zu tokens\n", beside, longest.tokens.size());
    EXPECT_GT(beside, 0);
    EXPECT_EQ(Greedy(*cuda, b, result.sampled[0].token, longest.greedy.size()), longest.greedy);
  }
  EXPECT_FALSE(cuda->AwaitLong(absl::ZeroDuration(), nullptr).ok()) << "there is none";
}

// Along the golden continuations, the experts called by the host.
TEST(CudaBackend, DefersExpertsAsTheCpuBackendDoes) {
  TANDEM_NEEDS_GPU();
  Model m;
  for (const int32_t defer : {1, 3}) {
    m.options_.defer_experts = defer;
    golden::Spy spy;
    auto experts = std::make_unique<golden::SpiedExperts>(m.Experts(), m.config_.hidden_size, spy);
    auto made = CreateCudaBackend(*m.file_, m.config_, m.options_, std::move(experts));
    ASSERT_TRUE(made.ok()) << made.status();
    const auto cuda = std::move(*made), cpu = m.Cpu(kernels::Precision::kReference);
    double kl = 0;
    size_t count = 0, alike = 0;
    for (const Prompt& p : Prompts()) {
      Sequence a(0), b(0);
      Prefill(*cuda, a, p.tokens);
      Prefill(*cpu, b, p.tokens);
      a.generated_from = b.generated_from = static_cast<int32_t>(p.tokens.size());
      for (const int32_t token : p.greedy) {
        spy.calls.clear();
        const StepResult got = RunStep(*cuda, {{&a, {token}}}, true),
                         want = RunStep(*cpu, {{&b, {token}}}, true);
        kl += Compare(got.logits.data(), want.logits.data(), m.config_.vocab_size).kl;
        alike += got.sampled[0].token == want.sampled[0].token;
        ++count;
      }
    }
    kl /= static_cast<double>(count);
    std::printf("%d experts deferred: %zu of %zu next tokens as in the CPU backend, mean KL %.5f nats\n",
                defer, alike, count, kl);
    EXPECT_LT(kl, 0.01);
    EXPECT_GT(alike, count * 9 / 10);
    Sequence s(0);
    const Prompt p = Prompts()[1];
    const int32_t next = Prefill(*cuda, s, p.tokens);
    s.generated_from = s.position;
    golden::ExpectDeferredALayerLater(spy, [&] {
      Sequence again = s;
      RunStep(*cuda, {{&again, {next}}}, false);
    });
  }
}

TEST(CudaBackend, ATokenHasTheSameBitsInABatchAndAlone) {
  TANDEM_NEEDS_GPU();
  const Model m;
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  const auto prompts = Prompts();
  const int64_t vocab = m.config_.vocab_size;
  std::vector<Sequence> alone = {Sequence(0, 16), Sequence(16, 16), Sequence(32, 16)}, together = alone;
  std::vector<Part> parts;
  std::vector<std::vector<float>> want;
  for (size_t i = 0; i < 3; ++i) {
    const auto& t = prompts[i % prompts.size()].tokens;
    RunStep(*cuda, {{&alone[i], t}}, false);
    together[i].position = alone[i].position;
    want.push_back(RunStep(*cuda, {{&alone[i], {t[0]}}}, true).logits);
    parts.push_back({&together[i], {t[0]}});
  }
  const auto got = RunStep(*cuda, parts, true).logits;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(cuda::testing::SameBits(got.data() + i * vocab, want[i].data(), vocab)) << "sequence " << i;
  }
}

// R1's attention, which the bundled model is too small for: random weights, one dense layer. Rows far behind
// in their sequences are cut into parts.
TEST(CudaBackend, AttentionOfManyHeadsInWholeSteps) {
  TANDEM_NEEDS_GPU();
  const testing::TempFolder folder;
  cli::SynthOptions synth;
  synth.out = folder / "model.gguf";
  synth.dense_layers = 1;
  synth.moe_layers = 0;
  const auto plan = cli::PlanSynth(synth);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_TRUE(cli::WriteSynth(*plan, synth, [](uint64_t) {}).ok());
  const auto file = gguf::File::Open(synth.out);
  ASSERT_TRUE(file.ok()) << file.status();
  const model::ModelConfig config = *model::ReadModelConfig(**file, "auto");
  CudaBackendOptions options;
  options.page_tokens = kPageTokens;
  options.page_count = 400;
  options.max_step_tokens = 256;
  options.threads.threads = 4;
  const auto cuda = CreateCudaBackend(**file, config, options, nullptr);
  ASSERT_TRUE(cuda.ok()) << cuda.status();
  CpuBackendOptions cpu_options;
  cpu_options.page_tokens = kPageTokens;
  cpu_options.page_count = 16;
  cpu_options.threads.threads = 8;
  const auto cpu = CreateCpuBackend(**file, config, cpu_options, nullptr);
  ASSERT_TRUE(cpu.ok()) << cpu.status();

  std::vector<Sequence> sequences;
  int32_t page = 0;
  for (const int32_t length : {30, 300, 2500, 4700}) {
    std::vector<int32_t> tokens(length);
    for (int32_t i = 0; i < length; ++i) tokens[i] = (i * 7919 + length) % 1000;
    const int32_t pages = length / kPageTokens + 1;
    Sequence& s = sequences.emplace_back(page, pages);
    page += pages;
    Prefill(**cuda, s, tokens);
    if (length > 300) continue;
    Sequence got = s, want(0, pages);
    Prefill(**cpu, want, tokens);
    const Distance d = Compare(RunStep(**cuda, {{&got, {7}}}, true).logits.data(),
                               RunStep(**cpu, {{&want, {7}}}, true).logits.data(), config.vocab_size);
    std::printf("%d tokens: top-20 log-probabilities differ by %.4f at most, KL %.6f nats\n", length,
                d.largest, d.kl);
    EXPECT_LT(d.largest, 0.3);
    EXPECT_LT(d.kl, 0.01);
  }
  std::vector<Part> together;
  std::vector<float> alone;
  for (Sequence& s : sequences) {
    Sequence copy = s;
    const StepResult one = RunStep(**cuda, {{&copy, {7}}}, true);
    alone.insert(alone.end(), one.logits.begin(), one.logits.end());
    together.push_back({&s, {7}});
  }
  EXPECT_EQ(RunStep(**cuda, together, true).logits, alone);
}

TEST(CudaBackend, SamplesAsTheCpuSamplerDoes) {
  TANDEM_NEEDS_GPU();
  const Model m;
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  const auto tokens = Prompts()[0].tokens;
  SamplingParams p;
  p.temperature = 1.3f;
  p.top_p = 0.9f;
  p.seed = 5;
  p.logprobs = true;
  p.top_logprobs = 3;
  Sequence a(0, 16), b(16, 16);
  StepResult with_logits = RunStep(*cuda, {{&a, tokens}}, true, p);
  const StepResult without = RunStep(*cuda, {{&b, tokens}}, false, p);
  const int64_t vocab = m.config_.vocab_size;
  const SampledToken want =
      Sample({with_logits.logits.data() + (tokens.size() - 1) * vocab, static_cast<size_t>(vocab)}, p,
             tokens.size(), kNoCounts);
  EXPECT_EQ(with_logits.sampled[0].token, want.token);
  EXPECT_EQ(without.sampled[0].top.size(), 3u);
}

TEST(CudaBackend, APageSurvivesACopyOutAndIntoAnotherPlace) {
  TANDEM_NEEDS_GPU();
  const Model m;
  const auto cuda = m.Cuda();
  ASSERT_NE(cuda, nullptr);
  const auto tokens = Prompts()[2].tokens;
  Sequence a(0);
  RunStep(*cuda, {{&a, tokens}}, false);
  Sequence moved(140, 16);
  moved.position = a.position;
  std::vector<std::byte> page(cuda->page_bytes());
  for (int32_t i = 0; i * kPageTokens < a.position; ++i) {
    ASSERT_TRUE(cuda->CopyPageOut(a.pages[i], page).ok());
    ASSERT_TRUE(cuda->CopyPageIn(page, moved.pages[i]).ok());
  }
  EXPECT_EQ(RunStep(*cuda, {{&a, {7}}}, true).logits, RunStep(*cuda, {{&moved, {7}}}, true).logits);
  EXPECT_FALSE(cuda->CopyPageOut(kPages, page).ok());
}

TEST(CudaBackend, SaysWhatIsWrong) {
  TANDEM_NEEDS_GPU();
  Model m;
  const auto plan = PlanCuda(*m.file_, m.config_, m.options_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GT(plan->weights, 3'000'000u);
  EXPECT_EQ(plan->cache, uint64_t{kPages} * kPageTokens * 288 * 2 * 6);
  CudaBackendOptions o = m.options_;
  o.vram_limit = 20'000'000;
  const auto too_small = PlanCuda(*m.file_, m.config_, o);
  EXPECT_EQ(too_small.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(too_small.status().message()), ::testing::HasSubstr("of 20 MB"));
  o = m.options_;
  o.defer_experts = 4;
  EXPECT_EQ(PlanCuda(*m.file_, m.config_, o).status().code(), absl::StatusCode::kInvalidArgument);
  o = m.options_;
  o.device = 99;
  EXPECT_EQ(PlanCuda(*m.file_, m.config_, o).status().code(), absl::StatusCode::kNotFound);
  model::ModelConfig odd = m.config_;
  odd.kv_lora_rank = 384;
  EXPECT_EQ(PlanCuda(*m.file_, odd, m.options_).status().code(), absl::StatusCode::kUnimplemented);
}

// Where there is no GPU this is what start-up sees; where there is one, the plan works.
TEST(CudaBackend, WithoutAGpuThePlanSaysSo) {
  const Model m;
  const auto plan = PlanCuda(*m.file_, m.config_, m.options_);
  if (cuda::testing::NoGpu().empty()) {
    EXPECT_TRUE(plan.ok()) << plan.status();
    return;
  }
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kNotFound) << plan.status();
  EXPECT_FALSE(plan.status().message().empty());
}

}  // namespace
}  // namespace tandem::attention
