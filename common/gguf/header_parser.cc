#include "common/gguf/header_parser.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"

namespace tandem::gguf::internal {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place as little-endian");

constexpr uint64_t kFixedHeaderBytes = 24;
constexpr uint64_t kMinKeyValueBytes = 8 + 1 + 4 + 1;        // key of one byte, one-byte value
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension
constexpr uint64_t kMaxNameBytes = 65535;                    // of keys and tensor names
constexpr uint32_t kMaxAlignment = 1u << 20;
// No header comes near this (DeepSeek-R1: 8 MB). It bounds what a huge, perhaps sparse, file can make us
// allocate.
constexpr uint64_t kMaxHeaderBytes = uint64_t{256} << 20;

absl::string_view View(std::string_view s) { return absl::string_view(s.data(), s.size()); }

// Encoded bytes of a scalar; 0 for string, array and unknown types.
uint64_t ScalarBytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
      return 8;
    default:
      return 0;
  }
}

// Walks the bytes of one file; every read is checked against the bytes left.
class Parser {
 public:
  Parser(std::span<const uint8_t> bytes, const std::string& name)
      : bytes_(bytes.first(std::min<uint64_t>(bytes.size(), kMaxHeaderBytes))),
        name_(name),
        cut_(bytes_.size() < bytes.size()) {}

  absl::StatusOr<Header> Parse();

 private:
  uint64_t left() const { return bytes_.size() - pos_; }

  // Errors say where we are: "FILE: WHAT at byte N: MESSAGE".
  std::string Where(uint64_t at) const {
    return absl::StrCat(name_, ": ", context_, context_.empty() ? "" : " ", "at byte ", at, ": ");
  }
  absl::Status Invalid(uint64_t at, const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat(Where(at), message));
  }
  absl::Status NoRoom(uint64_t at, const std::string& what) const {
    return absl::DataLossError(absl::StrCat(
        Where(at), what, " cannot fit in the ", left(), " bytes left",
        cut_ ? absl::StrCat(" of the ", kMaxHeaderBytes, " that a header may take: the file is corrupt")
             : std::string(": the file is truncated or corrupt")));
  }

  template <typename T>
  absl::StatusOr<T> Read(std::string_view what) {
    if (left() < sizeof(T)) return NoRoom(pos_, absl::StrCat(View(what), " (", sizeof(T), " bytes)"));
    return ReadUnchecked<T>();
  }
  template <typename T>
  T ReadUnchecked() {
    T out;
    std::memcpy(&out, bytes_.data() + pos_, sizeof(T));
    pos_ += sizeof(T);
    return out;
  }
  absl::StatusOr<std::string> ReadString(std::string_view what, uint64_t max_bytes);
  absl::StatusOr<bool> ReadBool();

  absl::Status ParseFixedHeader();
  absl::Status ParseKeyValue();
  absl::Status ParseScalar(Value* value);
  absl::Status ParseArray(Value* value);
  absl::Status ParseAlignment();
  absl::Status ParseTensor();
  absl::Status ParseShape(Tensor* tensor);
  absl::Status CheckType(const Tensor& tensor, uint64_t at) const;

  const std::span<const uint8_t> bytes_;
  const std::string& name_;
  const bool cut_;  // the file is longer than bytes_
  uint64_t pos_ = 0;
  std::string context_;  // "key 'x'", "tensor 'y'"
  uint64_t n_tensors_ = 0;
  uint64_t n_kv_ = 0;
  uint64_t alignment_at_ = 0;  // where the key general.alignment stands
  Header header_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
};

absl::StatusOr<std::string> Parser::ReadString(std::string_view what, uint64_t max_bytes) {
  const uint64_t at = pos_;
  TANDEM_ASSIGN_OR_RETURN(const uint64_t length, Read<uint64_t>(what));
  if (length > left()) return NoRoom(at, absl::StrCat(View(what), " of ", length, " bytes"));
  if (length > max_bytes) {
    return Invalid(at,
                   absl::StrCat(View(what), " of ", length, " bytes; at most ", max_bytes, " are allowed"));
  }
  std::string out(reinterpret_cast<const char*>(bytes_.data() + pos_), length);
  pos_ += length;
  return out;
}

