// Megabytes of text a second, one thread. The real vocabulary if ../shared has it, else the demo model's.
#include <benchmark/benchmark.h>

#include <memory>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/gguf/gguf.h"
#include "common/tokenizer/test_util.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::tokenizer {
namespace {

const Tokenizer& TheTokenizer() {
  static const Tokenizer* const tokenizer = [] {
    absl::StatusOr<std::unique_ptr<Tokenizer>> made = absl::NotFoundError("");
    if (const auto path = SharedPath("tokenizer/tokenizer.json")) {
      if (auto spec = SpecFromTokenizerJson(*path); spec.ok())
        made = Tokenizer::FromVocabulary(*std::move(spec));
    } else if (auto file = gguf::File::Open(SourcePath("models/tinyr1-Q4_K_M.gguf")); file.ok()) {
      made = Tokenizer::FromGguf(**file);
    }
    if (!made.ok()) {
      std::fprintf(stderr, "no vocabulary: set TANDEM_SOURCE_DIR or TANDEM_SHARED\n");
      std::exit(1);
    }
    return made->release();
  }();
  return *tokenizer;
}

std::string Repeat(std::string_view what, size_t bytes) {
  std::string out;
  while (out.size() < bytes) out.append(what);
  return out;
}

// Sentences put together at random, so that text does not repeat as a whole; words do, as they do in
// language.
std::string Mix(const std::vector<std::string>& sentences, size_t bytes) {
  std::mt19937 random(1);
  std::string out;
  while (out.size() < bytes) {
    out += sentences[random() % sentences.size()];
    if (random() % 4 == 0) out += std::to_string(random() % 100000) + "\n";
  }
  return out;
}

std::string English() {
  return Mix(
      {"The routed experts live in the memory of the two sockets, and every decoded token reads eight of "
       "them. ",
       "Nobody had expected the committee to postpone its deliberations until Thursday afternoon; still, it "
       "did. ",
       "\"Don't you think it's odd,\" she said, \"that we've never seen the lighthouse keeper's daughter?\" ",
       "Thermodynamic equilibrium is reached when entropy, subject to the constraints, attains its "
       "maximum. "},
      1 << 20);
}

std::string Chinese() {
  return Mix(
      {"这个模型的参数分布在两个处理器的内存里，每生成一个词都要读取其中的八个专家。",
       "天气预报说明天下午会有雷阵雨，请大家出门时记得带伞。",
       "他沉默了很久，终于说出了那句谁也没有想到的话：", "热力学第二定律指出，孤立系统的熵永远不会减少。"},
      1 << 20);
}

std::string Code() {
  return Mix({"for (size_t i = 0; i < values.size(); ++i) {\n    total += values[i] * weights[i];\n  }\n",
              "def render(template, **kwargs):\n    return env.from_string(template).render(**kwargs)\n\n",
              "SELECT user_id, COUNT(*) AS n FROM events WHERE ts >= '2025-01-01' GROUP BY user_id;\n",
              "  if (!status.ok()) return Annotate(status, absl::StrCat(\"tensor \", name));\n"},
             1 << 20);
}

void Run(benchmark::State& state, const std::string& text) {
  const Tokenizer& tokenizer = TheTokenizer();
  size_t tokens = 0;
  for (auto _ : state) {
    const auto ids = tokenizer.Encode(text);
    tokens = ids.size();
    benchmark::DoNotOptimize(ids.data());
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
  state.counters["tokens"] = static_cast<double>(tokens);
}

void Encode(benchmark::State& state, std::string (*make)()) { Run(state, make()); }
BENCHMARK_CAPTURE(Encode, english, English)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, chinese, Chinese)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, code, Code)->Unit(benchmark::kMillisecond);

void EncodeRepeated(benchmark::State& state, const char* unit) { Run(state, Repeat(unit, 1 << 20)); }
BENCHMARK_CAPTURE(EncodeRepeated, letter, "a")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, space, " ")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, digit, "7")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, cjk, "中")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, punctuation, "!")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, newline, "\n")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(EncodeRepeated, no_utf8, "\xFF")->Unit(benchmark::kMillisecond);

void Decode(benchmark::State& state) {
  const Tokenizer& tokenizer = TheTokenizer();
  const auto ids = tokenizer.Encode(English());
  size_t bytes = 0;
  for (auto _ : state) {
    StreamDecoder decoder(&tokenizer);
    bytes = 0;
    for (const int32_t id : ids) bytes += decoder.Push(id).size();
    benchmark::DoNotOptimize(bytes);
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * bytes));
}
BENCHMARK(Decode)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tandem::tokenizer
