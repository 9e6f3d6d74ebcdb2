// Files made by others: the demo model as converted and quantized by llama.cpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>

#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace tandem::gguf {
namespace {

std::unique_ptr<File> OpenDemo(const std::string& name) {
  const auto shared = SharedFolder();
  const std::string path = shared.value_or("../shared") + "/demo_model/" + name;
  if (!std::filesystem::exists(path)) return nullptr;
  auto file = File::Open(path);
  EXPECT_TRUE(file.ok()) << file.status();
  return file.ok() ? *std::move(file) : nullptr;
}

#define OPEN_OR_SKIP(variable, name)    \
  const auto variable = OpenDemo(name); \
  if (variable == nullptr) GTEST_SKIP() << "no " << name << " in ../shared (TANDEM_SHARED)"

std::map<std::string, int> CountTypes(const File& file) {
  std::map<std::string, int> out;
  for (const Tensor& t : file.tensors()) ++out[std::string(TypeName(t.type))];
  return out;
}

TEST(DemoModel, Q4KM) {
  OPEN_OR_SKIP(file, "tinyr1-Q4_K_M.gguf");
  EXPECT_EQ(file->version(), 3u);
  EXPECT_EQ(file->metadata().size(), 49u);
  EXPECT_EQ(file->tensors().size(), 106u);
  EXPECT_EQ(CountTypes(*file),
            (std::map<std::string, int>{{"F32", 35}, {"Q4_K", 60}, {"Q5_0", 6}, {"Q6_K", 5}}));
  EXPECT_EQ(*file->GetString("general.architecture"), "deepseek2");
  EXPECT_EQ(*file->GetUint("deepseek2.block_count"), 6u);
  EXPECT_EQ(*file->GetUint("deepseek2.attention.head_count_kv"), 1u);
  EXPECT_EQ(*file->GetUint("deepseek2.attention.key_length_mla"), 64u);
  EXPECT_EQ(*file->GetFloat("deepseek2.rope.scaling.factor"), 4.0);
  EXPECT_EQ(*file->GetFloat("deepseek2.attention.layer_norm_rms_epsilon"), static_cast<double>(1e-6f));
  EXPECT_TRUE(*file->GetBool("deepseek2.expert_weights_norm"));
  EXPECT_FALSE(*file->GetBool("tokenizer.ggml.add_eos_token"));
  const auto tokens = *file->GetStrings("tokenizer.ggml.tokens");
  ASSERT_EQ(tokens.size(), 2560u);
  EXPECT_EQ(tokens[1], "<｜end▁of▁sentence｜>");
  EXPECT_EQ(tokens[3], "!");
  EXPECT_EQ(file->GetStrings("tokenizer.ggml.merges")->size(), 2288u);
  const auto types = *file->GetInts("tokenizer.ggml.token_type");
  ASSERT_EQ(types.size(), 2560u);
  EXPECT_EQ(types[0], 3);
  EXPECT_EQ(types[3], 1);
  const Tensor* k_b = file->FindTensor("blk.0.attn_k_b.weight");
  ASSERT_NE(k_b, nullptr);
  EXPECT_EQ(k_b->type, TensorType::kQ5_0);
  EXPECT_EQ(k_b->ShapeString(), "{32, 256, 8}");
  EXPECT_EQ(k_b->nbytes, 32u / 32 * 22 * 256 * 8);
  EXPECT_EQ(file->FindTensor("blk.0.attn_kv_b.weight"), nullptr);
  const Tensor* experts = file->FindTensor("blk.1.ffn_down_exps.weight");
  ASSERT_NE(experts, nullptr);
  EXPECT_EQ(experts->ShapeString(), "{256, 256, 16}");
}

TEST(DemoModel, OldLayout) {
  OPEN_OR_SKIP(file, "tinyr1-Q4_K_M-oldlayout.gguf");
  EXPECT_EQ(file->metadata().size(), 45u);
  EXPECT_EQ(file->tensors().size(), 100u);
  EXPECT_EQ(*file->GetUint("deepseek2.attention.head_count_kv"), 8u);
  EXPECT_NE(file->FindTensor("blk.0.attn_kv_b.weight"), nullptr);
  EXPECT_EQ(file->GetUint("deepseek2.attention.key_length_mla").status().code(), absl::StatusCode::kNotFound);
}

TEST(DemoModel, TheLastTensorEndsWithTheFile) {
  for (const char* name : {"tinyr1-bf16.gguf", "tinyr1-Q8_0.gguf"}) {
    OPEN_OR_SKIP(file, name);
    uint64_t end = 0;
    for (const Tensor& t : file->tensors()) end = std::max(end, t.file_offset + t.nbytes);
    EXPECT_LE(end, file->file_bytes());
    EXPECT_LT(file->file_bytes() - end, 32u) << "no more than padding behind it";
  }
}

TEST(DemoModel, WrittenAgainItIsTheSameFile) {
  OPEN_OR_SKIP(file, "tinyr1-Q4_K_M.gguf");
  Writer w;
  for (const auto& [key, value] : file->metadata()) w.AddValue(key, value);
  for (const Tensor& t : file->tensors()) {
    ASSERT_TRUE(
        w.AddTensor(t.name, t.type, std::vector<int64_t>(t.ne, t.ne + t.n_dims), {t.data, t.nbytes}).ok());
  }
  const TempFolder folder;
  ASSERT_TRUE(w.WriteFile(folder / "copy.gguf").ok());
  const auto bytes = [](const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
  };
  EXPECT_TRUE(bytes(folder / "copy.gguf") == bytes(file->path()));
}

}  // namespace
}  // namespace tandem::gguf