absl::StatusOr<bool> Parser::ReadBool() {
  TANDEM_ASSIGN_OR_RETURN(const uint8_t byte, Read<uint8_t>("bool"));
  if (byte > 1) return Invalid(pos_ - 1, absl::StrCat("a bool must be 0 or 1, found ", byte));
  return byte == 1;
}

absl::Status Parser::ParseFixedHeader() {
  if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name_, ": not a GGUF file: ", DescribeForeignMagic(bytes_)));
  }
  context_ = "header";
  if (bytes_.size() < kFixedHeaderBytes) return NoRoom(0, "the fixed header (24 bytes)");
  pos_ = 4;
  header_.version = ReadUnchecked<uint32_t>();
  n_tensors_ = ReadUnchecked<uint64_t>();
  n_kv_ = ReadUnchecked<uint64_t>();
  const uint32_t version = header_.version;
  if (version == 1) {
    return absl::UnimplementedError(absl::StrCat(
        name_,
        ": GGUF version 1 is not supported (versions 2 and 3 are); convert the model again with a current "
        "llama.cpp, or take a newer download"));
  }
  if ((version & 0xffffu) == 0 && version != 0) {
    return absl::UnimplementedError(absl::StrCat(name_, ": a big-endian GGUF file (version field ",
                                                 absl::Hex(version, absl::kZeroPad8),
                                                 "); only little-endian files are supported: take the "
                                                 "little-endian download, or convert the model without "
                                                 "--bigendian"));
  }
  if (version != 2 && version != 3) {
    return absl::UnimplementedError(
        absl::StrCat(name_, ": GGUF version ", version, " is not supported (versions 2 and 3 are)"));
  }
  // Counts are bounded by what the shortest entry takes, before anything is allocated for them.
  if (n_kv_ > left() / kMinKeyValueBytes) return NoRoom(16, absl::StrCat(n_kv_, " metadata entries"));
  if (n_tensors_ > left() / kMinTensorBytes) return NoRoom(8, absl::StrCat(n_tensors_, " tensors"));
  return absl::OkStatus();
}

