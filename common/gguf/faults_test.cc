// Malformed files, among them those behind published advisories against other loaders. Each is answered with
// a clear error, and no allocation is larger than the file justifies.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

#include "absl/strings/str_cat.h"
#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace {
std::atomic<size_t> g_largest_allocation{0};

void* CountedAllocate(size_t size) {
  size_t seen = g_largest_allocation.load();
  while (size > seen && !g_largest_allocation.compare_exchange_weak(seen, size)) {
  }
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
}  // namespace

// The whole program allocates through these, so that a test can ask for the largest request since a moment.
void* operator new(size_t size) { return CountedAllocate(size); }
void* operator new[](size_t size) { return CountedAllocate(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

namespace tandem::gguf {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint32_t kU32 = 4, kString = 8, kArray = 9;
constexpr uint32_t kF32 = 0, kQ8_0 = 8;
constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

// Opens the bytes as a file; they must be refused by both ways in, with the same kind of error where only the
// header is wrong.
absl::Status Refusal(const std::string& bytes) {
  const TempFolder folder;
  const std::string path = folder.Write("bad.gguf", bytes);
  g_largest_allocation = 0;
  absl::Status status = File::Open(path).status();
  EXPECT_LT(g_largest_allocation.load(), 4096 + 16 * bytes.size()) << status;
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("bad.gguf")) << "every error names the file";
  return status;
}
std::string Refused(const std::string& bytes) { return std::string(Refusal(bytes).message()); }

// One F32 tensor "t" of the given shape at offset 0, with `data` bytes behind the header.
std::string OneTensor(const std::vector<uint64_t>& ne, uint32_t type = kF32, size_t data = 64,
                      uint64_t offset = 0) {
  return RawGguf(1).TensorInfo("t", ne, type, offset).PadTo(32).Data(data).str();
}

TEST(Faults, TheSameBuilderMakesGoodFiles) {
  const TempFolder folder;
  EXPECT_TRUE(File::Open(folder.Write("good.gguf", OneTensor({16}))).ok());
}

TEST(Faults, Cve2024_21802_MoreThanFourDimensions) {
  EXPECT_THAT(Refused(OneTensor({1, 1, 1, 1, 1})), AllOf(HasSubstr("tensor 't'"), HasSubstr("5 dimensions")));
  RawGguf raw(1);
  raw.String("t").Put<uint32_t>(0xffffffffu).Data(64);
  EXPECT_THAT(Refused(raw.str()), HasSubstr("4294967295 dimensions"));
  EXPECT_THAT(Refused(OneTensor({})), HasSubstr("0 dimensions"));
}

TEST(Faults, Cve2024_21825_ArrayAndStringLengths) {
  for (const uint64_t count : {uint64_t{1} << 30, uint64_t{1} << 60, uint64_t{1} << 61, kMax / 8, kMax}) {
    for (const uint32_t element : {0u, 1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u, 10u, 11u, 12u}) {
      RawGguf raw(0, 1);
      raw.String("list").Put(kArray).Put(element).Put(count).Data(100);
      EXPECT_THAT(Refused(raw.str()), AllOf(HasSubstr("key 'list'"), HasSubstr(absl::StrCat(count))));
    }
    RawGguf raw(0, 1);
    raw.String("list").Put(kArray).Put(kString).Put<uint64_t>(2).String("ok").Put(count).Data(100);
    EXPECT_THAT(Refused(raw.str()), AllOf(HasSubstr("key 'list'"), HasSubstr("element 1 of 2")));
  }
}

TEST(Faults, Cve2024_21836_HugeTensorCount) {
  for (const uint64_t count : {uint64_t{3}, uint64_t{1} << 40, uint64_t{1} << 58, kMax / 2, kMax}) {
    RawGguf raw(count);
    raw.Data(64);
    const absl::Status status = Refusal(raw.str());
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(count, " tensors")));
  }
}

TEST(Faults, Cve2024_23605_HugeMetadataCount) {
  for (const uint64_t count : {uint64_t{1} << 40, uint64_t{1} << 58, kMax / 2, kMax}) {
    EXPECT_THAT(Refused(RawGguf(0, count).Data(64).str()),
                HasSubstr(absl::StrCat(count, " metadata entries")));
  }
}

TEST(Faults, Cve2024_23496_StringLengthPlusOneWraps) {
  for (const uint64_t length : {kMax, kMax - 1, kMax / 2, uint64_t{1} << 31}) {
    EXPECT_THAT(Refused(RawGguf(0, 1).Put(length).Data(64).str()), HasSubstr(absl::StrCat(length)));
    EXPECT_THAT(Refused(RawGguf(0, 1).String("k").Put(kString).Put(length).Data(64).str()),
                HasSubstr("key 'k'"));
    EXPECT_THAT(Refused(RawGguf(1).Put(length).Data(64).str()), HasSubstr(absl::StrCat(length)));
  }
}

