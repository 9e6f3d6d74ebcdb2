#include "cli/plan/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/serve/memory_plan.h"

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Numbers that can be followed by hand: 2 MoE layers of 10 experts of 10 MB, 2 a token; 50 GB/s everywhere.
ModelBytes SmallModel() {
  ModelBytes m;
  model::ModelConfig& c = m.config;
  c.hidden_size = c.moe_intermediate_size = 1000;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  c.num_attention_heads = 10;
  c.kv_lora_rank = 400;
  c.qk_rope_head_dim = 100;
  c.qk_nope_head_dim = 128;
  c.v_head_dim = 128;
  c.n_routed_experts = 10;
  c.num_experts_per_tok = 2;
  m.every_step = 1'000'000'000;
  m.shared = 100'000'000;
  m.routed = 200'000'000;
  m.dense_values = 2'000'000'000;
  return m;
}
MachineFigures SmallMachine() {
  MachineFigures m;
  m.sockets = 2;
  m.dram_gbps = 50;
  m.cpu_efficiency = 0.5;
  m.cpu_tmacs = 1;
  m.vram_gbps = 100;
  m.gpu_efficiency = 0.5;
  m.gpu_tflops = 10;
  m.gpu_compute_efficiency = 0.5;
  m.pcie_gbps = 10;
  m.round_trip_us = 100;
  return m;
}

std::string Bundled() {
  const char* source = std::getenv("TANDEM_SOURCE_DIR");
  return std::string(source != nullptr ? source : ".") + "/models/tinyr1-Q4_K_M.gguf";
}

TEST(Predict, OneRequest) {
  const DecodePoint p = PredictDecode(SmallModel(), SmallMachine(), KvType::kBf16, 1, 1000);
  EXPECT_NEAR(p.distinct, 2, 1e-12);
  EXPECT_NEAR(p.read, 2 * 2 * 1e7 / 50e9, 1e-12);      // 2 experts in 2 layers
  EXPECT_NEAR(p.multiply, 2 * 2 * 3e6 / 1e12, 1e-12);  // 3 matrices of a million
  EXPECT_NEAR(p.weights, 1e9 / 50e9, 1e-12);
  EXPECT_NEAR(p.shared, 1e8 / 50e9, 1e-12);
  EXPECT_EQ(p.kv_bytes, 1000 * 3 * 500 * 2);
  EXPECT_NEAR(p.kv, 3e6 / 50e9, 1e-12);
  EXPECT_NEAR(p.round_trips, 2e-4, 1e-12);
  // The shared experts take longer than the routed ones, which they hide.
  EXPECT_NEAR(p.step, 0.02 + 6e-5 + 0.002 + 2e-4, 1e-9);
  EXPECT_EQ(p.bound, Bound::kVram);
  EXPECT_NEAR(p.tokens_per_second(), 1 / p.step, 1e-9);
}

TEST(Predict, ManyRequestsMeetDistinctExperts) {
  ModelBytes model = SmallModel();
  EXPECT_NEAR(PredictDecode(model, SmallMachine(), KvType::kBf16, 2, 1).distinct, 3.6, 1e-12);
  EXPECT_NEAR(PredictDecode(model, SmallMachine(), KvType::kBf16, 100, 1).distinct, 10, 1e-6);
  model.config.n_routed_experts = 256;
  model.config.num_experts_per_tok = 8;
  EXPECT_NEAR(DistinctExperts(model.config, 8), 57.4, 0.1);
  EXPECT_NEAR(DistinctExperts(model.config, 64), 222.4, 0.1);
}

TEST(Predict, TheLongestPartIsTheBound) {
  MachineFigures m = SmallMachine();
  auto bound = [&](const ModelBytes& model, int64_t requests, int64_t context) {
    return PredictDecode(model, m, KvType::kBf16, requests, context).bound;
  };
  ModelBytes model = SmallModel();
  model.routed = 200'000'000'000;  // 10 GB an expert
  EXPECT_EQ(bound(model, 1, 1), Bound::kDram);
  model = SmallModel();
  m.cpu_tmacs = 1e-4;
  EXPECT_EQ(bound(model, 1, 1), Bound::kCpuArithmetic);
  m = SmallMachine();
  m.round_trip_us = 50000;
  EXPECT_EQ(bound(model, 1, 1), Bound::kRoundTrips);
  m = SmallMachine();
  m.gpu_tflops = 0.01;
  EXPECT_EQ(bound(model, 1, 100000), Bound::kGpuArithmetic);
}