absl::Status Parser::ParseScalar(Value* value) {
  switch (value->type) {
#define TANDEM_GGUF_SCALAR(ENUM, CTYPE, HELD)                         \
  case ValueType::ENUM: {                                             \
    TANDEM_ASSIGN_OR_RETURN(const CTYPE v, Read<CTYPE>("a " #CTYPE)); \
    value->data = static_cast<HELD>(v);                               \
    return absl::OkStatus();                                          \
  }
    TANDEM_GGUF_SCALAR(kUint8, uint8_t, uint64_t)
    TANDEM_GGUF_SCALAR(kUint16, uint16_t, uint64_t)
    TANDEM_GGUF_SCALAR(kUint32, uint32_t, uint64_t)
    TANDEM_GGUF_SCALAR(kUint64, uint64_t, uint64_t)
    TANDEM_GGUF_SCALAR(kInt8, int8_t, int64_t)
    TANDEM_GGUF_SCALAR(kInt16, int16_t, int64_t)
    TANDEM_GGUF_SCALAR(kInt32, int32_t, int64_t)
    TANDEM_GGUF_SCALAR(kInt64, int64_t, int64_t)
    TANDEM_GGUF_SCALAR(kFloat32, float, double)
    TANDEM_GGUF_SCALAR(kFloat64, double, double)
#undef TANDEM_GGUF_SCALAR
    case ValueType::kBool: {
      TANDEM_ASSIGN_OR_RETURN(const bool v, ReadBool());
      value->data = v;
      return absl::OkStatus();
    }
    case ValueType::kString: {
      TANDEM_ASSIGN_OR_RETURN(std::string v, ReadString("string", std::numeric_limits<uint64_t>::max()));
      value->data = std::move(v);
      return absl::OkStatus();
    }
    case ValueType::kArray:
      return ParseArray(value);
  }
  return Invalid(pos_ - 4, absl::StrCat("unknown value type ", static_cast<uint32_t>(value->type)));
}

absl::Status Parser::ParseArray(Value* value) {
  const uint64_t at = pos_;
  TANDEM_ASSIGN_OR_RETURN(const uint32_t element, Read<uint32_t>("an element type"));
  TANDEM_ASSIGN_OR_RETURN(const uint64_t count, Read<uint64_t>("an array count"));
  value->element_type = static_cast<ValueType>(element);
  if (value->element_type == ValueType::kArray) {
    return absl::UnimplementedError(absl::StrCat(Where(at), "arrays of arrays are not supported"));
  }
  const bool strings = value->element_type == ValueType::kString;
  const uint64_t min_bytes = strings ? 8 : ScalarBytes(value->element_type);
  if (min_bytes == 0) return Invalid(at, absl::StrCat("unknown element type ", element, " of an array"));
  if (count > left() / min_bytes) {
    return NoRoom(at + 4,
                  absl::StrCat("an array of ", count, " ", View(ValueTypeName(value->element_type)), "s"));
  }
  // From here the bytes of all elements are known to be there (of strings: their lengths).
  switch (value->element_type) {
#define TANDEM_GGUF_ARRAY(ENUM, CTYPE, HELD)                               \
  case ValueType::ENUM: {                                                  \
    std::vector<HELD> values(count);                                       \
    for (HELD & v : values) v = static_cast<HELD>(ReadUnchecked<CTYPE>()); \
    value->data = std::move(values);                                       \
    return absl::OkStatus();                                               \
  }
    TANDEM_GGUF_ARRAY(kUint8, uint8_t, uint64_t)
    TANDEM_GGUF_ARRAY(kUint16, uint16_t, uint64_t)
    TANDEM_GGUF_ARRAY(kUint32, uint32_t, uint64_t)
    TANDEM_GGUF_ARRAY(kUint64, uint64_t, uint64_t)
    TANDEM_GGUF_ARRAY(kInt8, int8_t, int64_t)
    TANDEM_GGUF_ARRAY(kInt16, int16_t, int64_t)
    TANDEM_GGUF_ARRAY(kInt32, int32_t, int64_t)
    TANDEM_GGUF_ARRAY(kInt64, int64_t, int64_t)
    TANDEM_GGUF_ARRAY(kFloat32, float, double)
    TANDEM_GGUF_ARRAY(kFloat64, double, double)
#undef TANDEM_GGUF_ARRAY
    case ValueType::kBool: {
      std::vector<bool> values(count);
      for (uint64_t i = 0; i < count; ++i) {
        TANDEM_ASSIGN_OR_RETURN(const bool v, ReadBool());
        values[i] = v;
      }
      value->data = std::move(values);
      return absl::OkStatus();
    }
    default: {
      std::vector<std::string> values;
      values.reserve(count);
      for (uint64_t i = 0; i < count; ++i) {
        auto v = ReadString("a string of the array", std::numeric_limits<uint64_t>::max());
        if (!v.ok()) return Annotate(v.status(), absl::StrCat("element ", i, " of ", count));
        values.push_back(*std::move(v));
      }
      value->data = std::move(values);
      return absl::OkStatus();
    }
  }
}

absl::Status Parser::ParseKeyValue() {
  const uint64_t at = pos_;
  TANDEM_ASSIGN_OR_RETURN(std::string key, ReadString("a metadata key", kMaxNameBytes));
  if (key.empty()) return Invalid(at, "empty metadata key");
  context_ = absl::StrCat("key ", Quoted(key));
  const auto [it, fresh] = header_.metadata_index.try_emplace(key, header_.metadata.size());
  if (!fresh) return Invalid(at, "the key stands twice in the metadata");
  TANDEM_ASSIGN_OR_RETURN(const uint32_t type, Read<uint32_t>("a value type"));
  if (key == "general.alignment") alignment_at_ = at;
  Value value;
  value.type = static_cast<ValueType>(type);
  TANDEM_RETURN_IF_ERROR(ParseScalar(&value));
  header_.metadata.emplace_back(std::move(key), std::move(value));
  return absl::OkStatus();
}

absl::Status Parser::ParseAlignment() {
  const auto it = header_.metadata_index.find("general.alignment");
  if (it == header_.metadata_index.end()) return absl::OkStatus();
  const Value& value = header_.metadata[it->second].second;
  context_ = "key 'general.alignment'";
  if (value.type != ValueType::kUint32) {
    return Invalid(alignment_at_, absl::StrCat("must be uint32, is ", View(ValueTypeName(value.type))));
  }
  const uint64_t alignment = std::get<uint64_t>(value.data);
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    return Invalid(alignment_at_,
                   absl::StrCat("must be a power of two, at most ", kMaxAlignment, "; is ", alignment));
  }
  header_.alignment = static_cast<uint32_t>(alignment);
  return absl::OkStatus();
}

absl::Status Parser::CheckType(const Tensor& tensor, uint64_t at) const {
  const TypeInfo info = GetTypeInfo(tensor.type);
  if (info.supported) return absl::OkStatus();
  const auto id = static_cast<uint32_t>(tensor.type);
  const std::string type =
      info.name == "unknown" ? absl::StrCat("unknown type id ", id) : absl::StrCat("type ", View(info.name));
  return absl::UnimplementedError(absl::StrCat(
      Where(at), type,
      " is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K are): take a "
      "Q4_K_M download, or make one from the original with llama-quantize"));
}

absl::Status Parser::ParseShape(Tensor* tensor) {
  const uint64_t at = pos_;
  TANDEM_ASSIGN_OR_RETURN(tensor->n_dims, Read<uint32_t>("the number of dimensions"));
  if (tensor->n_dims < 1 || tensor->n_dims > 4) {
    return Invalid(at, absl::StrCat(tensor->n_dims, " dimensions; 1 to 4 are allowed"));
  }
  int64_t elements = 1;
  for (uint32_t i = 0; i < tensor->n_dims; ++i) {
    const uint64_t dim_at = pos_;
    TANDEM_ASSIGN_OR_RETURN(const uint64_t dim, Read<uint64_t>("a dimension"));
    if (dim == 0) return Invalid(dim_at, absl::StrCat("dimension ", i, " is 0"));
    std::optional<int64_t> product;
    if (dim <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      product = CheckedMul<int64_t>(elements, static_cast<int64_t>(dim));
    }
    if (!product)
      return Invalid(dim_at, absl::StrCat("dimension ", i, " of ", dim, " overflows the tensor's size"));
    elements = *product;
    tensor->ne[i] = static_cast<int64_t>(dim);
  }
  return absl::OkStatus();
}

absl::Status Parser::ParseTensor() {
  const uint64_t at = pos_;
  Tensor tensor;
  TANDEM_ASSIGN_OR_RETURN(tensor.name, ReadString("a tensor name", kMaxNameBytes));
  if (tensor.name.empty()) return Invalid(at, "empty tensor name");
  context_ = absl::StrCat("tensor ", Quoted(tensor.name));
  if (!tensor_index_.try_emplace(tensor.name, header_.tensors.size()).second) {
    return Invalid(at, "the tensor stands twice in the file");
  }
  TANDEM_RETURN_IF_ERROR(ParseShape(&tensor));

  const uint64_t type_at = pos_;
  TANDEM_ASSIGN_OR_RETURN(const uint32_t type, Read<uint32_t>("a tensor type"));
  tensor.type = static_cast<TensorType>(type);
  TANDEM_RETURN_IF_ERROR(CheckType(tensor, type_at));
  const TypeInfo info = GetTypeInfo(tensor.type);
  if (tensor.ne[0] % info.block_size != 0) {
    return Invalid(type_at, absl::StrCat("rows of ", tensor.ne[0], " values are not a multiple of the ",
                                         info.block_size, " values of a ", View(info.name), " block"));
  }
  // The product of all dimensions fits int64 (ParseShape), so this quotient is exact and only the last
  // multiplication can overflow.
  const int64_t blocks = tensor.ne[0] / info.block_size * tensor.ne[1] * tensor.ne[2] * tensor.ne[3];
  const auto nbytes = CheckedMul<int64_t>(blocks, info.type_size);
  if (!nbytes) return Invalid(type_at, absl::StrCat(tensor.ShapeString(), " overflows the tensor's bytes"));
  tensor.nbytes = static_cast<uint64_t>(*nbytes);

  const uint64_t offset_at = pos_;
  TANDEM_ASSIGN_OR_RETURN(tensor.file_offset, Read<uint64_t>("a tensor offset"));
  if (tensor.file_offset % header_.alignment != 0) {
    return Invalid(offset_at, absl::StrCat("data offset ", tensor.file_offset,
                                           " is not a multiple of the alignment ", header_.alignment));
  }
  header_.tensors.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::StatusOr<Header> Parser::Parse() {
  TANDEM_RETURN_IF_ERROR(ParseFixedHeader());
  for (uint64_t i = 0; i < n_kv_; ++i) {
    context_ = absl::StrCat("metadata entry ", i, " of ", n_kv_);
    TANDEM_RETURN_IF_ERROR(ParseKeyValue());
  }
  TANDEM_RETURN_IF_ERROR(ParseAlignment());
  context_ = "tensor list";
  if (n_tensors_ > left() / kMinTensorBytes) return NoRoom(pos_, absl::StrCat(n_tensors_, " tensors"));
  header_.tensors.reserve(n_tensors_);
  for (uint64_t i = 0; i < n_tensors_; ++i) {
    context_ = absl::StrCat("tensor ", i, " of ", n_tensors_);
    TANDEM_RETURN_IF_ERROR(ParseTensor());
  }
  const auto data_start = CheckedRoundUp<uint64_t>(pos_, header_.alignment);
  if (!data_start) return Invalid(pos_, "the header's length overflows");
  header_.data_start = *data_start;
  for (Tensor& tensor : header_.tensors) {
    const auto start = CheckedAdd<uint64_t>(tensor.file_offset, header_.data_start);
    if (!start || !CheckedAdd<uint64_t>(*start, tensor.nbytes)) {
      context_ = absl::StrCat("tensor ", Quoted(tensor.name));
      return Invalid(pos_, absl::StrCat("data offset ", tensor.file_offset, " overflows the file"));
    }
    tensor.file_offset = *start;
  }
  return std::move(header_);
}

}  // namespace

std::string Quoted(std::string_view text) {
  constexpr size_t kMax = 100;
  std::string out = absl::StrCat("'", absl::Utf8SafeCEscape(View(text.substr(0, kMax))), "'");
  if (text.size() > kMax) absl::StrAppend(&out, " (", text.size(), " bytes)");
  return out;
}

absl::StatusOr<Header> ParseHeader(std::span<const uint8_t> bytes, const std::string& name) {
  return Parser(bytes, name).Parse();
}

absl::Status CheckDataLayout(const Header& header, uint64_t file_bytes, const std::string& name) {
  std::vector<const Tensor*> order;
  order.reserve(header.tensors.size());
  for (const Tensor& tensor : header.tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
    return std::pair(a->file_offset, a->nbytes) < std::pair(b->file_offset, b->nbytes);
  });
  // Sums of offset and size were checked for overflow by the parser.
  const Tensor* last = nullptr;  // the one that reaches farthest
  for (const Tensor* tensor : order) {
    if (last == nullptr || tensor->file_offset + tensor->nbytes > last->file_offset + last->nbytes)
      last = tensor;
  }
  if (last != nullptr && last->file_offset + last->nbytes > file_bytes) {
    return absl::DataLossError(absl::StrCat(
        name, ": the file is truncated or corrupt: tensor ", Quoted(last->name), " ", last->ShapeString(),
        " lies at bytes ", last->file_offset, " to ", last->file_offset + last->nbytes,
        ", so at least that many bytes were expected; the file has ", file_bytes));
  }
  for (size_t i = 1; i < order.size(); ++i) {
    const Tensor& a = *order[i - 1];
    const Tensor& b = *order[i];
    const bool alias = a.file_offset == b.file_offset && a.nbytes == b.nbytes;
    if (!alias && b.file_offset < a.file_offset + a.nbytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": tensor ", Quoted(b.name), " at byte ", b.file_offset, " overlaps tensor ",
                       Quoted(a.name), " at bytes ", a.file_offset, " to ", a.file_offset + a.nbytes));
    }
  }
  return absl::OkStatus();
}

}  // namespace tandem::gguf::internal
