#include "services/expert_cpu/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>

namespace tandem::expert {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Parsed {
  std::optional<Options> options;
  int exit_code = -1;
  std::string error;
};

Parsed Parse(std::vector<const char*> args) {
  args.insert(args.begin(), "tandem-expert");
  Parsed out;
  ::testing::internal::CaptureStderr();
  ::testing::internal::CaptureStdout();
  out.options = ParseOptions(static_cast<int>(args.size()), args.data(), &out.exit_code);
  out.error = ::testing::internal::GetCapturedStderr() + ::testing::internal::GetCapturedStdout();
  return out;
}

TEST(OptionsTest, Defaults) {
  const Parsed p = Parse({"--model", "m.gguf"});
  ASSERT_TRUE(p.options.has_value()) << p.error;
  EXPECT_EQ(p.options->model, "m.gguf");
  EXPECT_THAT(p.options->listen, ElementsAre("127.0.0.1:10020"));
  EXPECT_EQ(p.options->shard.slice_count, 1);
  EXPECT_EQ(p.options->shard.expert_end, -1);
  EXPECT_EQ(p.options->precision, kernels::Precision::kFast);
  EXPECT_EQ(p.options->numa_node, -1);
}

TEST(OptionsTest, AllFlags) {
  const Parsed p =
      Parse({"--model",          "m",           "--listen",    "unix:/a",   "--listen",     "0.0.0.0:1",
             "--metrics-listen", "127.0.0.1:2", "--slice",     "1/2",       "--experts",    "8-16",
             "--cpu-infer",      "3",           "--cpus",      "0-2,7",     "--numa-node",  "1",
             "--numa-nodes",     "2",           "--precision", "reference", "--max-tokens", "99",
             "--tls-cert",       "c",           "--tls-key",   "k",         "--tls-ca",     "a"});
  ASSERT_TRUE(p.options.has_value()) << p.error;
  const Options& o = *p.options;
  EXPECT_THAT(o.listen, ElementsAre("unix:/a", "0.0.0.0:1"));
  EXPECT_EQ(o.metrics_listen, "127.0.0.1:2");
  EXPECT_EQ(o.shard.slice_index, 1);
  EXPECT_EQ(o.shard.slice_count, 2);
  EXPECT_EQ(o.shard.expert_begin, 8);
  EXPECT_EQ(o.shard.expert_end, 16);
  EXPECT_EQ(o.threads, 3);
  EXPECT_THAT(o.cpus, ElementsAre(0, 1, 2, 7));
  EXPECT_EQ(o.numa_node, 1);
  EXPECT_EQ(o.numa_nodes, 2);
  EXPECT_EQ(o.precision, kernels::Precision::kReference);
  EXPECT_EQ(o.max_tokens, 99);
  EXPECT_EQ(o.tls.certificate_file, "c");
  EXPECT_EQ(o.tls.key_file, "k");
  EXPECT_EQ(o.tls.ca_file, "a");
}

TEST(OptionsTest, MistakesEndWithTwoAndNameTheFlag) {
  const std::pair<std::vector<const char*>, const char*> cases[] = {
      {{}, "--model"},
      {{"--model", "m", "--bogus"}, "--bogus"},
      {{"--model", "m", "stray"}, "stray"},
      {{"--model", "m", "--threads", "many"}, "--threads"},
      {{"--model", "m", "--threads", "-1"}, "--threads"},
      {{"--model", "m", "--slice", "2"}, "--slice 2"},
      {{"--model", "m", "--slice", "1/"}, "--slice 1/"},
      {{"--model", "m", "--slice", "-1/2"}, "--slice -1/2"},
      {{"--model", "m", "--experts", "a-b"}, "--experts a-b"},
      {{"--model", "m", "--experts", "99999999999-1"}, "--experts"},
      {{"--model", "m", "--cpus", "3-1"}, "--cpus 3-1"},
      {{"--model", "m", "--precision", "double"}, "--precision"},
      {{"--model", "m", "--max-tokens", "0"}, "--max-tokens"},
      {{"--model", "m", "--config", "/no/such/file"}, "/no/such/file"}};
  for (const auto& [args, expected] : cases) {
    const Parsed p = Parse(args);
    EXPECT_FALSE(p.options.has_value()) << expected;
    EXPECT_EQ(p.exit_code, 2) << expected;
    EXPECT_THAT(p.error, HasSubstr(expected));
  }
}

TEST(OptionsTest, HelpAndVersionEndWithZero) {
  const Parsed help = Parse({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.error, HasSubstr("--slice"));
  const Parsed version = Parse({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.error, HasSubstr("0."));
}

TEST(OptionsTest, CommandLineBeatsEnvironmentBeatsFile) {
  const std::string path = ::testing::TempDir() + "/tandem_expert_" + std::to_string(getpid()) + ".toml";
  std::ofstream(path)
      << "model = \"from-file\"\nmax-tokens = 5\nthreads = 6\nlisten = [\"unix:/f\", \"unix:/g\"]\n";
  setenv("TANDEM_MAX_TOKENS", "7", 1);
  setenv("TANDEM_THREADS", "8", 1);
  setenv("TANDEM_SLICE", "1/3", 1);
  const Parsed p = Parse({"--config", path.c_str(), "--threads", "9"});
  unsetenv("TANDEM_MAX_TOKENS");
  unsetenv("TANDEM_THREADS");
  unsetenv("TANDEM_SLICE");
  ASSERT_TRUE(p.options.has_value()) << p.error;
  EXPECT_EQ(p.options->model, "from-file");
  EXPECT_EQ(p.options->max_tokens, 7);
  EXPECT_EQ(p.options->shard.slice_count, 3);
  EXPECT_EQ(p.options->threads, 9);
  EXPECT_THAT(p.options->listen, ElementsAre("unix:/f", "unix:/g"));

  std::ofstream(path) << "modle = \"x\"\n";
  const Parsed misspelt = Parse({"--config", path.c_str()});
  EXPECT_EQ(misspelt.exit_code, 2);
  EXPECT_THAT(misspelt.error, HasSubstr("modle"));
  std::remove(path.c_str());
}

TEST(OptionsTest, ListFromTheEnvironment) {
  setenv("TANDEM_LISTEN", "unix:/a,127.0.0.1:5", 1);
  setenv("TANDEM_MODEL", "m", 1);
  const Parsed p = Parse({});
  unsetenv("TANDEM_LISTEN");
  unsetenv("TANDEM_MODEL");
  ASSERT_TRUE(p.options.has_value()) << p.error;
  EXPECT_THAT(p.options->listen, ElementsAre("unix:/a", "127.0.0.1:5"));
}

}  // namespace
}  // namespace tandem::expert
