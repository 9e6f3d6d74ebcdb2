// Split models: opened by the first file or the folder, and every way in which the files may not fit
// together.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/str_format.h"
#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace tandem::gguf {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kShards = 3;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

std::string ShardName(int number, int count = kShards) {
  return absl::StrFormat("model-%05d-of-%05d.gguf", number, count);
}

struct ShardKeys {
  int64_t no = -1;     // absent if negative
  int64_t count = -1;  // absent if negative
  int64_t tensors = -1;
};

// Two tensors "sI.a" and "sI.b" in the shard of index I.
std::string Shard(int index, const ShardKeys& keys, const std::string& tensor_prefix = "") {
  Writer w;
  if (index == 0) w.AddString("general.name", "split");
  if (keys.no >= 0) w.AddUint("split.no", static_cast<uint64_t>(keys.no), ValueType::kUint16);
  if (keys.tensors >= 0) w.AddInt("split.tensors.count", keys.tensors);
  if (keys.count >= 0) w.AddUint("split.count", static_cast<uint64_t>(keys.count), ValueType::kUint16);
  const std::string data(16, static_cast<char>('A' + index));
  const std::string prefix = tensor_prefix.empty() ? absl::StrFormat("s%d", index) : tensor_prefix;
  EXPECT_TRUE(w.AddTensor(prefix + ".a", TensorType::kF32, {4}, AsBytes(data)).ok());
  EXPECT_TRUE(w.AddTensor(prefix + ".b", TensorType::kF32, {2, 2}, AsBytes(data)).ok());
  return w.SerializeAll();
}

class Split : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < kShards; ++i) folder_.Write(ShardName(i + 1), Shard(i, {i, kShards, 2 * kShards}));
  }
  absl::Status OpenFirst() { return File::Open(folder_ / ShardName(1)).status(); }
  TempFolder folder_;
};

TEST_F(Split, OpensByFirstFile) {
  const auto file = File::Open(folder_ / ShardName(1));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->paths().size(), 3u);
  EXPECT_EQ((*file)->path(), folder_ / ShardName(1));
  ASSERT_EQ((*file)->tensors().size(), 6u);
  EXPECT_EQ(*(*file)->GetString("general.name"), "split");
  uint64_t bytes = 0;
  for (const auto& path : (*file)->paths()) bytes += std::filesystem::file_size(path);
  EXPECT_EQ((*file)->file_bytes(), bytes);
  for (int i = 0; i < kShards; ++i) {
    const Tensor* b = (*file)->FindTensor(absl::StrFormat("s%d.b", i));
    ASSERT_NE(b, nullptr);
    EXPECT_EQ(b->shard, i);
    EXPECT_EQ(b->data[0], 'A' + i);
    EXPECT_EQ(b->data[15], 'A' + i);
  }
}

TEST_F(Split, OpensByFolder) {
  folder_.Write("README.md", "not a model");
  folder_.Write(".hidden.gguf", "not looked at");
  const auto file = File::Open(folder_.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->tensors().size(), 6u);
  EXPECT_TRUE(File::Open(folder_.path() + "/").ok());
}

TEST_F(Split, SplitOrWholeIsTheSameModel) {
  const auto split = File::Open(folder_.path());
  ASSERT_TRUE(split.ok());
  Writer w;
  for (const auto& [key, value] : (*split)->metadata()) {
    if (key.rfind("split.", 0) != 0) w.AddValue(key, value);
  }
  for (const Tensor& t : (*split)->tensors()) {
    ASSERT_TRUE(
        w.AddTensor(t.name, t.type, std::vector<int64_t>(t.ne, t.ne + t.n_dims), {t.data, t.nbytes}).ok());
  }
  const TempFolder other;
  ASSERT_TRUE(w.WriteFile(other / "whole.gguf").ok());
  const auto whole = File::Open(other.path());
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ((*whole)->Fingerprint(), (*split)->Fingerprint());
}

TEST_F(Split, AnotherThanTheFirstFileIsRefused) {
  const auto status = File::Open(folder_ / ShardName(2)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("file 2 of 3"), HasSubstr(ShardName(1))));
}

TEST_F(Split, RenamedShardIsRefused) {
  folder_.Write("renamed.gguf", Shard(1, {1, kShards, 6}));
  EXPECT_THAT(Message(File::Open(folder_ / "renamed.gguf").status()), HasSubstr("shard 1 of 3"));
  folder_.Write("first.gguf", Shard(0, {0, kShards, 6}));
  EXPECT_THAT(Message(File::Open(folder_ / "first.gguf").status()), HasSubstr("-00001-of-00003.gguf"));
}

