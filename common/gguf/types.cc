// Names and block sizes of the tensor and value types.
#include <array>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/checked_math.h"
#include "common/gguf/gguf.h"

namespace tandem::gguf {
namespace {

constexpr TypeInfo Supported(std::string_view name, uint32_t block_size, uint32_t type_size) {
  return {name, block_size, type_size, true};
}
constexpr TypeInfo Known(std::string_view name) { return {name, 0, 0, false}; }

// Indexed by GGUF type id.
constexpr std::array kTypes = {
    Supported("F32", 1, 4),         // 0
    Supported("F16", 1, 2),         // 1
    Supported("Q4_0", 32, 18),      // 2
    Supported("Q4_1", 32, 20),      // 3
    Known("Q4_2 (removed)"),        // 4
    Known("Q4_3 (removed)"),        // 5
    Supported("Q5_0", 32, 22),      // 6
    Supported("Q5_1", 32, 24),      // 7
    Supported("Q8_0", 32, 34),      // 8
    Known("Q8_1"),                  // 9
    Supported("Q2_K", 256, 84),     // 10
    Supported("Q3_K", 256, 110),    // 11
    Supported("Q4_K", 256, 144),    // 12
    Supported("Q5_K", 256, 176),    // 13
    Supported("Q6_K", 256, 210),    // 14
    Known("Q8_K"),                  // 15
    Known("IQ2_XXS"),               // 16
    Known("IQ2_XS"),                // 17
    Known("IQ3_XXS"),               // 18
    Known("IQ1_S"),                 // 19
    Known("IQ4_NL"),                // 20
    Known("IQ3_S"),                 // 21
    Known("IQ2_S"),                 // 22
    Known("IQ4_XS"),                // 23
    Known("I8"),                    // 24
    Known("I16"),                   // 25
    Known("I32"),                   // 26
    Known("I64"),                   // 27
    Known("F64"),                   // 28
    Known("IQ1_M"),                 // 29
    Supported("BF16", 1, 2),        // 30
    Known("Q4_0_4_4 (removed)"),    // 31
    Known("Q4_0_4_8 (removed)"),    // 32
    Known("Q4_0_8_8 (removed)"),    // 33
    Known("TQ1_0"),                 // 34
    Known("TQ2_0"),                 // 35
    Known("IQ4_NL_4_4 (removed)"),  // 36
    Known("IQ4_NL_4_8 (removed)"),  // 37
    Known("IQ4_NL_8_8 (removed)"),  // 38
    Known("MXFP4"),                 // 39
    Known("NVFP4"),                 // 40
    Known("Q1_0"),                  // 41
};

constexpr std::array<std::string_view, 13> kValueTypes = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                                          "int32",  "float32", "bool",   "string", "array",
                                                          "uint64", "int64",   "float64"};

}  // namespace

TypeInfo GetTypeInfo(TensorType type) {
  const auto id = static_cast<uint32_t>(type);
  return id < kTypes.size() ? kTypes[id] : Known("unknown");
}

int64_t RowBytes(TensorType type, int64_t cols) {
  const TypeInfo info = GetTypeInfo(type);
  TANDEM_CHECK(info.supported);
  TANDEM_CHECK(cols >= 0 && cols % info.block_size == 0);
  const auto bytes = CheckedMul<int64_t>(cols / info.block_size, info.type_size);
  TANDEM_CHECK(bytes.has_value());
  return *bytes;
}

std::string_view ValueTypeName(ValueType type) {
  const auto id = static_cast<uint32_t>(type);
  return id < kValueTypes.size() ? kValueTypes[id] : "unknown";
}

std::string Tensor::ShapeString() const {
  std::string out = "{";
  for (uint32_t i = 0; i < n_dims && i < 4; ++i) absl::StrAppend(&out, i == 0 ? "" : ", ", ne[i]);
  out += "}";
  return out;
}

}  // namespace tandem::gguf
