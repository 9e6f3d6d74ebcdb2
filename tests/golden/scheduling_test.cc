// What a sequence is answered does not depend on what else is going on: the scheduler over the real CPU
// backend and the bundled model. Compared are the tokens and the bits of their log-probabilities and of the
// 20 best alternatives of each.
#include <cstring>

#include <gtest/gtest.h>

#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "services/attention_gpu/scheduler/scheduler.h"
#include "services/attention_gpu/scheduler/sink.h"
#include "tests/golden/golden_prompts.h"
#include "tests/golden/local_experts.h"

namespace tandem::golden {
namespace {

using attention::SampledToken;
using attention::SchedulerOptions;
using attention::SequenceRequest;
using attention::Sink;
using Tokens = std::vector<int32_t>;

constexpr int32_t kPageTokens = 32;
constexpr int32_t kContext = 512;

// A real text, long enough for all that follows.
const Tokens& Text() {
  static const Tokens text = [] {
    Tokens longest;
    for (Prompt& p : Prompts()) {
      if (p.tokens.size() > longest.size()) longest = std::move(p.tokens);
    }
    return longest;
  }();
  return text;
}

Tokens Piece(int from, int n) { return {Text().begin() + from, Text().begin() + from + n}; }

SequenceRequest Request(Tokens prompt, int n, float temperature = 0) {
  SequenceRequest r;
  r.prompt = std::move(prompt);
  r.max_new_tokens = n;
  r.sampling.temperature = temperature;
  r.sampling.seed = 7;
  r.sampling.logprobs = true;
  r.sampling.top_logprobs = 20;
  return r;
}

using Answer = std::vector<SampledToken>;

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(float)) == 0; }

testing::AssertionResult Same(const Answer& a, const Answer& b) {
  if (a.size() != b.size()) {
    return testing::AssertionFailure() << a.size() << " tokens and " << b.size();
  }
  for (size_t i = 0; i < a.size(); ++i) {
    bool same = a[i].token == b[i].token && SameBits(a[i].logprob, b[i].logprob) && a[i].top.size() == 20 &&
                b[i].top.size() == 20;
    for (size_t j = 0; same && j < a[i].top.size(); ++j) {
      same = a[i].top[j].token == b[i].top[j].token && SameBits(a[i].top[j].logprob, b[i].top[j].logprob);
    }
    if (!same) return testing::AssertionFailure() << "token " << i << " differs";
  }
  return testing::AssertionSuccess();
}

struct Settings {
  int32_t pages = 1024;
  int32_t host_pages = 0;
  bool prefix_cache = true;
  int32_t batch = 16;
  int32_t defer_experts = 0;
};

class Engine {
 public:
  explicit Engine(const Settings& settings) {
    const std::string path = SourceDir() + "/models/tinyr1-Q4_K_M.gguf";
    file_ = std::move(*gguf::File::Open(path));
    const model::ModelConfig config = *model::ReadModelConfig(*file_);
    attention::CpuBackendOptions b;
    b.threads.threads = 2;
    b.page_tokens = kPageTokens;
    b.page_count = settings.pages;
    b.defer_experts = settings.defer_experts;
    auto backend = attention::CreateCpuBackend(
        *file_, config, b, std::move(*MakeLocalExperts(path, {{}}, kernels::Precision::kFast, 2)));
    SchedulerOptions o;
    o.context_length = kContext;
    o.max_batch_size = settings.batch;
    o.chunk_size = 96;
    o.vocab_size = config.vocab_size;
    o.prefix_cache = settings.prefix_cache;
    o.kv_host_bytes = settings.host_pages * (*backend)->page_bytes();
    scheduler_ = std::move(*attention::Scheduler::Create(o, std::move(*backend)));
  }