TEST(Faults, Cve2025_53630_SumOfSizesWraps) {
  // Four tensors of 2^62 bytes: padded sizes add up to 2^64 = 0.
  RawGguf raw(4);
  for (int i = 0; i < 4; ++i) {
    raw.TensorInfo(absl::StrCat("t", i), {uint64_t{1} << 60}, kF32, static_cast<uint64_t>(i) << 62);
  }
  EXPECT_THAT(Refused(raw.PadTo(32).Data(64).str()), HasSubstr("tensor 't"));
}

TEST(Faults, Cve2026_27940_CountTimesOverheadPlusSizeWraps) {
  // One tensor whose bytes end just below 2^64 when the data section's start is added, or just above.
  for (const uint64_t offset : {kMax - 31, kMax - 63, kMax - 127, (uint64_t{1} << 63) - 32}) {
    EXPECT_THAT(Refused(OneTensor({16}, kF32, 64, offset)), HasSubstr("tensor 't'"));
  }
}

TEST(Faults, Cve2026_33298_BytesOfCraftedDimensionsWrap) {
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 32, uint64_t{1} << 32})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 31, uint64_t{1} << 31, 4})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 61})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 63})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({kMax})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({32, uint64_t{1} << 58}, kQ8_0)), HasSubstr("overflow"));
}

TEST(Faults, NoId_PaddedSizeWrapsToZero) {
  // A size of 2^64 - 16 bytes would pad to 0; 2^62 - 4 values are also above int64 as bytes.
  EXPECT_THAT(Refused(OneTensor({(uint64_t{1} << 62) - 4})), HasSubstr("overflow"));
  EXPECT_THAT(Refused(OneTensor({(uint64_t{1} << 61) - 4})), HasSubstr("tensor 't'"));
}

TEST(Faults, NoId_ZeroDimension) {
  EXPECT_THAT(Refused(OneTensor({0})), HasSubstr("dimension 0 is 0"));
  EXPECT_THAT(Refused(OneTensor({4, 0, 2})), HasSubstr("dimension 1 is 0"));
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 62, 0})), HasSubstr("dimension 1 is 0"));
}

TEST(Faults, NoId_BadAlignment) {
  for (const uint32_t alignment : {0u, 3u, 24u, 0x80000000u, 0xffffffffu, 1u << 21}) {
    RawGguf raw(1, 1);
    raw.KeyValue("general.alignment", kU32, alignment).TensorInfo("t", {4}, kF32, 0).PadTo(32).Data(64);
    EXPECT_THAT(Refused(raw.str()), AllOf(HasSubstr("general.alignment"), HasSubstr(absl::StrCat(alignment)),
                                          HasSubstr("power of two"), HasSubstr("at byte 24")));
  }
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint64_t>("general.alignment", 10, 32).str()),
              HasSubstr("uint64"));
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<int32_t>("general.alignment", 5, 32).str()), HasSubstr("int32"));
  EXPECT_THAT(Refused(RawGguf(0, 1).String("general.alignment").Put(kString).String("32").str()),
              HasSubstr("string"));
}

TEST(Faults, NoId_GigabytesFromA160ByteFile) {
  for (int shift = 28; shift < 64; ++shift) {
    RawGguf text(0, 1);
    text.String("tokenizer.chat_template").Put(kString).Put(uint64_t{1} << shift).Data(90);
    RawGguf list(0, 1);
    list.String("tokenizer.ggml.tokens").Put(kArray).Put(kString).Put(uint64_t{1} << shift).Data(90);
    EXPECT_THAT(Refused(text.str()), HasSubstr("tokenizer.chat_template"));
    EXPECT_THAT(Refused(list.str()), HasSubstr("tokenizer.ggml.tokens"));
  }
}

TEST(Faults, SparseFileOfManyGigabytesDoesNotJustifyItsCounts) {
  // 64 GiB that take no room on the disk: the counts would fit the bytes left, but no header is that long.
  constexpr uint64_t kSize = uint64_t{64} << 30;
  const auto refused = [&](const std::string& header) {
    const TempFolder folder;
    const std::string path = folder.Write("bad.gguf", header);
    std::error_code error;
    std::filesystem::resize_file(path, kSize, error);
    if (error) return std::string("cannot make a sparse file");
    g_largest_allocation = 0;
    std::string message(File::Open(path).status().message());
    EXPECT_LT(g_largest_allocation.load(), 4096u) << message;
    return message;
  };
  const std::string list =
      refused(RawGguf(0, 1).String("list").Put(kArray).Put(kString).Put(uint64_t{1} << 32).str());
  if (list == "cannot make a sparse file") GTEST_SKIP() << list;
  EXPECT_THAT(list, AllOf(HasSubstr("4294967296 strings"), HasSubstr("a header may take")));
  EXPECT_THAT(refused(RawGguf(0, 1).String("text").Put(kString).Put(uint64_t{1} << 35).str()),
              AllOf(HasSubstr("key 'text'"), HasSubstr("a header may take")));
  EXPECT_THAT(refused(RawGguf(uint64_t{1} << 30).str()), HasSubstr("1073741824 tensors"));
  EXPECT_THAT(refused(RawGguf(0, uint64_t{1} << 31).str()), HasSubstr("2147483648 metadata entries"));
}

