#include "cli/bench/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "cli/bench/moe_runner.h"
#include "cli/bench/util.h"
#include "cli/synth/shapes.h"
#include "cli/synth/synth.h"
#include "common/kernels/kernels.h"

namespace tandem::cli {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

struct Result {
  int code;
  std::string out, err;
};

Result Measure(const BenchOptions& options) {
  std::ostringstream out, err;
  const int code = RunBench(options, out, err);
  return {code, out.str(), err.str()};
}

BenchOptions Quick(const char* which) {
  BenchOptions options;
  options.which = which;
  options.json = true;
  options.threads = 1;
  options.repeat = 2;
  options.seconds = 0;
  options.shape = "tiny";
  options.layers = 2;
  options.experts = 8;
  options.tokens = "1,3";
  options.megabytes = 1;
  options.calls = 200;
  return options;
}

// Every line is an object of the contract's fields, in range; returns them.
std::vector<json> Lines(const Result& r, const char* bench) {
  static const std::set<std::string> kFields = {
      "bench",   "machine", "isa",          "threads", "shape",  "tokens", "bytes",
      "seconds", "gbps",    "ceiling_gbps", "ratio",   "p50_us", "p99_us", "tokens_per_second"};
  EXPECT_EQ(r.code, 0) << r.err;
  std::vector<json> lines;
  std::istringstream in(r.out);
  for (std::string line; std::getline(in, line);) {
    lines.push_back(json::parse(line));
    const json& j = lines.back();
    EXPECT_EQ(j["bench"], bench);
    EXPECT_FALSE(j["machine"].get<std::string>().empty());
    for (const auto& [key, value] : j.items()) {
      EXPECT_TRUE(kFields.contains(key)) << key;
      if (!value.is_number()) continue;
      EXPECT_TRUE(std::isfinite(value.get<double>())) << key;
      if (key == "tokens") {
        EXPECT_GE(value.get<double>(), 0) << key;
      } else {
        EXPECT_GT(value.get<double>(), 0) << key;
      }
    }
  }
  EXPECT_FALSE(lines.empty());
  return lines;
}

void ExpectFields(const json& j, const std::vector<const char*>& fields) {
  for (const char* field : fields) EXPECT_TRUE(j.contains(field)) << field << " in " << j;
}

TEST(Bench, RooflineHasReadsAndEveryType) {
  BenchOptions options = Quick("roofline");
  options.isa = "all";
  const auto lines = Lines(Measure(options), "roofline");
  EXPECT_EQ(lines.size(), kernels::AvailableIsas().size() * (1 + 11));
  std::set<std::string> isas, shapes;
  for (const json& j : lines) {
    ExpectFields(j, {"isa", "threads", "shape", "bytes", "seconds", "gbps", "ceiling_gbps", "ratio"});
    isas.insert(j["isa"]);
    shapes.insert(j["shape"].get<std::string>().substr(0, 4));
    EXPECT_NEAR(j["bytes"].get<double>() / j["seconds"].get<double>() / 1e9, j["gbps"].get<double>(),
                1e-6 * j["gbps"].get<double>());
  }
  EXPECT_EQ(isas.size(), kernels::AvailableIsas().size());
  EXPECT_TRUE(shapes.contains("read") && shapes.contains("Q4_K") && shapes.contains("BF16"));
}

TEST(Bench, MoePausesBeforeEachCall) {
  BenchOptions options = Quick("moe");
  options.tokens = "1";
  options.pause_us = 20'000;
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(Lines(Measure(options), "moe").size(), 1u);
  // Two passes over two layers at least.
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(80));
}

