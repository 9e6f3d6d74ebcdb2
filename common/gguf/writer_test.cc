// What the writer leaves in the file, read back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace tandem::gguf {
namespace {

using ::testing::HasSubstr;

constexpr TensorType kAllTypes[] = {
    TensorType::kF32,  TensorType::kF16,  TensorType::kBF16, TensorType::kQ4_0, TensorType::kQ4_1,
    TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ8_0, TensorType::kQ2_K, TensorType::kQ3_K,
    TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K};

std::string Pattern(size_t n, int seed) {
  std::string out(n, '\0');
  for (size_t i = 0; i < n; ++i)
    out[i] = static_cast<char>(i * 31 + static_cast<size_t>(seed) * 17 + i / 251);
  return out;
}

TEST(Writer, EveryTensorTypeSurvivesARoundTrip) {
  const TempFolder folder;
  for (const uint32_t alignment : {1u, 32u, 64u, 4096u}) {
    Writer w;
    std::vector<std::string> data;
    data.reserve(std::size(kAllTypes));
    for (const TensorType type : kAllTypes) {
      data.push_back(Pattern(static_cast<size_t>(RowBytes(type, 512)) * 3, static_cast<int>(type)));
      ASSERT_TRUE(w.AddTensor(std::string(TypeName(type)), type, {512, 3}, AsBytes(data.back())).ok());
    }
    const std::string path = folder / "all.gguf";
    ASSERT_TRUE(w.WriteFile(path, alignment).ok());
    const auto file = File::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_EQ((*file)->tensors().size(), std::size(kAllTypes));
    for (size_t i = 0; i < data.size(); ++i) {
      const Tensor& t = (*file)->tensors()[i];
      EXPECT_EQ(t.type, kAllTypes[i]);
      EXPECT_EQ(t.file_offset % alignment, 0u);
      ASSERT_EQ(t.nbytes, data[i].size());
      EXPECT_EQ(std::string(reinterpret_cast<const char*>(t.data), t.nbytes), data[i]) << t.name;
    }
    std::ifstream in(path, std::ios::binary);
    const std::string on_disk((std::istreambuf_iterator<char>(in)), {});
    EXPECT_EQ(on_disk, w.SerializeAll(alignment));
  }
}

TEST(Writer, SharedDataIsWrittenOnce) {
  const std::string big = Pattern(4096, 1);
  const std::string other = Pattern(4096, 1);  // equal bytes at another address are not shared
  Writer w;
  ASSERT_TRUE(w.AddTensor("a", TensorType::kF32, {1024}, AsBytes(big)).ok());
  ASSERT_TRUE(w.AddTensor("b", TensorType::kF32, {32, 32}, AsBytes(big)).ok());
  ASSERT_TRUE(w.AddTensor("c", TensorType::kF32, {1024}, AsBytes(other)).ok());
  ASSERT_TRUE(w.AddTensor("d", TensorType::kF32, {512}, AsBytes(big).first(2048)).ok());
  const TempFolder folder;
  ASSERT_TRUE(w.WriteFile(folder / "plain.gguf").ok());
  ASSERT_TRUE(w.WriteFile(folder / "shared.gguf", {.share_equal_data = true}).ok());
  EXPECT_EQ(
      std::filesystem::file_size(folder / "plain.gguf") - std::filesystem::file_size(folder / "shared.gguf"),
      4096u);
  const auto file = File::Open(folder / "shared.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  const auto& t = (*file)->tensors();
  EXPECT_EQ(t[0].file_offset, t[1].file_offset);
  EXPECT_NE(t[0].file_offset, t[2].file_offset);
  EXPECT_NE(t[0].file_offset, t[3].file_offset) << "another size would overlap in part";
  for (const Tensor& tensor : t) {
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(tensor.data), tensor.nbytes),
              big.substr(0, tensor.nbytes));
  }
}