TEST(Predict, WithoutAGpuTheCpuReadsAll) {
  MachineFigures m = SmallMachine();
  m.gpu = false;
  const DecodePoint p = PredictDecode(SmallModel(), m, KvType::kBf16, 1, 1000);
  const double attention = 2.0 * 10 * 900 * 1000 * 3 / 2 / 1e12;
  EXPECT_NEAR(p.step, (1.1e9 + 4e7 + 3e6) / 50e9 + (2e9 + 1.2e7) / 1e12 + attention, 1e-9);
  EXPECT_EQ(p.round_trips, 0);
  EXPECT_EQ(StreamBreakEven(SmallModel(), m, {}), 0);
}

TEST(Predict, Prefill) {
  const PrefillPoint p =
      PredictPrefill(SmallModel(), SmallMachine(), {.chunk = 50, .stream_chunk = 4096}, 100);
  const double attention = 100 * 2.0 * 10 * 900 * 50.5 * 3 / 5e12;
  // Two chunks that meet nearly all experts; the dense part is bound by its arithmetic.
  EXPECT_NEAR(p.on_cpu, 2 * 2e8 / 50e9 + 100 * 1.2e7 / 1e12 + 2 * 0.04 + 4e-4 + attention, 1e-6);
  EXPECT_EQ(p.cpu_bound, Bound::kGpuArithmetic);
  EXPECT_NEAR(p.streamed, 2 * 100 * 2.012e9 / 5e12 + attention, 1e-6);
  EXPECT_EQ(p.stream_bound, Bound::kGpuArithmetic);
  MachineFigures slow_bus = SmallMachine();
  slow_bus.pcie_gbps = 0.1;
  const PrefillPoint slow = PredictPrefill(SmallModel(), slow_bus, {.share = false}, 100);
  EXPECT_NEAR(slow.streamed, 2e8 / 0.1e9, 1e-6);
  EXPECT_EQ(slow.stream_bound, Bound::kPcie);
  EXPECT_EQ(slow.shared, 0);
  MachineFigures measured = SmallMachine();
  measured.cpu_prefill = 10;
  EXPECT_GT(PredictPrefill(SmallModel(), measured, {}, 100).on_cpu, 10);
}

// The copies of a part end when the CPU ends with the rest, which it began when the GPU had all else behind
// it.
TEST(Predict, PrefillSharedWithTheCpu) {
  MachineFigures m = SmallMachine();
  m.pcie_gbps = 0.1;
  const PrefillPoint p = PredictPrefill(SmallModel(), m, {}, 100);
  ASSERT_GT(p.shared, 0.5);
  ASSERT_LT(p.shared, 1);
  const double rest = 2 * 100 * 2e9 / 5e12 + 100 * 2.0 * 10 * 900 * 50.5 * 3 / 5e12;
  const double cpu = 2e8 / 50e9 / (1 - 0.1 / (m.sockets * m.dram_gbps)) + 100 * 1.2e7 / 1e12;
  EXPECT_NEAR(p.streamed, (1 - p.shared) * 2, 1e-6);
  EXPECT_NEAR(p.streamed, rest + p.shared * cpu, 1e-4);
  // Passes that are shared, or one that is too large for it, whichever is faster.
  const PrefillOptions large{.stream_chunk = 8192};
  EXPECT_EQ(PredictPrefill(SmallModel(), m, large, 8192).shared, 0);
  m.pcie_gbps = 0.02;
  EXPECT_GT(PredictPrefill(SmallModel(), m, large, 4200).shared, 0);
  EXPECT_LT(PredictPrefill(SmallModel(), m, large, 4200).streamed,
            PredictPrefill(SmallModel(), m, {.stream_chunk = 8192, .share = false}, 4200).streamed);
  m.pcie_gbps = 1e6;
  EXPECT_EQ(PredictPrefill(SmallModel(), m, {}, 100).shared, 0);
}

// What comes before the routing is known fills the buffers, the rest comes after it.
TEST(Predict, SmallBuffersDelayThePass) {
  MachineFigures m = SmallMachine();
  m.pcie_gbps = 0.1;
  auto seconds = [&](int64_t megabytes) {
    return PredictPrefill(SmallModel(), m, {.stream_buffer_mb = megabytes, .share = false}, 100).streamed;
  };
  const double rest = 2 * 100 * 2e9 / 5e12 + 100 * 2.0 * 10 * 900 * 50.5 * 3 / 5e12;
  const double layers = static_cast<double>(SmallModel().config.num_moe_layers());
  EXPECT_NEAR(seconds(1), 2 + rest - layers * 1e6 / 0.1e9, 1e-6);
  EXPECT_NEAR(seconds(1000), 2, 1e-6);  // all have come while the GPU was busy with the rest
}