TEST(Bench, MoeCountsDistinctExpertsAndTokens) {
  const auto lines = Lines(Measure(Quick("moe")), "moe");
  ASSERT_EQ(lines.size(), 2u);
  for (const json& j : lines) {
    ExpectFields(j, {"isa", "threads", "shape", "tokens", "bytes", "seconds", "gbps", "ceiling_gbps", "ratio",
                     "p50_us", "p99_us", "tokens_per_second"});
    EXPECT_LE(j["p50_us"].get<double>(), j["p99_us"].get<double>());
    // The tiny shape has two MoE layers.
    EXPECT_NEAR(
        j["tokens_per_second"].get<double>() * 2 * j["seconds"].get<double>() / j["tokens"].get<double>(), 1,
        1e-6);
  }
  // One token's experts: 4 of 256 x 512, gate and up in Q4_K, down in Q4_K in one layer and Q6_K in the
  // other.
  const double matrix = 256 * 512 / 256;
  EXPECT_EQ(lines[0]["bytes"].get<double>(), 4 * (2 * 144 + (144 + 210) / 2.0) * matrix);
  EXPECT_GT(lines[1]["bytes"].get<double>(), lines[0]["bytes"].get<double>());
}

TEST(Bench, MoeInSlicesIsMeasuredBesideOneProcess) {
  BenchOptions options = Quick("moe");
  options.threads = options.slices = 2;
  options.tokens = "2";
  const auto lines = Lines(Measure(options), "moe");
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_THAT(lines[0]["shape"].get<std::string>(), HasSubstr("1 process"));
  EXPECT_THAT(lines[1]["shape"].get<std::string>(), HasSubstr("2 slices"));
  EXPECT_EQ(lines[0]["bytes"], lines[1]["bytes"]);  // the same routing, all of it in both
}

// The slices' answers add up to what one process with the same weights says: every runner with one slice has
// the same weights.
TEST(Bench, ProcessRunnerAnswersAsTheLocalOne) {
  MoeRunnerOptions how;
  const auto config = Resize(*NamedShape("tiny"), 0, 1, 8);
  ASSERT_TRUE(config.ok());
  how.generate.config = *config;
  how.generate.layers.resize(1);
  how.max_tokens = 2;
  how.cpus = *BenchCpus(1);
  const auto local = MakeLocalRunner(how);
  ASSERT_TRUE(local.ok()) << local.status();
  const auto process = MakeProcessRunner(how, 1);
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_EQ((*local)->resident_bytes(), (*process)->resident_bytes());
  std::vector<std::vector<float>> answers;
  for (MoeRunner* runner : {local->get(), process->get()}) {
    for (int i = 0; i < 8; ++i) runner->ids()[static_cast<size_t>(i)] = i;
    for (int i = 0; i < 8; ++i) runner->weights()[static_cast<size_t>(i)] = 0.5f;
    for (size_t i = 0; i < runner->activations().size(); ++i) {
      runner->activations()[i] = static_cast<uint16_t>(0x3f80 + i % 7);  // about 1
    }
    const auto result = runner->Forward({0, 2});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_GT(result->bytes, 0);
    answers.emplace_back(runner->answer().begin(), runner->answer().end());
    EXPECT_FALSE(runner->Forward({7, 2}).ok());  // no such layer; ends a process
  }
  EXPECT_EQ(answers[0], answers[1]);
  EXPECT_NE(answers[0], std::vector<float>(answers[0].size()));
}

TEST(Bench, RoundtripMeasuresRingAndInBand) {
  if (std::getenv("TANDEM_BINARY_DIR") == nullptr) GTEST_SKIP() << "TANDEM_BINARY_DIR is not set";
  BenchOptions options = Quick("roundtrip");
  options.expert_program = std::string(std::getenv("TANDEM_BINARY_DIR")) + "/bin/tandem-expert";
  options.model = std::string(std::getenv("TANDEM_SOURCE_DIR")) + "/models/tinyr1-Q4_K_M.gguf";
  const auto lines = Lines(Measure(options), "roundtrip");
  ASSERT_EQ(lines.size(), 5u);
  for (const json& j : lines) ExpectFields(j, {"shape", "tokens", "seconds", "p50_us", "p99_us"});
  EXPECT_THAT(lines[0]["shape"].get<std::string>(), HasSubstr("ring, spinning, empty"));
  EXPECT_THAT(lines[4]["shape"].get<std::string>(), HasSubstr("in-band"));
}

