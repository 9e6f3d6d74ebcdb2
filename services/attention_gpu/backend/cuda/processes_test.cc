// The CUDA backend with real expert processes on this machine: every way of calling them, and a process that
// is killed in the middle of a step and comes back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <thread>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/testing/process.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "services/attention_gpu/experts/deferral.h"

namespace tandem::attention {
namespace {

using tandem::testing::DemoModel;
using tandem::testing::Process;

constexpr int32_t kPageTokens = 32, kPages = 256;

struct Prompt {
  std::vector<int32_t> tokens, greedy;
};

std::vector<Prompt> Prompts() {
  const char* dir = std::getenv("TANDEM_SOURCE_DIR");
  std::ifstream in(absl::StrCat(dir != nullptr ? dir : ".", "/tests/golden/demo/golden.json"));
  const auto json = nlohmann::json::parse(in);
  std::vector<Prompt> out;
  for (const auto& p : json["prompts"]) out.push_back({p["tokens"], p["greedy"]});
  return out;
}

class CudaProcesses : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    TANDEM_NEEDS_GPU();
    if (std::getenv("TANDEM_BINARY_DIR") == nullptr) GTEST_SKIP() << "TANDEM_BINARY_DIR is not set";
    file_ = std::move(*gguf::File::Open(DemoModel()));
    config_ = *model::ReadModelConfig(*file_, "auto");
  }

  std::string Address(int i) const {
    return absl::StrCat("unix:", ::testing::TempDir(), "/tandem_gpu_", getpid(), "_", i, ".sock");
  }
  // Expert process i of n, 1 or 2, which has its part of the experts.
  std::unique_ptr<Process> Start(int i, int n) const {
    return std::make_unique<Process>(
        "tandem-expert", std::vector<std::string>{"--model", DemoModel(), "--listen", Address(i), "--threads",
                                                  "2", "--experts",
                                                  n == 1   ? "0-16"
                                                  : i == 0 ? "0-7"
                                                           : "7-16",
                                                  "--arena", "shared"});
  }
  std::unique_ptr<Backend> Connect(int processes, bool int8_cache = false, int32_t defer_experts = 0) const {
    CudaBackendOptions o;
    o.int8_cache = int8_cache;
    o.defer_experts = defer_experts;
    return Connect(processes, o);
  }
  // Prompts from 32 tokens on streamed in one step, the processes with that share in it.
  std::unique_ptr<Backend> ConnectStreamed(int processes, const StreamShare& share) const {
    CudaBackendOptions o;
    o.stream_prefill = {StreamPrefill::Mode::kFrom, 32};
    o.stream_share = share;
    o.stream_buffer_bytes = 16 << 20;
    return Connect(processes, o);
  }
  std::unique_ptr<Backend> Connect(int processes, CudaBackendOptions o) const {
    ExpertOptions e;
    for (int i = 0; i < processes; ++i) e.addresses.push_back(Address(i));
    e.attach_patience = absl::Seconds(30);
    e.call_timeout = absl::Seconds(10);
    e.max_call_tokens = 256;
    if (o.defer_experts > 0) e.slots = kDeferralSlots;
    auto experts = ConnectExperts(e, config_, file_->Fingerprint());
    EXPECT_TRUE(experts.ok()) << experts.status();
    if (!experts.ok()) return nullptr;
    o.threads.threads = 2;
    o.page_tokens = kPageTokens;
    o.page_count = kPages;
    o.max_step_tokens = 256;
    o.bell = GetParam();
    auto backend = CreateCudaBackend(*file_, config_, o, std::move(*experts));
    EXPECT_TRUE(backend.ok()) << backend.status();
    return backend.ok() ? std::move(*backend) : nullptr;
  }

  std::unique_ptr<gguf::File> file_;
  model::ModelConfig config_;
};

const SamplingParams kGreedy;
const std::unordered_map<int32_t, int32_t> kNoCounts;

// A sequence that is being decoded, with pages of its own.
struct Stream {
  std::vector<int32_t> pages, tokens, greedy;
  int32_t computed = 0;
  int32_t prompt = 0;  // tokens
};

Stream StreamFor(const Prompt& p, int32_t first_page) {
  Stream s;
  s.tokens = p.tokens;
  s.greedy = p.greedy;
  s.prompt = static_cast<int32_t>(p.tokens.size());
  const auto pages = static_cast<int32_t>(p.tokens.size() + p.greedy.size()) / kPageTokens + 1;
  for (int32_t i = 0; i < pages; ++i) s.pages.push_back(first_page + i);
  return s;
}