TEST_F(Split, MissingFilesAreNamed) {
  std::filesystem::remove(folder_ / ShardName(2));
  auto status = OpenFirst();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("1 of 3"), HasSubstr(ShardName(2)), Not(HasSubstr("more"))));
  std::filesystem::remove(folder_ / ShardName(3));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr(ShardName(2)), HasSubstr("and 1 more")));
}

TEST_F(Split, MissingFirstFileInAFolderIsNamed) {
  std::filesystem::remove(folder_ / ShardName(1));
  const auto status = File::Open(folder_.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(status), HasSubstr(ShardName(1)));
}

TEST_F(Split, WrongNumberIsRefused) {
  folder_.Write(ShardName(2), Shard(1, {2, kShards, 6}));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr(ShardName(2)), HasSubstr("split.no is 2")));
}

TEST_F(Split, WrongCountIsRefused) {
  folder_.Write(ShardName(3), Shard(2, {2, 4, 6}));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr(ShardName(3)), HasSubstr("split.count is 4")));
  folder_.Write(ShardName(1), Shard(0, {0, 4, 6}));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr("one of 3"), HasSubstr("split.count is 4")));
  folder_.Write(ShardName(1), Shard(0, {0, 1, 6}));
  EXPECT_THAT(Message(OpenFirst()), HasSubstr("split.count is 1"));
}

TEST_F(Split, MissingKeysAreNamed) {
  folder_.Write(ShardName(2), Shard(1, {-1, kShards, 6}));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr(ShardName(2)), HasSubstr("split.no")));
  folder_.Write(ShardName(1), Shard(0, {0, -1, 6}));
  EXPECT_THAT(Message(OpenFirst()), HasSubstr("split.count"));
}

TEST_F(Split, KeysOfAnotherTypeAreRefused) {
  RawGguf raw(0, 1);
  raw.String("split.count").Put<uint32_t>(8).String("three");
  folder_.Write(ShardName(1), raw.str());
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr("split.count"), HasSubstr("string")));
  RawGguf negative(0, 1);
  negative.KeyValue<int32_t>("split.count", 5, -3);
  folder_.Write(ShardName(1), negative.str());
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr("split.count"), HasSubstr("-3")));
}

TEST_F(Split, WrongNumberOfTensorsIsRefused) {
  folder_.Write(ShardName(1), Shard(0, {0, kShards, 7}));
  EXPECT_THAT(Message(OpenFirst()), AllOf(HasSubstr("split.tensors.count is 7"), HasSubstr("6 tensors")));
}

TEST_F(Split, TensorInTwoFilesIsRefused) {
  folder_.Write(ShardName(3), Shard(2, {2, kShards, 6}, "s0"));
  EXPECT_THAT(Message(OpenFirst()),
              AllOf(HasSubstr(ShardName(3)), HasSubstr("'s0.a'"), HasSubstr(ShardName(1))));
}

TEST_F(Split, TruncatedShardIsNamed) {
  const std::string whole = Shard(2, {2, kShards, 6});
  folder_.Write(ShardName(3), whole.substr(0, whole.size() - 20));
  const auto status = OpenFirst();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(status), AllOf(HasSubstr(ShardName(3)), HasSubstr("truncated"), HasSubstr("'s2.b'")));
}

TEST_F(Split, FolderWithSeveralModelsListsThem) {
  folder_.Write("other.gguf", Shard(0, {}));
  const auto status = File::Open(folder_.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("2 models"), HasSubstr("other.gguf"), HasSubstr(ShardName(1)),
                                     Not(HasSubstr(ShardName(2)))));
}

TEST(Folder, HoldsOneFile) {
  const TempFolder folder;
  EXPECT_EQ(File::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  folder.Write("only.gguf", Shard(0, {}));
  EXPECT_TRUE(File::Open(folder.path()).ok());
}

TEST(Folder, MergedAndOneOfOneAreWholeModels) {
  const TempFolder folder;
  EXPECT_TRUE(File::Open(folder.Write("merged.gguf", Shard(0, {0, 0, 2}))).ok());
  EXPECT_TRUE(File::Open(folder.Write(ShardName(1, 1), Shard(0, {0, 1, 2}))).ok());
  EXPECT_TRUE(File::Open(folder.Write("x-00000-of-00003.gguf", Shard(0, {}))).ok()) << "no name of a shard";
}

}  // namespace
}  // namespace tandem::gguf