TEST(Bench, LoadReadsTheExperts) {
  SynthOptions synth;
  synth.out = ::testing::TempDir() + "/tandem_bench_" + std::to_string(getpid()) + ".gguf";
  synth.shape = "tiny";
  std::ostringstream quiet;
  ASSERT_EQ(RunSynth(synth, quiet, quiet), 0) << quiet.str();
  BenchOptions options = Quick("load");
  options.model = synth.out;
  const auto lines = Lines(Measure(options), "load");
  std::filesystem::remove(synth.out);
  ASSERT_EQ(lines.size(), 1u);
  ExpectFields(lines[0], {"threads", "shape", "bytes", "seconds", "gbps", "ceiling_gbps", "ratio"});
  // 2 layers of 16 experts; see above.
  EXPECT_EQ(lines[0]["bytes"].get<double>(), 2 * 16 * (2 * 144 + (144 + 210) / 2.0) * 256 * 512 / 256);
}

TEST(Bench, TheTableHasARowForEachMeasurement) {
  BenchOptions options = Quick("moe");
  options.json = false;
  const Result r = Measure(options);
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("ceiling"));
  EXPECT_THAT(r.out, HasSubstr("working set"));
  EXPECT_THAT(r.out, HasSubstr("moe tiny q4_k_m, 2 layers of 8"));
}

TEST(Bench, ErrorsSayWhatIsWrong) {
  const auto expect = [](int code, const char* text, const char* which, const auto& change) {
    BenchOptions options = Quick(which);
    change(options);
    const Result r = Measure(options);
    EXPECT_EQ(r.code, code) << r.err;
    EXPECT_THAT(r.err, HasSubstr(text));
  };
  expect(2, "there are roofline, moe", "rooflin", [](BenchOptions&) {});
  expect(2, "--isa neon: this machine has scalar", "moe", [](BenchOptions& o) { o.isa = "neon"; });
  for (const char* tokens : {"", "0", "1,", ",1", "1;2", "x", "65537"}) {
    expect(2, "--tokens", "moe", [&](BenchOptions& o) { o.tokens = tokens; });
  }
  expect(2, "--experts 3: a token of this shape uses 4", "moe", [](BenchOptions& o) { o.experts = 3; });
  expect(2, "--slices 2: there are 1 threads", "moe", [](BenchOptions& o) { o.slices = 2; });
  expect(1, "are available: fewer --layers", "moe", [](BenchOptions& o) {
    o.shape = "r1";
    o.layers = 1000;
    o.experts = 256;
  });
  expect(1, "MB are available", "roofline", [](BenchOptions& o) { o.megabytes = 1000000000; });
  expect(2, "--model names", "load", [](BenchOptions&) {});
  expect(1, "/no/such.gguf", "load", [](BenchOptions& o) { o.model = "/no/such.gguf"; });
}

TEST(Report, FieldsThatDoNotApplyAreLeftOut) {
  Measurement m;
  m.bench = "load";
  m.machine = "x";
  m.ratio = 0.5;
  EXPECT_EQ(ToJson(m), R"({"bench":"load","machine":"x","ratio":0.5})");
}

TEST(Statistics, QuantilesAreValuesThatWereSeen) {
  EXPECT_EQ(Median({3, 1, 2}), 2);
  EXPECT_EQ(Median({4, 1, 2, 3}), 2.5);
  EXPECT_EQ(Quantile({5, 1, 2, 3, 4}, 0.5), 3);
  EXPECT_EQ(Quantile({5, 1, 2, 3, 4}, 0.99), 5);
  EXPECT_EQ(Quantile({7}, 0.01), 7);
  EXPECT_EQ(Quantile({}, 0.5), 0);
}

}  // namespace
}  // namespace tandem::cli