// Keys of 128 + 100 values and values of 128 for a pair, made from latents of 400 for each position.
TEST(Predict, LongPromptsAttendToKeysAndValuesMadeOnce) {
  const PrefillPoint p =
      PredictPrefill(SmallModel(), SmallMachine(), {.stream_chunk = 8000, .share = false}, 8000);
  const double attention =
      2.0 * 10 * 3 * (8000 * 4000.5 * (128 + 100 + 128) + 2 * 8000.0 * 400 * (128 + 128)) / 5e12;
  EXPECT_NEAR(p.streamed, 2 * 8000 * 2.012e9 / 5e12 + attention, 1e-6);
}

TEST(Predict, BreakEvenIsWhereTheTwoMeet) {
  MachineFigures m = SmallMachine();
  m.cpu_tmacs = 0.01;
  m.pcie_gbps = 0.5;
  const PrefillOptions options{.share = false};
  const int64_t at = StreamBreakEven(SmallModel(), m, options);
  ASSERT_GT(at, 1);
  auto gain = [&](int64_t tokens) {
    const PrefillPoint p = PredictPrefill(SmallModel(), m, options, tokens);
    return p.on_cpu - p.streamed;
  };
  EXPECT_GT(gain(at), 0);
  EXPECT_LE(gain(at - 1), 0);
  m.pcie_gbps = 1e-6;
  EXPECT_EQ(StreamBreakEven(SmallModel(), m, options), 0);
  m.pcie_gbps = 0.5;
  const int64_t shared = StreamBreakEven(SmallModel(), m, {});
  EXPECT_GE(shared, 65);
  EXPECT_LE(shared, at);
}

// DeepSeek-R1's own numbers, as DESIGN knows them: 24.8 or 28.6 MB an expert, 671 B parameters, 70 KB of KV
// cache a token.
TEST(ModelBytes, R1) {
  SynthOptions shape;
  const auto plan = PlanSynth(shape);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ModelBytes m = BytesOfPlan(*plan);
  EXPECT_NEAR(static_cast<double>(m.parameters), 671e9, 1e9);
  EXPECT_NEAR(m.ExpertBytes(), 26.5e6, 1e6);
  EXPECT_NEAR(static_cast<double>(m.dense_bytes() + m.routed), 404e9, 4e9);
  EXPECT_NEAR(8 * 58 * m.ExpertBytes(), 12.4e9, 0.4e9);
  EXPECT_NEAR(static_cast<double>(m.dense_bytes()), 10e9, 0.7e9);
  EXPECT_EQ(KvBytesPerToken(m.config, KvType::kBf16), 61u * 576 * 2);
  EXPECT_NEAR(m.RoutedMacs(), 58 * 8 * 44.04e6, 1e8);
  EXPECT_NEAR(static_cast<double>(m.dense_values), 16e9, 1.5e9);
}

TEST(ModelBytes, TheDemoModelsFile) {
  const auto file = gguf::File::Open(Bundled(), {.map_data = false});
  ASSERT_TRUE(file.ok()) << file.status();
  const auto m = BytesOfFile(**file);
  ASSERT_TRUE(m.ok()) << m.status();
  const auto memory = PlanMemory(**file, m->config, 0, 1);
  ASSERT_TRUE(memory.ok());
  EXPECT_EQ(m->routed, memory->expert_bytes);
  EXPECT_EQ(m->dense_bytes(), memory->dense_bytes);
  EXPECT_EQ(m->parameters, memory->parameters);
  EXPECT_GT(m->shared, 0u);
}