  // All at the same time.
  std::vector<Answer> Run(const std::vector<SequenceRequest>& requests) {
    std::vector<Sink> sinks(requests.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(scheduler_->Submit(requests[i], sinks[i].callback()).ok());
    }
    std::vector<Answer> out;
    cached_ = 0;
    for (Sink& sink : sinks) {
      sink.Wait();
      EXPECT_TRUE(sink.status().ok()) << sink.status();
      out.push_back(sink.sampled());
      cached_ += sink.statistics().cached_prompt_tokens;
    }
    return out;
  }
  Answer Run(const SequenceRequest& request) { return Run(std::vector{request})[0]; }
  int64_t cached() const { return cached_; }  // prompt tokens of the last Run that were not computed
  void Drain() { EXPECT_TRUE(scheduler_->Drain(absl::Seconds(10))); }
  attention::SchedulerSnapshot Now() const { return scheduler_->Snapshot(); }

 private:
  std::unique_ptr<gguf::File> file_;
  std::unique_ptr<attention::Scheduler> scheduler_;
  int64_t cached_ = 0;
};

// Sixteen of different lengths; half of them begin alike, some draw at random.
std::vector<SequenceRequest> Sixteen() {
  std::vector<SequenceRequest> out;
  for (int i = 0; i < 16; ++i) {
    Tokens prompt = i % 2 == 0 ? Piece(0, 100) : Piece(40 * i, 50);
    const Tokens rest = Piece(600 + 11 * i, 1 + 13 * i);
    prompt.insert(prompt.end(), rest.begin(), rest.end());
    out.push_back(Request(prompt, 40, i % 3 == 0 ? 0.8f : 0));
  }
  return out;
}

// Each by itself, nothing kept from one to the next.
std::vector<Answer> Alone(const std::vector<SequenceRequest>& requests, int32_t defer_experts) {
  Engine engine({.prefix_cache = false, .defer_experts = defer_experts});
  std::vector<Answer> out;
  for (const SequenceRequest& r : requests) out.push_back(engine.Run(r));
  return out;
}

// The sixteen.
const std::vector<Answer>& Alone() {
  static const std::vector<Answer> answers = Alone(Sixteen(), 0);
  return answers;
}

void ExpectSame(const std::vector<Answer>& answers, const std::vector<Answer>& want) {
  ASSERT_EQ(answers.size(), want.size());
  for (size_t i = 0; i < answers.size(); ++i) EXPECT_TRUE(Same(answers[i], want[i])) << "sequence " << i;
}
void ExpectAsAlone(const std::vector<Answer>& answers) { ExpectSame(answers, Alone()); }

TEST(Scheduling, InABatchWithFifteenOthers) {
  Engine engine({.prefix_cache = false});
  ExpectAsAlone(engine.Run(Sixteen()));
  EXPECT_EQ(engine.Now().hit_tokens, 0u);
}

TEST(Scheduling, WithThePrefixCache) {
  Engine engine({});
  ExpectAsAlone(engine.Run(Sixteen()));
  EXPECT_GE(engine.cached(), 7 * 96) << "eight begin alike";
  ExpectAsAlone(engine.Run(Sixteen()));
  for (const SequenceRequest& r : Sixteen()) engine.Run(r);
  ExpectAsAlone(engine.Run(Sixteen()));
  EXPECT_EQ(engine.Now().kv.evicted, 0u);
}

// A prompt of whole pages, asked again and by several at once: all but the last token is known, the last page
// as a copy.
TEST(Scheduling, WithACopyOfTheLastPage) {
  const SequenceRequest request = Request(Piece(0, 4 * kPageTokens), 40);
  // Shares two pages and a half.
  SequenceRequest near = Request(Piece(0, 80), 40);
  const Tokens rest = Piece(700, 60);
  near.prompt.insert(near.prompt.end(), rest.begin(), rest.end());
  std::vector<Answer> alone;
  {
    Engine engine({.prefix_cache = false});
    alone = {engine.Run(request), engine.Run(near)};
  }
  Engine engine({});
  EXPECT_TRUE(Same(engine.Run(request), alone[0]));
  EXPECT_TRUE(Same(engine.Run(request), alone[0]));
  EXPECT_EQ(engine.cached(), 4 * kPageTokens - 1);
  EXPECT_TRUE(Same(engine.Run(near), alone[1]));
  EXPECT_EQ(engine.cached(), 80);
  Engine fresh({});
  for (const Answer& answer : fresh.Run({request, request, request, request})) {
    EXPECT_TRUE(Same(answer, alone[0]));
  }
  EXPECT_EQ(fresh.cached(), 3 * (4 * kPageTokens - 1));
}

