// What running streams feel of a long prompt that comes in beside them: times between tokens before, during
// and as ratios, and how long the prompt takes beside them and alone. In one process, without the wire.
// Model: TANDEM_BENCH_MODEL, else the bundled one; threads: TANDEM_BENCH_THREADS, else 2.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "services/attention_gpu/scheduler/scheduler.h"
#include "tests/golden/local_experts.h"

namespace tandem::golden {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int32_t kContext = 4096;
constexpr int32_t kLongPrompt = 2048;
constexpr size_t kUndisturbed = 200;  // tokens of each stream before the prompt comes

std::string Env(const char* name, const std::string& fallback) {
  const char* v = std::getenv(name);
  return v != nullptr ? v : fallback;
}

// When the tokens of a stream came.
class Stream {
 public:
  attention::EventCallback callback() {
    return [this](const attention::SequenceEvent& e) {
      const std::lock_guard lock(mutex_);
      if (!e.tokens.empty()) times_.push_back(Clock::now());
      ended_ = e.finish != attention::FinishReason::kNone || !e.status.ok();
      changed_.notify_all();
    };
  }
  void WaitFor(size_t tokens) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return times_.size() >= tokens || ended_; });
  }
  std::vector<Clock::time_point> times() const {
    const std::lock_guard lock(mutex_);
    return times_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Clock::time_point> times_;
  bool ended_ = false;
};

double Milliseconds(Clock::duration d) { return std::chrono::duration<double, std::milli>(d).count(); }

double Quantile(std::vector<double> v, double q) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v[static_cast<size_t>(q * static_cast<double>(v.size() - 1))];
}

double Mean(const std::vector<double>& v) {
  return v.empty() ? 0 : std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}

// The gaps that end within (from, to].
std::vector<double> Gaps(const std::vector<Stream>& streams, Clock::time_point from, Clock::time_point to) {
  std::vector<double> gaps;
  for (const Stream& s : streams) {
    const auto times = s.times();
    for (size_t i = 1; i < times.size(); ++i) {
      if (times[i] > from && times[i] <= to) gaps.push_back(Milliseconds(times[i] - times[i - 1]));
    }
  }
  return gaps;
}

attention::SequenceRequest Random(std::mt19937& rng, int64_t vocab, int32_t prompt, int32_t answer) {
  attention::SequenceRequest r;
  for (int32_t i = 0; i < prompt; ++i) {
    r.prompt.push_back(static_cast<int32_t>(3 + rng() % static_cast<uint64_t>(vocab - 10)));
  }
  r.max_new_tokens = answer;
  return r;
}

// The CPU backend, and how long each of its steps takes.
class Timed : public attention::Backend {
 public:
  struct StepTime {
    Clock::time_point end;
    double ms = 0;
    int32_t tokens = 0;
  };
  Timed(std::unique_ptr<attention::Backend> backend, std::vector<StepTime>& steps)
      : backend_(std::move(backend)), steps_(steps) {}
  std::string name() const override { return backend_->name(); }
  int32_t page_tokens() const override { return backend_->page_tokens(); }
  int32_t page_count() const override { return backend_->page_count(); }
  int32_t max_step_tokens() const override { return backend_->max_step_tokens(); }
  int64_t page_bytes() const override { return backend_->page_bytes(); }
  absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) override {
    return backend_->CopyPageOut(page, to);
  }
  absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) override {
    return backend_->CopyPageIn(from, page);
  }
  absl::Status RecoverExperts(absl::Duration patience) override { return backend_->RecoverExperts(patience); }
  absl::Status Step(const attention::StepBatch& batch, attention::StepResult* result) override {
    const auto begin = Clock::now();
    absl::Status status = backend_->Step(batch, result);
    const auto end = Clock::now();
    steps_.push_back({end, Milliseconds(end - begin), static_cast<int32_t>(batch.tokens.size())});
    return status;
  }

 private:
  const std::unique_ptr<attention::Backend> backend_;
  std::vector<StepTime>& steps_;  // read when nothing runs
};

// Gaps longer than twice the usual one, as a share of all.
double ShareOver(const std::vector<double>& gaps, double limit) {
  const auto over = std::count_if(gaps.begin(), gaps.end(), [limit](double g) { return g > limit; });
  return gaps.empty() ? 0 : static_cast<double>(over) / static_cast<double>(gaps.size());
}

