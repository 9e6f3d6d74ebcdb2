// Well-formed files of every kind, typed reads, and files that are something else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace tandem::gguf {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// One entry of every scalar type at both ends of its range, and of every array type.
Writer EveryValue() {
  Writer w;
  w.AddUint("u8", 255, ValueType::kUint8);
  w.AddInt("i8", -128, ValueType::kInt8);
  w.AddUint("u16", 65535, ValueType::kUint16);
  w.AddInt("i16", -32768, ValueType::kInt16);
  w.AddUint("u32", 4294967295u);
  w.AddInt("i32", std::numeric_limits<int32_t>::min());
  w.AddUint("u64", std::numeric_limits<uint64_t>::max(), ValueType::kUint64);
  w.AddInt("i64", std::numeric_limits<int64_t>::min(), ValueType::kInt64);
  w.AddFloat("f32", 1e-6f);
  w.AddBool("yes", true);
  w.AddBool("no", false);
  w.AddString("text", std::string("a\0b\xc3\xa4", 5));
  w.AddString("empty", "");
  w.AddStrings("words", {"", "one", "two words"});
  w.AddInts("ints", {-1, 0, 2147483647});
  w.AddFloats("floats", {0.5f, -0.0f, INFINITY});
  Value v;
  v.type = ValueType::kFloat64;
  v.data = 0.1;
  w.AddValue("f64", v);
  v.type = ValueType::kArray;
  v.element_type = ValueType::kUint8;
  v.data = std::vector<uint64_t>{0, 255};
  w.AddValue("bytes", v);
  v.element_type = ValueType::kInt8;
  v.data = std::vector<int64_t>{-128, 127};
  w.AddValue("i8s", v);
  v.element_type = ValueType::kUint16;
  v.data = std::vector<uint64_t>{65535};
  w.AddValue("u16s", v);
  v.element_type = ValueType::kInt16;
  v.data = std::vector<int64_t>{-32768};
  w.AddValue("i16s", v);
  v.element_type = ValueType::kUint32;
  v.data = std::vector<uint64_t>{4294967295u};
  w.AddValue("u32s", v);
  v.element_type = ValueType::kUint64;
  v.data = std::vector<uint64_t>{1, std::numeric_limits<uint64_t>::max()};
  w.AddValue("u64s", v);
  v.element_type = ValueType::kInt64;
  v.data = std::vector<int64_t>{std::numeric_limits<int64_t>::min()};
  w.AddValue("i64s", v);
  v.element_type = ValueType::kFloat64;
  v.data = std::vector<double>{0.1, 1e300};
  w.AddValue("f64s", v);
  v.element_type = ValueType::kBool;
  v.data = std::vector<bool>{true, false, true};
  w.AddValue("bools", v);
  v.element_type = ValueType::kString;
  v.data = std::vector<std::string>{};
  w.AddValue("none", v);
  return w;
}