// Each stream's next tokens: a chunk of its prompt, or one.
absl::Status Step(Backend& backend, const std::vector<Stream*>& streams,
                  const SamplingParams& params = kGreedy, int32_t chunk = 200) {
  StepBatch batch;
  for (Stream* stream : streams) {
    StepSequence s;
    s.first = static_cast<int32_t>(batch.tokens.size());
    s.count = std::min<int32_t>(chunk, static_cast<int32_t>(stream->tokens.size()) - stream->computed);
    s.position = stream->computed;
    s.pages = stream->pages;
    s.generated_from = stream->prompt;
    s.sample = stream->computed + s.count == static_cast<int32_t>(stream->tokens.size());
    s.params = &params;
    s.counts = &kNoCounts;
    batch.sequences.push_back(s);
    const auto from = stream->tokens.begin() + stream->computed;
    batch.tokens.insert(batch.tokens.end(), from, from + s.count);
  }
  StepResult r;
  const absl::Status status = backend.Step(batch, &r);
  if (!status.ok()) return status;
  for (size_t i = 0; i < streams.size(); ++i) {
    streams[i]->computed += batch.sequences[i].count;
    if (batch.sequences[i].sample) streams[i]->tokens.push_back(r.sampled[i].token);
  }
  return absl::OkStatus();
}

std::vector<int32_t> Generated(const Stream& s, const Prompt& p) {
  return {s.tokens.begin() + static_cast<ptrdiff_t>(p.tokens.size()), s.tokens.end()};
}

TEST_P(CudaProcesses, GreedyContinuationsAreTheGoldenOnesAloneAndTogether) {
  for (const int processes : {1, 2}) {
    std::vector<std::unique_ptr<Process>> experts;
    for (int i = 0; i < processes; ++i) experts.push_back(Start(i, processes));
    const auto backend = Connect(processes);
    ASSERT_NE(backend, nullptr);
    const auto prompts = Prompts();
    for (const Prompt& p : prompts) {
      Stream s = StreamFor(p, 0);
      while (s.tokens.size() < p.tokens.size() + p.greedy.size()) {
        const absl::Status status = Step(*backend, {&s});
        ASSERT_TRUE(status.ok()) << status;
      }
      EXPECT_EQ(Generated(s, p), p.greedy) << processes << " processes";
    }
    // Three at a time, which end one after the other: graphs of three, two and one row.
    std::vector<Stream> streams;
    std::vector<Prompt> few;
    int32_t page = 0;
    for (size_t i = 0; i < 3; ++i) {
      Prompt p = prompts[i];
      p.tokens.resize(std::min<size_t>(p.tokens.size(), 150));
      streams.push_back(StreamFor(p, page));
      page += static_cast<int32_t>(streams.back().pages.size());
      few.push_back(p);
    }
    std::vector<std::vector<int32_t>> alone;
    for (size_t i = 0; i < 3; ++i) {
      Stream s = StreamFor(few[i], 200);
      while (s.tokens.size() < few[i].tokens.size() + 12 * (i + 1)) ASSERT_TRUE(Step(*backend, {&s}).ok());
      alone.push_back(Generated(s, few[i]));
    }
    for (;;) {
      std::vector<Stream*> left;
      for (size_t i = 0; i < 3; ++i) {
        if (streams[i].tokens.size() < few[i].tokens.size() + 12 * (i + 1)) left.push_back(&streams[i]);
      }
      if (left.empty()) break;
      ASSERT_TRUE(Step(*backend, left).ok());
    }
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(Generated(streams[i], few[i]), alone[i]) << i;
  }
}