void BM_BesideALongPrompt(benchmark::State& state) {
  const std::string path =
      Env("TANDEM_BENCH_MODEL", Env("TANDEM_SOURCE_DIR", ".") + "/models/tinyr1-Q4_K_M.gguf");
  const int threads = std::stoi(Env("TANDEM_BENCH_THREADS", "2"));
  const auto file = *gguf::File::Open(path);
  const model::ModelConfig config = *model::ReadModelConfig(*file);
  attention::CpuBackendOptions b;
  b.threads.threads = threads;
  b.page_count = 1024;
  attention::SchedulerOptions o;
  o.context_length = kContext;
  o.vocab_size = config.vocab_size;
  o.max_decode_slowdown = static_cast<double>(state.range(1));
  std::vector<Timed::StepTime> steps;
  auto backend = *attention::CreateCpuBackend(
      *file, config, b, *MakeLocalExperts(path, {{}}, kernels::Precision::kFast, threads));
  auto scheduler = *attention::Scheduler::Create(o, std::make_unique<Timed>(std::move(backend), steps));
  std::mt19937 rng(1);
  const auto submit = [&](const attention::SequenceRequest& r, Stream& s) {
    return *scheduler->Submit(r, s.callback());
  };
  std::vector<double> undisturbed, during;
  Timed::StepTime longest;  // of those that had prompt tokens beside the streams
  double beside = 0, alone = 0;
  for (auto _ : state) {
    {
      Stream s;
      const auto begin = Clock::now();
      submit(Random(rng, config.vocab_size, kLongPrompt, 1), s);
      s.WaitFor(1);
      alone += Milliseconds(Clock::now() - begin);
    }
    std::vector<Stream> streams(state.range(0));
    std::vector<uint64_t> numbers;
    for (Stream& s : streams) numbers.push_back(submit(Random(rng, config.vocab_size, 20, 3000), s));
    for (Stream& s : streams) s.WaitFor(20);
    const auto begin = Clock::now();
    for (Stream& s : streams) s.WaitFor(kUndisturbed);
    const auto middle = Clock::now();
    Stream prompt;
    submit(Random(rng, config.vocab_size, kLongPrompt, 1), prompt);
    prompt.WaitFor(1);
    const auto end = Clock::now();
    beside += Milliseconds(end - middle);
    const size_t after = streams.back().times().size() + kUndisturbed;
    for (Stream& s : streams) s.WaitFor(after);
    const auto later = Clock::now();
    for (uint64_t number : numbers) scheduler->Cancel(number);
    for (const double g : Gaps(streams, begin, middle)) undisturbed.push_back(g);
    for (const double g : Gaps(streams, middle, end)) during.push_back(g);
    for (const double g : Gaps(streams, end, later)) undisturbed.push_back(g);
    while (scheduler->Snapshot().running > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    for (const Timed::StepTime& s : steps) {
      if (s.end > middle && s.end <= end && s.tokens > state.range(0) && s.ms > longest.ms) longest = s;
    }
    steps.clear();
  }
  const auto rounds = static_cast<double>(state.iterations());
  state.counters["alone_p50_ms"] = Quantile(undisturbed, 0.5);
  state.counters["alone_p95_ms"] = Quantile(undisturbed, 0.95);
  state.counters["ratio_mean"] = Mean(during) / Mean(undisturbed);
  state.counters["ratio_p50"] = Quantile(during, 0.5) / Quantile(undisturbed, 0.5);
  state.counters["ratio_p95"] = Quantile(during, 0.95) / Quantile(undisturbed, 0.95);
  state.counters["alone_max_ms"] = Quantile(undisturbed, 1);
  state.counters["max_ms"] = Quantile(during, 1);
  state.counters["alone_over_2x"] = ShareOver(undisturbed, 2 * Quantile(undisturbed, 0.5));
  state.counters["over_2x"] = ShareOver(during, 2 * Quantile(undisturbed, 0.5));
  state.counters["longest_mixed_step_ms"] = longest.ms;
  state.counters["its_prompt_tokens"] = longest.tokens - static_cast<double>(state.range(0));
  state.counters["prompt_beside_ms"] = beside / rounds;
  state.counters["prompt_alone_ms"] = alone / rounds;
}
// Streams; --max-decode-slowdown (0: a fixed chunk).
BENCHMARK(BM_BesideALongPrompt)
    ->ArgsProduct({{1, 4, 15}, {2, 0}})
    ->Iterations(5)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace tandem::golden