TEST(Reader, EveryValueTypeSurvivesARoundTrip) {
  const std::string bytes = EveryValue().SerializeMetadata();
  const auto file = File::ParseHeader(AsBytes(bytes), "m");
  ASSERT_TRUE(file.ok()) << file.status();
  const File& f = **file;
  EXPECT_EQ(f.metadata().size(), 27u);
  EXPECT_EQ(f.metadata().front().first, "u8");
  EXPECT_EQ(f.metadata().back().first, "none");
  EXPECT_EQ(*f.GetUint("u8"), 255u);
  EXPECT_EQ(std::get<int64_t>(f.Find("i8")->data), -128);
  EXPECT_EQ(*f.GetUint("u16"), 65535u);
  EXPECT_EQ(std::get<int64_t>(f.Find("i16")->data), -32768);
  EXPECT_EQ(*f.GetUint("u32"), 4294967295u);
  EXPECT_EQ(std::get<int64_t>(f.Find("i32")->data), std::numeric_limits<int32_t>::min());
  EXPECT_EQ(*f.GetUint("u64"), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(std::get<int64_t>(f.Find("i64")->data), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(*f.GetFloat("f32"), static_cast<double>(1e-6f));
  EXPECT_EQ(*f.GetFloat("f64"), 0.1);
  EXPECT_TRUE(*f.GetBool("yes"));
  EXPECT_FALSE(*f.GetBool("no"));
  EXPECT_EQ(*f.GetString("text"), std::string("a\0b\xc3\xa4", 5));
  EXPECT_EQ(*f.GetString("empty"), "");
  EXPECT_THAT(*f.GetStrings("words"), ElementsAre("", "one", "two words"));
  EXPECT_TRUE(f.GetStrings("none")->empty());
  EXPECT_THAT(*f.GetInts("ints"), ElementsAre(-1, 0, 2147483647));
  EXPECT_THAT(*f.GetInts("bytes"), ElementsAre(0, 255));
  EXPECT_THAT(*f.GetInts("i8s"), ElementsAre(-128, 127));
  EXPECT_THAT(*f.GetInts("u16s"), ElementsAre(65535));
  EXPECT_THAT(*f.GetInts("i16s"), ElementsAre(-32768));
  EXPECT_THAT(*f.GetInts("u32s"), ElementsAre(4294967295));
  EXPECT_THAT(*f.GetInts("i64s"), ElementsAre(std::numeric_limits<int64_t>::min()));
  EXPECT_THAT(*f.GetFloats("floats"), ElementsAre(0.5, 0.0, INFINITY));
  EXPECT_THAT(*f.GetFloats("f64s"), ElementsAre(0.1, 1e300));
  EXPECT_THAT(*f.GetFloats("ints"), ElementsAre(-1, 0, 2147483647));
  EXPECT_EQ(std::get<std::vector<bool>>(f.Find("bools")->data), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(f.Find("i16")->type, ValueType::kInt16);
  EXPECT_EQ(f.Find("i16s")->element_type, ValueType::kInt16);

  // Copied value by value, the bytes are the same: nothing was lost or widened.
  Writer copy;
  for (const auto& [key, value] : f.metadata()) copy.AddValue(key, value);
  EXPECT_EQ(copy.SerializeMetadata(), bytes);
}

TEST(Reader, TypedReadsNameTheKeyAndBothTypes) {
  const std::string bytes = EveryValue().SerializeMetadata();
  const auto file = File::ParseHeader(AsBytes(bytes), "model.gguf");
  ASSERT_TRUE(file.ok());
  const File& f = **file;
  EXPECT_EQ(f.GetUint("absent").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(f.GetUint("absent").status()), AllOf(HasSubstr("model.gguf"), HasSubstr("'absent'")));
  EXPECT_EQ(f.GetUint("text").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(f.GetUint("text").status()),
              AllOf(HasSubstr("'text'"), HasSubstr("string"), HasSubstr("integer")));
  EXPECT_THAT(Message(f.GetUint("i8").status()), AllOf(HasSubstr("'i8'"), HasSubstr("-128")));
  EXPECT_FALSE(f.GetUint("f32").ok());
  EXPECT_FALSE(f.GetUint("yes").ok());
  EXPECT_FALSE(f.GetBool("u8").ok());
  EXPECT_FALSE(f.GetString("words").ok());
  EXPECT_THAT(Message(f.GetStrings("ints").status()), HasSubstr("array of int32"));
  EXPECT_FALSE(f.GetInts("floats").ok());
  EXPECT_FALSE(f.GetInts("u64s").ok()) << "2^64-1 does not fit int64";
  EXPECT_FALSE(f.GetFloats("words").ok());
  EXPECT_EQ(*f.GetFloat("i8"), -128.0);
}

TEST(Reader, DebugStringIsShortAndPrintable) {
  Value v;
  v.data = uint64_t{32};
  EXPECT_EQ(v.DebugString(), "32");
  v.data = std::string("yarn");
  EXPECT_EQ(v.DebugString(), "yarn");
  v.data = std::string("line\nbreak\x01");
  EXPECT_EQ(v.DebugString(), "line\\nbreak\\001");
  v.data = std::string(1000, 'x');
  EXPECT_EQ(v.DebugString(10), std::string(10, 'x') + "...");
  v.data = std::string(
      "ab\xc3\xa4"
      "cd");
  EXPECT_EQ(v.DebugString(3), "ab...") << "never half of a character";
  v.element_type = ValueType::kString;
  v.data = std::vector<std::string>(129280);
  EXPECT_EQ(v.DebugString(), "[129280 strings]");
  v.data = true;
  EXPECT_EQ(v.DebugString(), "true");
}

TEST(Reader, TypeTable) {
  EXPECT_EQ(TypeName(TensorType::kQ4_K), "Q4_K");
  EXPECT_EQ(TypeName(static_cast<TensorType>(16)), "IQ2_XXS");
  EXPECT_FALSE(GetTypeInfo(static_cast<TensorType>(16)).supported);
  EXPECT_EQ(TypeName(static_cast<TensorType>(39)), "MXFP4");
  EXPECT_EQ(TypeName(static_cast<TensorType>(41)), "Q1_0");
  EXPECT_EQ(TypeName(static_cast<TensorType>(4000000000u)), "unknown");
  EXPECT_EQ(RowBytes(TensorType::kQ4_K, 7168), 4032);
  EXPECT_EQ(RowBytes(TensorType::kQ6_K, 2048), 1680);
  EXPECT_EQ(RowBytes(TensorType::kQ5_0, 128), 88);
  EXPECT_EQ(RowBytes(TensorType::kBF16, 3), 6);
  EXPECT_EQ(ValueTypeName(ValueType::kFloat64), "float64");
}

TEST(Reader, Version2IsReadAsVersion3) {
  RawGguf raw(1, 1, 2);
  raw.KeyValue<uint32_t>("answer", 4, 42).TensorInfo("t", {4}, 0, 0).PadTo(32).Data(16, 0);
  const TempFolder folder;
  const auto file = File::Open(folder.Write("v2.gguf", raw.str()));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->version(), 2u);
  EXPECT_EQ(*(*file)->GetUint("answer"), 42u);
  ASSERT_EQ((*file)->tensors().size(), 1u);
  EXPECT_EQ((*file)->tensors()[0].data[0], 0);
}

TEST(Reader, OtherVersionsAreRefusedByName) {
  EXPECT_THAT(Message(File::ParseHeader(AsBytes(RawGguf(0, 0, 1).str()), "m").status()),
              HasSubstr("version 1"));
  EXPECT_THAT(Message(File::ParseHeader(AsBytes(RawGguf(0, 0, 4).str()), "m").status()),
              HasSubstr("version 4"));
  EXPECT_THAT(Message(File::ParseHeader(AsBytes(RawGguf(0, 0, 0).str()), "m").status()),
              HasSubstr("version 0"));
  const auto big = File::ParseHeader(AsBytes(RawGguf(0, 0, 0x03000000).str()), "m").status();
  EXPECT_EQ(big.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(Message(big), HasSubstr("big-endian"));
}

TEST(Reader, OtherFormatsAreRecognized) {
  const auto message = [](const std::string& bytes) {
    return Message(File::ParseHeader(AsBytes(bytes), "m").status());
  };
  EXPECT_THAT(message(""), HasSubstr("empty"));
  EXPECT_THAT(message("GG"), HasSubstr("2 bytes"));
  EXPECT_THAT(message(std::string("\x40\0\0\0\0\0\0\0{\"__metadata__\"", 23)), HasSubstr("safetensors"));
  EXPECT_THAT(message("PK\x03\x04rest of the archive"), HasSubstr("PyTorch"));
  EXPECT_THAT(message("\x80\x02}q"), HasSubstr("PyTorch"));
  EXPECT_THAT(message("\x1f\x8b\x08 rest"), HasSubstr("gzip"));
  EXPECT_THAT(message("\x28\xb5\x2f\xfd rest"), HasSubstr("zstd"));
  EXPECT_THAT(message("version https://git-lfs.github.com/spec/v1\n"), HasSubstr("git lfs pull"));
  EXPECT_THAT(message("<!DOCTYPE html><html>"), HasSubstr("web page"));
  EXPECT_THAT(message("tjgg...."), HasSubstr("before GGUF"));
  EXPECT_THAT(message("{\"a\": 1}"), HasSubstr("JSON"));
  EXPECT_THAT(message("What is this?"), AllOf(HasSubstr("57 68 61 74"), HasSubstr("47 47 55 46")));
}

TEST(Reader, PathsThatAreNoModel) {
  const TempFolder folder;
  EXPECT_EQ(File::Open("").status().code(), absl::StatusCode::kInvalidArgument);
  const auto absent = File::Open(folder / "absent.gguf").status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(absent), HasSubstr("absent.gguf"));
  const auto empty = File::Open(folder.Write("empty.gguf", "")).status();
  EXPECT_THAT(Message(empty), AllOf(HasSubstr("empty.gguf"), HasSubstr("0 bytes")));
  EXPECT_EQ(File::Open("/dev/null").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(File::Open(folder.Write("file", "x") + "/below").status().code(), absl::StatusCode::kNotFound);
}

TEST(Reader, TensorsPointIntoTheFile) {
  std::string bytes;
  for (int i = 0; i < 24; ++i) bytes.push_back(static_cast<char>(i));
  Writer w;
  w.AddString("general.name", "small");
  ASSERT_TRUE(w.AddTensor("a", TensorType::kF16, {3, 2, 2}, AsBytes(bytes)).ok());
  const TempFolder folder;
  const std::string path = folder / "small.gguf";
  ASSERT_TRUE(w.WriteFile(path).ok());
  const auto file = File::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const Tensor* a = (*file)->FindTensor("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->ShapeString(), "{3, 2, 2}");
  EXPECT_EQ(a->n_dims, 3u);
  EXPECT_EQ(a->cols(), 3);
  EXPECT_EQ(a->rows(), 2);
  EXPECT_EQ(a->ne[3], 1);
  EXPECT_EQ(a->nbytes, 24u);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(a->data), 24), bytes);
  EXPECT_EQ((*file)->FindTensor("b"), nullptr);
  EXPECT_EQ((*file)->file_bytes(), std::filesystem::file_size(path));

  const auto header = File::Open(path, {.map_data = false});
  ASSERT_TRUE(header.ok());
  EXPECT_EQ((*header)->tensors()[0].data, nullptr);
  EXPECT_EQ((*header)->tensors()[0].file_offset, a->file_offset);
  EXPECT_EQ((*header)->Fingerprint(), (*file)->Fingerprint());
}

TEST(Reader, FingerprintTellsModelsApart) {
  const std::string data(64, 'x');
  const auto print = [&](const std::string& name, int64_t rows, const std::string& tensor,
                         uint32_t alignment) {
    Writer w;
    w.AddString("general.name", name);
    EXPECT_TRUE(w.AddTensor(tensor, TensorType::kF32, {rows, 16 / rows}, AsBytes(data)).ok());
    const std::string bytes = w.SerializeAll(alignment);
    return (*File::ParseHeader(AsBytes(bytes), "m"))->Fingerprint();
  };
  const std::string base = print("m", 4, "t", 32);
  EXPECT_EQ(base.size(), 16u);
  EXPECT_EQ(base, print("m", 4, "t", 32));
  EXPECT_EQ(base, print("m", 4, "t", 64)) << "alignment does not make another model";
  EXPECT_NE(base, print("n", 4, "t", 32));
  EXPECT_NE(base, print("m", 8, "t", 32));
  EXPECT_NE(base, print("m", 4, "u", 32));
}

TEST(Reader, FingerprintTellsWeightsApart) {
  const TempFolder folder;
  int files = 0;
  const auto print = [&](const std::string& small, const std::string& large) {
    Writer w;
    w.AddString("general.name", "m");
    EXPECT_TRUE(w.AddTensor("small", TensorType::kF32, {4}, AsBytes(small)).ok());
    EXPECT_TRUE(w.AddTensor("large", TensorType::kF32, {1000}, AsBytes(large)).ok());
    const std::string path = folder / (std::to_string(files++) + ".gguf");
    EXPECT_TRUE(w.WriteFile(path).ok());
    const auto file = File::Open(path), again = File::Open(path);
    const auto header = File::Open(path, {.map_data = false});
    EXPECT_TRUE(file.ok() && again.ok() && header.ok()) << file.status();
    EXPECT_EQ((*file)->Fingerprint(), (*again)->Fingerprint());
    EXPECT_EQ((*file)->Fingerprint(), (*header)->Fingerprint()) << "as the expert processes open it";
    return (*file)->Fingerprint();
  };
  const std::string small(16, 's'), large(4000, 'x');
  const std::string base = print(small, large);
  EXPECT_EQ(base, print(small, large));
  for (const size_t i : {0, 15}) {
    std::string other = small;
    other[i] = 'o';
    EXPECT_NE(base, print(other, large)) << i;
  }
  for (const size_t i : {1500, 1563, 3500, 3563}) {
    std::string other = large;
    other[i] = 'o';
    EXPECT_NE(base, print(small, other)) << i;
  }
  EXPECT_NE(base, print(small, large.substr(0, 2000) + std::string(2000, '\0'))) << "half copied";
}

}  // namespace
}  // namespace tandem::gguf