// Short prompts with long answers: all find room at first, and then have to make way for each other.
std::vector<SequenceRequest> LongAnswers() {
  std::vector<SequenceRequest> out;
  for (int i = 0; i < 8; ++i) out.push_back(Request(Piece(90 * i, 33 + i), 150));
  return out;
}

TEST(Scheduling, AfterPreemption) {
  const std::vector<Answer> alone = Alone(LongAnswers(), 0);
  for (const bool prefix_cache : {true, false}) {
    Engine engine({.pages = 20, .prefix_cache = prefix_cache});
    ExpectSame(engine.Run(LongAnswers()), alone);
    engine.Drain();
    EXPECT_GT(engine.Now().preemptions, 0u) << "the test does not test preemption";
    EXPECT_EQ(engine.Now().kv.used, 0);
  }
}

TEST(Scheduling, WithPagesThatReturnFromTheHost) {
  Engine engine({.pages = 20, .host_pages = 200, .batch = 4});
  for (int round = 0; round < 2; ++round) ExpectAsAlone(engine.Run(Sixteen()));
  EXPECT_GT(engine.Now().kv.host_returned, 0u);
  EXPECT_EQ(engine.Now().kv.host_evicted, 0u);
  int64_t offered = 0;
  for (const SequenceRequest& r : Sixteen()) offered += static_cast<int64_t>(r.prompt.size());
  EXPECT_GE(engine.cached(), offered - 16 * kPageTokens) << "the second time all full pages are known";
}

// As the gateway resumes the sixteen, of whose answers `whole` the first `cut` tokens are known.
void ExpectResumed(Engine& engine, const std::vector<Answer>& whole, size_t cut) {
  std::vector<SequenceRequest> requests = Sixteen();
  for (size_t i = 0; i < requests.size(); ++i) {
    for (size_t j = 0; j < cut; ++j) requests[i].prompt.push_back(whole[i][j].token);
    requests[i].max_new_tokens -= static_cast<int32_t>(cut);
    requests[i].resumed_tokens = static_cast<int32_t>(cut);
  }
  const std::vector<Answer> rest = engine.Run(requests);
  for (size_t i = 0; i < rest.size(); ++i) {
    const Answer want(whole[i].begin() + static_cast<int64_t>(cut), whole[i].end());
    EXPECT_TRUE(Same(rest[i], want)) << "sequence " << i << " cut after " << cut;
  }
}

// On an engine that has just been started, or on one that knows them.
TEST(Scheduling, AfterResume) {
  for (const bool prefix_cache : {true, false}) {
    Engine engine({.prefix_cache = prefix_cache});
    for (const size_t cut : {1u, 17u, 39u}) ExpectResumed(engine, Alone(), cut);
  }
}

// Experts of generated tokens are deferred, of prompts never: answers are others, from the second token on,
// but do not depend on company, preemption or a new beginning either.
TEST(Scheduling, WithDeferredExperts) {
  const std::vector<Answer> alone = Alone(Sixteen(), 2);
  size_t same = 0;
  for (size_t i = 0; i < alone.size(); ++i) {
    EXPECT_TRUE(Same({alone[i][0]}, {Alone()[i][0]})) << "sequence " << i;
    same += Same(alone[i], Alone()[i]) ? 1 : 0;
  }
  EXPECT_EQ(same, 0u) << "nothing was deferred";
  for (const bool prefix_cache : {false, true}) {
    Engine engine({.prefix_cache = prefix_cache, .defer_experts = 2});
    ExpectSame(engine.Run(Sixteen()), alone);
    for (const size_t cut : {1u, 17u}) ExpectResumed(engine, alone, cut);
  }
  Engine engine({.pages = 20, .defer_experts = 2});
  ExpectSame(engine.Run(LongAnswers()), Alone(LongAnswers(), 2));
  engine.Drain();
  EXPECT_GT(engine.Now().preemptions, 0u);
}

}  // namespace
}  // namespace tandem::golden
