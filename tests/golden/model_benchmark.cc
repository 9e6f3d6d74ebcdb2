// Decode and prefill of a whole model in one process, without wire or scheduler: what the kernels and the CPU
// backend take by themselves. Model: TANDEM_BENCH_MODEL, else the bundled one; threads: TANDEM_BENCH_THREADS,
// else 2.
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include <benchmark/benchmark.h>

#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "tests/golden/golden_prompts.h"
#include "tests/golden/local_experts.h"

namespace tandem::golden {
namespace {

std::string Env(const char* name, const std::string& fallback) {
  const char* v = std::getenv(name);
  return v != nullptr ? v : fallback;
}

class Fixture {
 public:
  static Fixture& Get() {
    static Fixture f;
    return f;
  }
  void Step(const std::vector<int32_t>& tokens, int32_t position, bool sample) {
    attention::StepBatch batch = OneSequence(tokens, position, pages_);
    batch.sequences[0].sample = sample;
    attention::StepResult r;
    if (!backend_->Step(batch, &r).ok()) throw std::runtime_error("step failed");
  }
  int64_t vocab() const { return config_.vocab_size; }

 private:
  Fixture() {
    const std::string path =
        Env("TANDEM_BENCH_MODEL", Env("TANDEM_SOURCE_DIR", ".") + "/models/tinyr1-Q4_K_M.gguf");
    const int threads = std::stoi(Env("TANDEM_BENCH_THREADS", "2"));
    file_ = *gguf::File::Open(path);
    config_ = *model::ReadModelConfig(*file_);
    attention::CpuBackendOptions o;
    o.threads.threads = threads;
    o.page_count = 128;
    backend_ = *attention::CreateCpuBackend(
        *file_, config_, o, *MakeLocalExperts(path, {{}}, kernels::Precision::kFast, threads));
    for (int32_t p = 0; p < o.page_count; ++p) pages_.push_back(p);
  }
  std::unique_ptr<gguf::File> file_;
  model::ModelConfig config_;
  std::unique_ptr<attention::Backend> backend_;
  std::vector<int32_t> pages_;
};

std::vector<int32_t> Tokens(int64_t n, int64_t vocab) {
  std::vector<int32_t> t;
  for (int64_t i = 0; i < n; ++i) t.push_back(static_cast<int32_t>(3 + i * 7919 % (vocab - 10)));
  return t;
}

void BM_Prefill(benchmark::State& state) {
  Fixture& f = Fixture::Get();
  const auto tokens = Tokens(state.range(0), f.vocab());
  for (auto _ : state) f.Step(tokens, 0, true);
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens.size() * state.iterations()),
                                                  benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Prefill)->Arg(8)->Arg(64)->Arg(256)->Arg(512)->UseRealTime();

// One token at a time at the given context.
void BM_Decode(benchmark::State& state) {
  Fixture& f = Fixture::Get();
  const auto context = static_cast<int32_t>(state.range(0));
  for (int32_t at = 0; at < context; at += 256) {
    f.Step(Tokens(std::min(256, context - at), f.vocab()), at, false);
  }
  for (auto _ : state) f.Step({17}, context, true);
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}
BENCHMARK(BM_Decode)->Arg(16)->Arg(512)->Arg(2048)->UseRealTime();

}  // namespace
}  // namespace tandem::golden