TEST(Faults, NoId_EmptyAndDuplicateNames) {
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint32_t>("", kU32, 1).Data(32).str()),
              HasSubstr("empty metadata key"));
  EXPECT_THAT(Refused(RawGguf(0, 2).KeyValue<uint32_t>("k", kU32, 1).KeyValue<uint32_t>("k", kU32, 1).str()),
              AllOf(HasSubstr("key 'k'"), HasSubstr("twice")));
  EXPECT_THAT(Refused(RawGguf(1).TensorInfo("", {4}, kF32, 0).PadTo(32).Data(64).str()),
              HasSubstr("empty tensor name"));
  EXPECT_THAT(
      Refused(
          RawGguf(2).TensorInfo("t", {4}, kF32, 0).TensorInfo("t", {4}, kF32, 32).PadTo(32).Data(64).str()),
      AllOf(HasSubstr("tensor 't'"), HasSubstr("twice")));
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint32_t>(std::string(70000, 'k'), kU32, 1).str()),
              HasSubstr("at most 65535"));
}

TEST(Faults, NoId_OffsetsThatAreNoRunningSum) {
  EXPECT_THAT(Refused(OneTensor({4}, kF32, 64, 8)),
              AllOf(HasSubstr("data offset 8"), HasSubstr("alignment 32")));
  const auto two = [](uint64_t first, uint64_t second, uint64_t rows) {
    return RawGguf(2)
        .TensorInfo("a", {16}, kF32, first)
        .TensorInfo("b", {rows}, kF32, second)
        .PadTo(32)
        .Data(256)
        .str();
  };
  // In part over each other, in either order; one within the other.
  EXPECT_THAT(Refused(two(0, 32, 16)), AllOf(HasSubstr("'b'"), HasSubstr("overlaps"), HasSubstr("'a'")));
  EXPECT_THAT(Refused(two(32, 0, 16)), HasSubstr("overlaps"));
  EXPECT_THAT(Refused(two(0, 0, 8)), HasSubstr("overlaps"));
  EXPECT_THAT(Refused(two(0, 32, 4)), HasSubstr("overlaps"));
  // Harmless: a gap, another order, the same region twice.
  const TempFolder folder;
  EXPECT_TRUE(File::Open(folder.Write("gap.gguf", two(0, 128, 16))).ok());
  EXPECT_TRUE(File::Open(folder.Write("order.gguf", two(64, 0, 16))).ok());
  EXPECT_TRUE(File::Open(folder.Write("alias.gguf", two(0, 0, 16))).ok());
}

TEST(Faults, NoId_ManyTensorsOverOneAnother) {
  RawGguf raw(3);
  raw.TensorInfo("a", {16}, kF32, 0).TensorInfo("b", {16}, kF32, 0).TensorInfo("c", {24}, kF32, 32);
  EXPECT_THAT(Refused(raw.PadTo(32).Data(256).str()), HasSubstr("overlaps"));
}

TEST(Faults, Cve2025_49847_LongTokenText) {
  // A long token is a string like any other; one longer than the file is refused.
  RawGguf good(0, 1);
  good.String("tokenizer.ggml.tokens")
      .Put(kArray)
      .Put(kString)
      .Put<uint64_t>(1)
      .String(std::string(1 << 20, 'x'));
  const auto file = File::ParseHeader(AsBytes(good.str()), "m");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*(*file)->GetStrings("tokenizer.ggml.tokens"))[0].size(), size_t{1} << 20);
  EXPECT_THAT(Refused(good.str().substr(0, good.str().size() - 1)), HasSubstr("tokenizer.ggml.tokens"));
}

TEST(Faults, NoId_ByteArrayIsNotReadAsFourByteIntegers) {
  RawGguf raw(0, 1);
  raw.String("tokenizer.ggml.token_type").Put(kArray).Put<uint32_t>(1).Put<uint64_t>(3);
  raw.Put<int8_t>(1).Put<int8_t>(-2).Put<int8_t>(3);
  const std::unique_ptr<uint8_t[]> exact(new uint8_t[raw.str().size()]);
  std::copy(raw.str().begin(), raw.str().end(), exact.get());
  const auto file = File::ParseHeader({exact.get(), raw.str().size()}, "m");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(*(*file)->GetInts("tokenizer.ggml.token_type"), ::testing::ElementsAre(1, -2, 3));
}