// The routed experts as docs/performance.md has measured them, with the figures that docs/plan.md derives.
TEST(Predict, StandsBesideMeasurements) {
  struct Measured {
    int64_t tokens;
    double ms;  // a layer
  };
  auto check = [](int64_t experts, const MachineFigures& machine, const std::vector<Measured>& measured,
                  double tolerance) {
    SynthOptions shape;
    shape.dense_layers = 1;
    shape.moe_layers = 2;
    shape.experts = experts;
    const auto plan = PlanSynth(shape);
    ASSERT_TRUE(plan.ok());
    const ModelBytes model = BytesOfPlan(*plan);
    for (const Measured& each : measured) {
      const DecodePoint p = PredictDecode(model, machine, KvType::kBf16, each.tokens, 1);
      EXPECT_NEAR(1e3 * (p.read + p.multiply) / 2 / each.ms, 1, tolerance) << each.tokens << " tokens";
    }
  };
  MachineFigures two_cores;
  two_cores.sockets = 1;
  two_cores.dram_gbps = 42.6;
  two_cores.cpu_efficiency = 0.97;
  two_cores.cpu_tmacs = 0.98;
  check(96, two_cores, {{1, 5.73}, {2, 10.7}, {4, 19.8}, {8, 32.8}, {16, 48.4}, {64, 82.9}}, 0.1);
  MachineFigures sixteen_cores;
  sixteen_cores.sockets = 1;
  sixteen_cores.dram_gbps = 105;
  sixteen_cores.cpu_efficiency = 0.84;
  sixteen_cores.cpu_tmacs = 1.6;
  check(128, sixteen_cores, {{1, 3.04}, {2, 5.92}, {4, 10.6}, {8, 17.2}, {16, 27.0}, {64, 51.0}}, 0.2);
}

struct Result {
  int code = 0;
  std::string out, err;
};
Result Plan(const PlanOptions& options) {
  std::ostringstream out, err;
  const int code = RunPlan(options, out, err);
  return {code, out.str(), err.str()};
}

TEST(Plan, TheReferenceBox) {
  const Result r = Plan({});
  ASSERT_EQ(r.code, 0) << r.err;
  for (const char* part :
       {"shape r1, q4_k_m", "671.0 B parameters", "--dram-gbps", "reference", "KV cache, bf16", "each socket",
        "8.0", "222.4", "bound by", "DRAM", "does not fit", "streaming is faster from"}) {
    EXPECT_THAT(r.out, HasSubstr(part));
  }
}

TEST(Plan, JsonSaysTheSame) {
  PlanOptions options;
  options.json = true;
  options.dram_gbps = 100;
  options.requests = "1,8";
  options.contexts = "1000";
  options.prompts = "100";
  options.kv_type = "int8";
  const Result r = Plan(options);
  ASSERT_EQ(r.code, 0) << r.err;
  const auto report = nlohmann::json::parse(r.out);
  EXPECT_EQ(report["figures"]["dram-gbps"]["value"], 100);
  EXPECT_EQ(report["figures"]["dram-gbps"]["source"], "given");
  EXPECT_EQ(report["figures"]["vram-gb"]["source"], "reference box");
  ASSERT_EQ(report["decode"].size(), 2u);
  const auto& one = report["decode"][0];
  EXPECT_NEAR(one["tokens_per_second"].get<double>(), 1 / one["seconds"].get<double>(), 1e-9);
  EXPECT_NEAR(report["decode"][1]["distinct_experts"].get<double>(), 57.4, 0.1);
  EXPECT_EQ(report["memory"]["kv_bytes_per_token"], 61 * (512 + 4 + 128));
  EXPECT_EQ(report["memory"]["kv_bytes"], 8192 * 61 * (512 + 4 + 128));
  EXPECT_TRUE(report["memory"]["fits"]);
  EXPECT_EQ(report["prefill"].size(), 1u);
}

TEST(Plan, AFileAndNoGpu) {
  PlanOptions options;
  options.model = Bundled();
  options.gpu = false;
  const Result r = Plan(options);
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("RAM: dense weights"));
  EXPECT_THAT(r.out, HasSubstr("1,024"));
  EXPECT_THAT(r.out, Not(HasSubstr("8,192"))) << "the model's context is 4096";
  EXPECT_THAT(r.out, Not(HasSubstr("stream")));
}

TEST(Plan, BadFlagsAndFiles) {
  PlanOptions options;
  options.requests = "1,x";
  Result r = Plan(options);
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.err, HasSubstr("--requests 1,x"));
  options = {};
  options.pcie_gbps = 0;
  EXPECT_EQ(Plan(options).code, 2);
  options = {};
  options.synth.experts = 2;
  EXPECT_EQ(Plan(options).code, 2);
  options = {};
  options.model = "/nowhere.gguf";
  r = Plan(options);
  EXPECT_EQ(r.code, 1);
  EXPECT_THAT(r.err, HasSubstr("/nowhere.gguf"));
}

TEST(Plan, MeasuresThisMachine) {
  const auto reads = MeasureReads();
  if (!reads.ok() && absl::IsResourceExhausted(reads.status())) GTEST_SKIP() << reads.status().message();
  ASSERT_TRUE(reads.ok()) << reads.status();
  EXPECT_GT(reads->dram_gbps, 0.1);
  EXPECT_GE(reads->sockets, 1);
}

}  // namespace
}  // namespace tandem::cli