TEST_P(CudaProcesses, AnExpertKilledInTheMiddleComesBackAndTheStepIsRepeated) {
  auto expert = Start(0, 1);
  const auto backend = Connect(1);
  ASSERT_NE(backend, nullptr);
  const Prompt p = Prompts()[0];
  for (int kill = 0; kill < 4; ++kill) {
    Stream s = StreamFor(p, 0);
    std::thread killer([&] {
      absl::SleepFor(absl::Milliseconds(3 + 9 * kill));
      expert->Kill();
    });
    // Over and over, until the blow falls into a step.
    absl::Status status;
    while (status.ok()) {
      if (Generated(s, p).size() >= p.greedy.size()) s = StreamFor(p, 0);
      status = Step(*backend, {&s});
    }
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    killer.join();
    expert = Start(0, 1);
    const absl::Status back = backend->RecoverExperts(absl::Seconds(30));
    ASSERT_TRUE(back.ok()) << back;
    while (Generated(s, p).size() < p.greedy.size()) {
      status = Step(*backend, {&s});
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(Generated(s, p), p.greedy) << "kill " << kill;
  }
}

// However the experts are called, and by how many: the same texts alone, together with others' prompts in the
// same steps, and after the process was killed in the middle and came back.
TEST_P(CudaProcesses, DeferredExperts) {
  constexpr int32_t kDefer = 2;
  constexpr size_t kTokens = 30;
  const auto prompts = Prompts();
  std::vector<std::vector<int32_t>> want;
  for (const int processes : {2, 1}) {
    std::vector<std::unique_ptr<Process>> experts;
    for (int i = 0; i < processes; ++i) experts.push_back(Start(i, processes));
    const auto backend = Connect(processes, /*int8_cache=*/false, kDefer);
    ASSERT_NE(backend, nullptr);
    // No more than 64 tokens in a step: there a token has the same bits in any company.
    const auto step = [&](const std::vector<Stream*>& streams) {
      return Step(*backend, streams, kGreedy, 50);
    };
    std::vector<std::vector<int32_t>> alone;
    size_t as_without = 0;
    for (size_t i = 0; i < 3; ++i) {
      Stream s = StreamFor(prompts[i], 0);
      while (s.tokens.size() < prompts[i].tokens.size() + kTokens) ASSERT_TRUE(step({&s}).ok());
      alone.push_back(Generated(s, prompts[i]));
      for (size_t t = 0; t < kTokens; ++t) as_without += alone[i][t] == prompts[i].greedy[t];
    }
    std::printf("%d processes, %d experts deferred: %zu of %zu greedy tokens as without\n", processes, kDefer,
                as_without, 3 * kTokens);
    if (want.empty()) want = alone;
    EXPECT_EQ(alone, want) << processes << " processes";

    // Each comes in when the one before has some tokens: its prompt shares steps with their tokens.
    std::vector<Stream> streams;
    int32_t page = 0;
    for (size_t i = 0; i < 3; ++i) {
      streams.push_back(StreamFor(prompts[i], page));
      page += static_cast<int32_t>(streams.back().pages.size());
    }
    for (size_t round = 0;; ++round) {
      std::vector<Stream*> left;
      for (size_t i = 0; i < 3; ++i) {
        if (round >= 5 * i && streams[i].tokens.size() < prompts[i].tokens.size() + kTokens) {
          left.push_back(&streams[i]);
        }
      }
      if (left.empty()) break;
      ASSERT_TRUE(step(left).ok());
    }
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(Generated(streams[i], prompts[i]), want[i]) << i;

    if (processes > 1) continue;
    Stream s = StreamFor(prompts[0], 0);
    std::thread killer([&] {
      absl::SleepFor(absl::Milliseconds(15));
      experts[0]->Kill();
    });
    absl::Status status;
    while (status.ok()) {
      if (Generated(s, prompts[0]).size() >= kTokens) s = StreamFor(prompts[0], 0);
      status = step({&s});
    }
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    killer.join();
    experts[0] = Start(0, 1);
    ASSERT_TRUE(backend->RecoverExperts(absl::Seconds(30)).ok());
    while (Generated(s, prompts[0]).size() < kTokens) {
      status = step({&s});
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(Generated(s, prompts[0]), want[0]);
  }
}

// A prompt's step, as the scheduler makes it beside others.
struct Long {
  explicit Long(Stream& stream) : stream(stream) {
    batch.tokens = stream.tokens;
    StepSequence& s = batch.sequences.emplace_back();
    s.count = static_cast<int32_t>(stream.tokens.size());
    s.pages = stream.pages;
    s.generated_from = stream.prompt;
    s.sample = true;
    s.params = &kGreedy;
    s.counts = &kNoCounts;
  }
  absl::StatusOr<bool> Await(Backend& backend, absl::Duration most) {
    StepResult result;
    const absl::StatusOr<bool> done = backend.AwaitLong(most, &result);
    if (done.ok() && *done) {
      stream.computed = batch.sequences[0].count;
      stream.tokens.push_back(result.sampled[0].token);
    }
    return done;
  }
  Stream& stream;
  StepBatch batch;
};

// None, some or all of a streamed prompt's experts computed by the processes: alone, and beside a stream that
// decodes.
TEST_P(CudaProcesses, StreamedPromptsSharedWithTheProcesses) {
  const auto prompts = Prompts();
  for (const int processes : {1, 2}) {
    std::vector<std::unique_ptr<Process>> experts;
    for (int i = 0; i < processes; ++i) experts.push_back(Start(i, processes));
    for (const StreamShare& share :
         {StreamShare{StreamShare::Mode::kPercent, 50}, StreamShare{StreamShare::Mode::kPercent, 100},
          StreamShare{StreamShare::Mode::kAuto, 0}}) {
      SCOPED_TRACE(absl::StrCat(processes, " processes, ", share.percent, " %"));
      const auto backend = ConnectStreamed(processes, share);
      ASSERT_NE(backend, nullptr);
      EXPECT_EQ(backend->long_prompt_tokens(), 32);
      EXPECT_EQ(backend->long_prompt_tokens_alone(), 32);
      for (const Prompt& p : prompts) {
        if (p.tokens.size() < 32) continue;
        Stream s = StreamFor(p, 0);
        while (Generated(s, p).size() < p.greedy.size()) {
          const absl::Status status = Step(*backend, {&s}, kGreedy, 4096);
          ASSERT_TRUE(status.ok()) << status;
        }
        EXPECT_EQ(Generated(s, p), p.greedy);
      }
      const Prompt& other = prompts[2];
      const Prompt& longest =
          *std::max_element(prompts.begin(), prompts.end(),
                            [](const auto& a, const auto& b) { return a.tokens.size() < b.tokens.size(); });
      Stream a = StreamFor(other, 128), b = StreamFor(longest, 0);
      ASSERT_TRUE(Step(*backend, {&a}, kGreedy, 4096).ok());
      Long step(b);
      ASSERT_TRUE(backend->BeginLong(step.batch).ok());
      bool done = false;
      while (Generated(a, other).size() < other.greedy.size()) {
        if (!done) {
          const auto looked = step.Await(*backend, absl::ZeroDuration());
          ASSERT_TRUE(looked.ok()) << looked.status();
          done = *looked;
        }
        ASSERT_TRUE(Step(*backend, {&a}).ok());
      }
      EXPECT_EQ(Generated(a, other), other.greedy);
      if (!done) {
        const auto awaited = step.Await(*backend, absl::InfiniteDuration());
        ASSERT_TRUE(awaited.ok() && *awaited) << awaited.status();
      }
      while (Generated(b, longest).size() < longest.greedy.size()) ASSERT_TRUE(Step(*backend, {&b}).ok());
      EXPECT_EQ(Generated(b, longest), longest.greedy);
    }
  }
}

TEST_P(CudaProcesses, AnExpertKilledInTheMiddleOfASharedPrompt) {
  if (GetParam() == "off") GTEST_SKIP() << "nothing is shared where the host calls";
  auto expert = Start(0, 1);
  const auto backend = ConnectStreamed(1, {StreamShare::Mode::kPercent, 50});
  ASSERT_NE(backend, nullptr);
  const auto prompts = Prompts();
  const Prompt& p = *std::max_element(prompts.begin(), prompts.end(), [](const auto& a, const auto& b) {
    return a.tokens.size() < b.tokens.size();
  });
  for (int kill = 0; kill < 4; ++kill) {
    std::thread killer([&] {
      absl::SleepFor(absl::Milliseconds(5 + 17 * kill));
      expert->Kill();
    });
    absl::Status status;
    while (status.ok()) {
      Stream s = StreamFor(p, 0);
      Long step(s);
      status = backend->BeginLong(step.batch);
      if (status.ok()) status = step.Await(*backend, absl::InfiniteDuration()).status();
    }
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    killer.join();
    expert = Start(0, 1);
    const absl::Status back = backend->RecoverExperts(absl::Seconds(30));
    ASSERT_TRUE(back.ok()) << back;
    Stream s = StreamFor(p, 0);
    while (Generated(s, p).size() < p.greedy.size()) {
      status = Step(*backend, {&s}, kGreedy, 4096);
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(Generated(s, p), p.greedy) << "kill " << kill;
  }
}

// Eight bits round the latents: the text may differ sooner or later, but most of it is the same.
TEST_P(CudaProcesses, TheEightBitCacheGivesNearlyTheSameText) {
  const auto expert = Start(0, 1);
  const auto backend = Connect(1, /*int8_cache=*/true);
  ASSERT_NE(backend, nullptr);
  size_t same = 0, all = 0;
  for (const Prompt& p : Prompts()) {
    Stream s = StreamFor(p, 0);
    while (s.tokens.size() < p.tokens.size() + p.greedy.size()) ASSERT_TRUE(Step(*backend, {&s}).ok());
    const auto got = Generated(s, p);
    all += got.size();
    for (size_t i = 0; i < got.size() && got[i] == p.greedy[i]; ++i) ++same;
  }
  std::printf("int8 cache: %zu of %zu greedy tokens up to each prompt's first difference\n", same, all);
  EXPECT_GT(same, all / 2);
}

INSTANTIATE_TEST_SUITE_P(, CudaProcesses, ::testing::Values("stream", "kernel", "host", "off"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tandem::attention