TEST(Faults, Cve2026_7482_TensorLargerThanTheFile) {
  const absl::Status status = Refusal(OneTensor({17}));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("truncated"), HasSubstr("'t'"), HasSubstr("{17}")));
  EXPECT_THAT(Refused(OneTensor({uint64_t{1} << 40, 1000})), HasSubstr("truncated"));
  EXPECT_THAT(Refused(OneTensor({16}, kF32, 64, 32)), HasSubstr("truncated"));
}

TEST(Faults, TruncatedFileTellsBothSizes) {
  const std::string whole = OneTensor({1024}, kF32, 4096);
  const std::string message = Refused(whole.substr(0, whole.size() - 1000));
  EXPECT_THAT(message,
              AllOf(HasSubstr(absl::StrCat(whole.size())), HasSubstr(absl::StrCat(whole.size() - 1000))));
}

TEST(Faults, EveryTruncationIsRefused) {
  Writer w;
  w.AddString("general.architecture", "deepseek2");
  w.AddStrings("words", {"a", "b"});
  w.AddInts("ints", {1, 2});
  const std::string data(64, 'x');
  ASSERT_TRUE(w.AddTensor("t", TensorType::kF32, {16}, AsBytes(data)).ok());
  const std::string whole = w.SerializeAll();
  for (size_t n = 0; n < whole.size(); ++n) {
    const absl::StatusCode code = Refusal(whole.substr(0, n)).code();
    EXPECT_EQ(code, n < 4 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kDataLoss)
        << n << " bytes";
  }
}

TEST(Faults, UnsupportedTypesAreRefusedByName) {
  for (const auto& [id, name] : std::vector<std::pair<uint32_t, std::string>>{{9, "Q8_1"},
                                                                              {15, "Q8_K"},
                                                                              {16, "IQ2_XXS"},
                                                                              {23, "IQ4_XS"},
                                                                              {24, "I8"},
                                                                              {28, "F64"},
                                                                              {34, "TQ1_0"},
                                                                              {39, "MXFP4"},
                                                                              {4, "Q4_2"},
                                                                              {77, "unknown type id 77"},
                                                                              {0xffffffffu, "4294967295"}}) {
    const absl::Status status = Refusal(OneTensor({256}, id, 1024));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("tensor 't'"), HasSubstr(name), HasSubstr("llama-quantize")));
  }
}

TEST(Faults, RowsMustBeWholeBlocks) {
  EXPECT_THAT(Refused(OneTensor({33}, kQ8_0, 1024)), AllOf(HasSubstr("33"), HasSubstr("Q8_0")));
  EXPECT_THAT(Refused(OneTensor({128, 2}, 12, 1024)), AllOf(HasSubstr("128"), HasSubstr("Q4_K")));
}

TEST(Faults, BadValues) {
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint32_t>("k", 13, 0).str()),
              HasSubstr("unknown value type 13"));
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint32_t>("k", 0xffffffffu, 0).str()),
              HasSubstr("unknown value type"));
  EXPECT_THAT(Refused(RawGguf(0, 1).KeyValue<uint8_t>("k", 7, 2).str()), HasSubstr("0 or 1"));
  EXPECT_THAT(Refused(RawGguf(0, 1).String("k").Put(kArray).Put(kArray).Put<uint64_t>(1).Data(64).str()),
              HasSubstr("arrays of arrays"));
  EXPECT_THAT(
      Refused(RawGguf(0, 1).String("k").Put(kArray).Put<uint32_t>(99).Put<uint64_t>(1).Data(64).str()),
      HasSubstr("unknown element type 99"));
  EXPECT_THAT(
      Refused(RawGguf(0, 1).String("k").Put(kArray).Put<uint32_t>(7).Put<uint64_t>(1).Put<uint8_t>(5).str()),
      HasSubstr("0 or 1"));
}

TEST(Faults, NamesFromTheFileCannotPlayTricksInLogs) {
  const std::string evil = "\x1b[2J\nFAKE LOG LINE" + std::string(500, 'A');
  const std::string message = Refused(RawGguf(0, 1).KeyValue<uint32_t>(evil, 99, 0).str());
  EXPECT_EQ(message.find('\x1b'), std::string::npos);
  EXPECT_EQ(message.find('\n'), std::string::npos);
  EXPECT_LT(message.size(), 400u);
}

}  // namespace
}  // namespace tandem::gguf