TEST(Writer, GeneratedTensorsAndAliases) {
  // 20 MB of Q4_K rows of 2304 bytes: several calls, each of whole rows, in order.
  constexpr int64_t kRows = 9000;
  const uint64_t row = static_cast<uint64_t>(RowBytes(TensorType::kQ4_K, 4096));
  uint64_t expected_offset = 0;
  int calls = 0;
  Writer w;
  const auto fill = [&](uint64_t offset, std::span<uint8_t> out) {
    EXPECT_EQ(offset, expected_offset);
    EXPECT_EQ(out.size() % row, 0u);
    expected_offset = offset + out.size();
    ++calls;
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<uint8_t>((offset + i) % 251);
  };
  ASSERT_TRUE(w.AddTensor("made", TensorType::kQ4_K, {4096, kRows}, fill).ok());
  ASSERT_TRUE(w.AddAlias("again", "made").ok());
  ASSERT_TRUE(w.AddAlias("and again", "again").ok());
  EXPECT_EQ(w.AddAlias("x", "absent").code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(w.AddAlias("made", "made").ok());
  const TempFolder folder;
  ASSERT_TRUE(w.WriteFile(folder / "made.gguf").ok());
  EXPECT_EQ(expected_offset, row * kRows);
  EXPECT_GT(calls, 1);
  EXPECT_LT(std::filesystem::file_size(folder / "made.gguf"), row * kRows + 1000);
  const auto file = File::Open(folder / "made.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ((*file)->tensors().size(), 3u);
  const Tensor& made = (*file)->tensors()[0];
  EXPECT_EQ((*file)->tensors()[2].file_offset, made.file_offset);
  for (uint64_t i = 0; i < made.nbytes; i += 1009) ASSERT_EQ(made.data[i], i % 251);
}

TEST(Writer, RowsLongerThanAChunkComeInWholeBlocks) {
  constexpr int64_t kCols = 32 * 600000;  // a Q8_0 row of 20.4 MB
  Writer w;
  uint64_t total = 0;
  ASSERT_TRUE(w.AddTensor("row", TensorType::kQ8_0, {kCols}, [&](uint64_t offset, std::span<uint8_t> out) {
                 EXPECT_EQ(offset, total);
                 EXPECT_EQ(out.size() % 34, 0u);
                 EXPECT_LE(out.size(), 8u << 20);
                 total += out.size();
                 std::fill(out.begin(), out.end(), 1);
               }).ok());
  const std::string bytes = w.SerializeAll();
  EXPECT_EQ(total, 600000u * 34);
  EXPECT_GE(bytes.size(), total);
}

TEST(Writer, ReplacesAKeyAddedAgain) {
  Writer w;
  w.AddUint("a", 1);
  w.AddUint("b", 2);
  w.AddString("a", "new");
  const std::string bytes = w.SerializeMetadata();
  const auto file = File::ParseHeader(AsBytes(bytes), "m");
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ((*file)->metadata().size(), 2u);
  EXPECT_EQ(*(*file)->GetString("a"), "new");
}

TEST(Writer, AlignmentOfACopiedFileDoesNotLeakIntoTheNewOne) {
  const std::string data(8, 'x');
  Writer w;
  w.AddUint("general.alignment", 4096);
  ASSERT_TRUE(w.AddTensor("t", TensorType::kF32, {2}, AsBytes(data)).ok());
  const std::string bytes = w.SerializeAll(64);
  const auto file = File::ParseHeader(AsBytes(bytes), "m");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*(*file)->GetUint("general.alignment"), 64u);
}

TEST(Writer, RefusesBadTensors) {
  const std::string data(64, 'x');
  Writer w;
  EXPECT_FALSE(w.AddTensor("", TensorType::kF32, {16}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {1, 1, 1, 1, 16}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {0}, std::span<const uint8_t>()).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {-4, -4}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {int64_t{1} << 62, 4}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kQ8_0, {16}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", static_cast<TensorType>(16), {256}, AsBytes(data)).ok());
  const absl::Status size = w.AddTensor("t", TensorType::kF32, {15}, AsBytes(data));
  EXPECT_THAT(std::string(size.message()), HasSubstr("60"));
  EXPECT_TRUE(w.AddTensor("t", TensorType::kF32, {16}, AsBytes(data)).ok());
  EXPECT_FALSE(w.AddTensor("t", TensorType::kF32, {16}, AsBytes(data)).ok());
}

TEST(Writer, AFailedWriteLeavesNothing) {
  const TempFolder folder;
  Writer w;
  EXPECT_EQ(w.WriteFile(folder / "absent/m.gguf").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(w.WriteFile(folder / "m.gguf", 24).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  std::filesystem::create_directories(folder / "taken");
  EXPECT_FALSE(w.WriteFile(folder / "taken").ok());
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(Writer, ALinkStaysAndItsTargetIsWritten) {
  const TempFolder folder;
  Writer w;
  w.AddString("general.name", "new");
  std::filesystem::create_directories(folder / "disk");
  std::ofstream(folder / "disk/m.gguf") << "old";
  std::filesystem::create_symlink("disk/m.gguf", folder / "near");
  std::filesystem::create_symlink("near", folder / "far");
  std::filesystem::create_symlink("disk/fresh.gguf", folder / "dangling");
  for (const char* name : {"far", "dangling"}) {
    ASSERT_TRUE(w.WriteFile(folder / name).ok());
    EXPECT_TRUE(std::filesystem::is_symlink(folder / name)) << name;
  }
  for (const char* name : {"disk/m.gguf", "disk/fresh.gguf"}) {
    EXPECT_TRUE(std::filesystem::is_regular_file(std::filesystem::symlink_status(folder / name))) << name;
    const auto file = File::Open(folder / name, {.map_data = false});
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(*(*file)->GetString("general.name"), "new");
  }
  std::filesystem::create_symlink("circle", folder / "circle");
  EXPECT_THAT(std::string(w.WriteFile(folder / "circle").message()), HasSubstr("too many symbolic links"));
}

TEST(Writer, OnlyARegularFileIsReplaced) {
  const TempFolder folder;
  const std::string pipe = folder / "pipe", link = folder / "link";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  std::filesystem::create_symlink("pipe", link);
  Writer w;
  for (const std::string& path : {pipe, link}) {
    const absl::Status status = w.WriteFile(path);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(path + " is a "));
    EXPECT_THAT(std::string(status.message()), HasSubstr("is a pipe: only a regular file can be replaced"));
  }
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 2);
}

}  // namespace
}  // namespace tandem::gguf
