#include "common/model/config.h"

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/model/tensors.h"

namespace tandem::model {
namespace {

using testing::HasSubstr;

// The metadata of DeepSeek-R1 in the layout of January 2025 (no group keys, plain head sizes).
void AddR1(gguf::Writer& w, const std::string& except = "") {
  auto u32 = [&](const std::string& key, uint64_t v) {
    if (key != except) w.AddUint("deepseek2." + key, v);
  };
  auto f32 = [&](const std::string& key, float v) {
    if (key != except) w.AddFloat("deepseek2." + key, v);
  };
  if (except != "general.architecture") w.AddString("general.architecture", "deepseek2");
  w.AddString("general.name", "DeepSeek R1 BF16");
  u32("block_count", 61);
  u32("context_length", 163840);
  u32("embedding_length", 7168);
  u32("feed_forward_length", 18432);
  u32("attention.head_count", 128);
  u32("attention.head_count_kv", 128);
  f32("rope.freq_base", 10000);
  f32("attention.layer_norm_rms_epsilon", 1e-6f);
  u32("expert_used_count", 8);
  u32("leading_dense_block_count", 3);
  u32("vocab_size", 129280);
  u32("attention.q_lora_rank", 1536);
  u32("attention.kv_lora_rank", 512);
  u32("attention.key_length", 192);
  u32("attention.value_length", 128);
  u32("expert_feed_forward_length", 2048);
  u32("expert_count", 256);
  u32("expert_shared_count", 1);
  f32("expert_weights_scale", 2.5f);
  if (except != "expert_weights_norm") w.AddBool("deepseek2.expert_weights_norm", true);
  u32("expert_gating_func", 2);
  u32("rope.dimension_count", 64);
  w.AddString("deepseek2.rope.scaling.type", "yarn");
  f32("rope.scaling.factor", 40);
  u32("rope.scaling.original_context_length", 4096);
  f32("rope.scaling.yarn_log_multiplier", 0.1f);
}

absl::StatusOr<ModelConfig> Read(const gguf::Writer& w, std::string_view groups = "auto",
                                 const std::string& path = "model.gguf") {
  const std::string bytes = w.SerializeMetadata();
  auto file = gguf::File::ParseHeader({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, path);
  if (!file.ok()) return file.status();
  return ReadModelConfig(**file, groups);
}

TEST(ModelConfig, R1OfJanuary2025) {
  gguf::Writer w;
  AddR1(w);
  const auto c = Read(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->num_hidden_layers, 61);
  EXPECT_EQ(c->num_moe_layers(), 58);
  EXPECT_EQ(c->qk_nope_head_dim, 128);
  EXPECT_EQ(c->qk_rope_head_dim, 64);
  EXPECT_EQ(c->v_head_dim, 128);
  EXPECT_EQ(c->latent_dim(), 576);
  EXPECT_EQ(c->vocab_size, 129280);
  EXPECT_EQ(c->n_group, 8) << "the file lacks the keys: DeepSeek's own numbers by the shape";
  EXPECT_EQ(c->topk_group, 4);
  EXPECT_THAT(c->expert_groups_source, HasSubstr("known shape"));
}

TEST(ModelConfig, TheMlaLayoutGivesTheSame) {
  gguf::Writer w;
  AddR1(w, "attention.key_length");
  w.AddUint("deepseek2.attention.key_length", 576);
  w.AddUint("deepseek2.attention.key_length_mla", 192);
  w.AddUint("deepseek2.attention.value_length_mla", 128);
  w.AddUint("deepseek2.expert_group_count", 8);
  w.AddUint("deepseek2.expert_group_used_count", 4);
  const auto c = Read(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->qk_nope_head_dim, 128);
  EXPECT_EQ(c->v_head_dim, 128);
  EXPECT_EQ(c->expert_groups_source, "file");
}

// The reference's numbers for R1: kq_scale = (1 + 0.1 ln 40)^2 / sqrt(192) = 0.135234.
TEST(ModelConfig, AttentionScaleOfR1) {
  gguf::Writer w;
  AddR1(w);
  EXPECT_NEAR(AttentionScale(*Read(w)), 0.135234, 1e-6);
}

TEST(ModelConfig, RopeFrequenciesKeepTheFastAndStretchTheSlow) {
  gguf::Writer w;
  AddR1(w);
  const auto f = RopeFrequencies(*Read(w));
  ASSERT_EQ(f.size(), 32u);
  EXPECT_EQ(f[0], 1.0f);
  EXPECT_NEAR(f[5], std::pow(10000, -10.0 / 64), 1e-7);  // turns more than 32 times in 4096 tokens
  EXPECT_NEAR(f[31], std::pow(10000, -62.0 / 64) / 40, 1e-10);
  for (size_t i = 1; i < f.size(); ++i) EXPECT_LT(f[i], f[i - 1]);
}

TEST(ModelConfig, ExpertGroupsByFlag) {
  gguf::Writer w;
  AddR1(w);
  EXPECT_EQ(Read(w, "off")->n_group, 1);
  EXPECT_EQ(Read(w, "4/2")->topk_group, 2);
  for (const char* bad : {"", "8", "8/", "/4", "a/b", "8/4/2", "0/0", "8/9", "7/4", "256/4", "-8/4"}) {
    const auto c = Read(w, bad);
    EXPECT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(ModelConfig, ExpertGroupsFromConfigJson) {
  const std::string dir = testing::TempDir() + "/groups_" + std::to_string(getpid());
  std::filesystem::create_directories(dir);
  gguf::Writer w;
  AddR1(w);
  auto with = [&](const std::string& text) {
    std::ofstream(dir + "/config.json") << text;
    return Read(w, "auto", dir + "/model.gguf");
  };
  auto c = with(R"({"n_group": 16, "topk_group": 2})");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->n_group, 16);
  EXPECT_EQ(c->expert_groups_source, "config.json");
  EXPECT_EQ(with(R"({"hidden_size": 7168})")->n_group, 8);
  EXPECT_EQ(with("{").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(with(R"({"n_group": "x", "topk_group": 2})").status().message()),
              HasSubstr("config.json"));
  std::filesystem::remove_all(dir);
}

TEST(ModelConfig, AMissingKeyIsNamed) {
  for (const char* key :
       {"block_count", "context_length", "embedding_length", "attention.head_count", "attention.kv_lora_rank",
        "attention.key_length", "attention.value_length", "rope.dimension_count", "expert_used_count",
        "expert_feed_forward_length", "rope.scaling.original_context_length"}) {
    gguf::Writer w;
    AddR1(w, key);
    EXPECT_THAT(std::string(Read(w).status().message()), HasSubstr(std::string("deepseek2.") + key)) << key;
  }
}

TEST(ModelConfig, ValuesOutOfRangeAreNamed) {
  const std::vector<std::pair<const char*, uint64_t>> bad = {
      {"block_count", 0},           {"embedding_length", 0},       {"attention.head_count", 1u << 30},
      {"rope.dimension_count", 63}, {"rope.dimension_count", 192}, {"expert_used_count", 300},
      {"expert_count", 1u << 20},   {"expert_gating_func", 3},     {"leading_dense_block_count", 62}};
  for (const auto& [key, value] : bad) {
    gguf::Writer w;
    AddR1(w, key);
    w.AddUint(std::string("deepseek2.") + key, value);
    EXPECT_FALSE(Read(w).ok()) << key << " = " << value;
  }
}

TEST(ModelConfig, OtherArchitecturesAreRefusedByName) {
  gguf::Writer w;
  AddR1(w, "general.architecture");
  w.AddString("general.architecture", "llama");
  const auto s = Read(w).status();
  EXPECT_EQ(s.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(s.message()), HasSubstr("\"llama\""));
}

TEST(BindTensors, TheDemoModelAndAWrongShape) {
  const char* root = std::getenv("TANDEM_SOURCE_DIR");
  if (root == nullptr) GTEST_SKIP() << "TANDEM_SOURCE_DIR is not set";
  const std::string path = std::string(root) + "/models/tinyr1-Q4_K_M.gguf";
  auto file = gguf::File::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  auto c = ReadModelConfig(**file);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->num_hidden_layers, 6);
  auto t = BindTensors(**file, *c);
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ(t->layers.size(), 6u);
  EXPECT_NE(t->layers[0].dense.gate, nullptr);
  EXPECT_NE(t->layers[1].shared.gate, nullptr);
  EXPECT_TRUE(BindExperts(**file, *c, 1).ok());
  ModelConfig wrong = *c;
  wrong.hidden_size = 512;
  EXPECT_THAT(std::string(BindTensors(**file, wrong).status().message()),
              HasSubstr("token_embd.weight has shape {256, 2560}"));
  wrong = *c;
  wrong.num_hidden_layers = 7;
  EXPECT_THAT(std::string(BindTensors(**file, wrong).status().message()), HasSubstr("blk.6."));
}

}  // namespace
}  // namespace tandem::model
