#include "cli/inspect/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/gguf/gguf.h"

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string DemoModel() {
  return std::string(std::getenv("TANDEM_SOURCE_DIR")) + "/models/tinyr1-Q4_K_M.gguf";
}

struct Result {
  int code = 0;
  std::string out, err;
};

Result Inspect(const InspectOptions& options) {
  std::ostringstream out, err;
  const int code = RunInspect(options, out, err);
  return {code, out.str(), err.str()};
}

TEST(Inspect, TheDemoModel) {
  InspectOptions options;
  options.file = DemoModel();
  options.numa = "2";
  options.vram_gb = 24;
  const Result r = Inspect(options);
  EXPECT_EQ(r.code, 0) << r.err;
  for (const char* part : {"GGUF v3", "13.1 MB", "deepseek2", "6, of which 1 dense",
                           "16 of 256, 4 a token, 1 shared", "best 2 of 4 groups", "4,096 tokens",
                           "experts 0 to 7", "experts 8 to 15", "fits into 24.0 GB", "Q4_K", "Q6_K"}) {
    EXPECT_THAT(r.out, HasSubstr(part));
  }
}

TEST(Inspect, JsonAddsUp) {
  InspectOptions options;
  options.file = DemoModel();
  options.numa = "3";
  options.context = 1000;
  options.json = options.tensors = options.metadata = true;
  const Result r = Inspect(options);
  ASSERT_EQ(r.code, 0) << r.err;
  const auto report = nlohmann::json::parse(r.out);
  const auto& memory = report["memory"];
  EXPECT_EQ(report["architecture"], "deepseek2");
  EXPECT_EQ(memory["kv_bytes_per_token"], 6 * (256 + 32) * 2);
  EXPECT_EQ(memory["kv_bytes"], 1000 * 6 * (256 + 32) * 2);
  uint64_t tensor_bytes = 0, shard_bytes = 0;
  for (const auto& tensor : report["tensors"]) tensor_bytes += tensor["bytes"].get<uint64_t>();
  for (const auto& shard : memory["experts"]) shard_bytes += shard["bytes"].get<uint64_t>();
  EXPECT_EQ(tensor_bytes, memory["dense_bytes"].get<uint64_t>() + memory["expert_bytes"].get<uint64_t>());
  EXPECT_EQ(shard_bytes, memory["expert_bytes"].get<uint64_t>());
  EXPECT_EQ(memory["experts"][0]["experts"], nlohmann::json({0, 5}));
  EXPECT_EQ(memory["experts"][2]["experts"], nlohmann::json({11, 15}));
  EXPECT_EQ(report["metadata"]["deepseek2.block_count"], "6");
  EXPECT_GT(report["parameters"].get<uint64_t>(), 21'000'000u);
  EXPECT_LT(report["parameters"].get<uint64_t>(), 22'000'000u);
}

TEST(Inspect, ListsTensorsAndKeysWhenAsked) {
  InspectOptions options;
  options.file = DemoModel();
  EXPECT_THAT(Inspect(options).out, Not(HasSubstr("blk.1.ffn_down_exps.weight")));
  options.tensors = options.metadata = true;
  const Result r = Inspect(options);
  EXPECT_THAT(r.out, HasSubstr("blk.1.ffn_down_exps.weight"));
  EXPECT_THAT(r.out, HasSubstr("tokenizer.ggml.pre = deepseek-v3"));
}

TEST(Inspect, BadValuesAndFiles) {
  InspectOptions options;
  options.file = "/nonexistent.gguf";
  EXPECT_EQ(Inspect(options).code, 1);
  EXPECT_THAT(Inspect(options).err, HasSubstr("/nonexistent.gguf"));
  options.numa = "many";
  EXPECT_EQ(Inspect(options).code, 2);
  options.numa = "17";
  options.file = DemoModel();
  EXPECT_EQ(Inspect(options).code, 2);
  EXPECT_EQ(Inspect(options).err, "tandem inspect: --numa 17: the model has 16 experts\n");
  options.numa = "16";
  options.context = 5000;
  EXPECT_EQ(Inspect(options).code, 2);
  EXPECT_EQ(Inspect(options).err, "tandem inspect: --ctx 5000: the model's context is 4096 tokens\n");
  EXPECT_EQ(Inspect(options).out, "");
}

TEST(Inspect, AnotherArchitectureIsDescribedAndRefused) {
  gguf::Writer writer;
  writer.AddString("general.architecture", "llama");
  writer.AddString("general.name", "bad\x1B[31mname");
  const std::string path = ::testing::TempDir() + "tandem-inspect-llama.gguf";
  ASSERT_TRUE(writer.WriteFile(path).ok());
  InspectOptions options;
  options.file = path;
  const Result r = Inspect(options);
  EXPECT_EQ(r.code, 1);
  EXPECT_THAT(r.err, HasSubstr("llama"));
  EXPECT_THAT(r.out, HasSubstr("bad\\x1B[31mname"));
  std::remove(path.c_str());
}

}  // namespace
}  // namespace tandem::cli
