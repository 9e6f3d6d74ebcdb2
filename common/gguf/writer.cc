// Writes GGUF v3 files.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/gguf/header_parser.h"

namespace tandem::gguf {
namespace {

constexpr uint64_t kChunkBytes = 8u << 20;
constexpr std::string_view kAlignmentKey = "general.alignment";

template <typename T>
void Put(std::string* out, T value) {
  static_assert(std::is_arithmetic_v<T> && std::endian::native == std::endian::little);
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}
void PutString(std::string* out, std::string_view s) {
  Put<uint64_t>(out, s.size());
  out->append(s);
}

// The variant alternative that holds scalars of a type, and whether `v` fits it.
bool IsUnsigned(ValueType type) {
  return type == ValueType::kUint8 || type == ValueType::kUint16 || type == ValueType::kUint32 ||
         type == ValueType::kUint64;
}
bool IsSigned(ValueType type) {
  return type == ValueType::kInt8 || type == ValueType::kInt16 || type == ValueType::kInt32 ||
         type == ValueType::kInt64;
}
uint64_t MaxOf(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
      return std::numeric_limits<uint8_t>::max();
    case ValueType::kInt8:
      return std::numeric_limits<int8_t>::max();
    case ValueType::kUint16:
      return std::numeric_limits<uint16_t>::max();
    case ValueType::kInt16:
      return std::numeric_limits<int16_t>::max();
    case ValueType::kUint32:
      return std::numeric_limits<uint32_t>::max();
    case ValueType::kInt32:
      return std::numeric_limits<int32_t>::max();
    case ValueType::kUint64:
      return std::numeric_limits<uint64_t>::max();
    default:
      return std::numeric_limits<int64_t>::max();
  }
}

// Whether the variant of `value` is the one that its types call for.
bool IsConsistent(const Value& value) {
  const bool array = value.type == ValueType::kArray;
  const ValueType type = array ? value.element_type : value.type;
  const auto holds = [&]<typename T>(std::type_identity<T>) {
    return array ? std::holds_alternative<std::vector<T>>(value.data) : std::holds_alternative<T>(value.data);
  };
  if (IsUnsigned(type)) return holds(std::type_identity<uint64_t>());
  if (IsSigned(type)) return holds(std::type_identity<int64_t>());
  switch (type) {
    case ValueType::kFloat32:
    case ValueType::kFloat64:
      return holds(std::type_identity<double>());
    case ValueType::kBool:
      return holds(std::type_identity<bool>());
    case ValueType::kString:
      return holds(std::type_identity<std::string>());
    default:
      return false;
  }
}

// One scalar, as `type`, from the wide form in which Value holds it.
template <typename T>
void PutScalar(std::string* out, ValueType type, const T& v) {
  if constexpr (std::is_same_v<T, std::string>) {
    PutString(out, v);
  } else {
    switch (type) {
      case ValueType::kUint8:
        return Put(out, static_cast<uint8_t>(v));
      case ValueType::kInt8:
        return Put(out, static_cast<int8_t>(v));
      case ValueType::kUint16:
        return Put(out, static_cast<uint16_t>(v));
      case ValueType::kInt16:
        return Put(out, static_cast<int16_t>(v));
      case ValueType::kUint32:
        return Put(out, static_cast<uint32_t>(v));
      case ValueType::kInt32:
        return Put(out, static_cast<int32_t>(v));
      case ValueType::kFloat32:
        return Put(out, static_cast<float>(v));
      case ValueType::kBool:
        return Put(out, static_cast<uint8_t>(v ? 1 : 0));
      case ValueType::kUint64:
        return Put(out, static_cast<uint64_t>(v));
      case ValueType::kInt64:
        return Put(out, static_cast<int64_t>(v));
      case ValueType::kFloat64:
        return Put(out, static_cast<double>(v));
      case ValueType::kString:
      case ValueType::kArray:
        break;
    }
    TANDEM_CHECK(false && "the value's type does not name a scalar");
  }
}

template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};

void PutValue(std::string* out, const Value& value) {
  Put(out, static_cast<uint32_t>(value.type));
  std::visit(
      [&](const auto& v) {
        using T = std::decay_t<decltype(v)>;
        if constexpr (IsVector<T>::value) {
          Put(out, static_cast<uint32_t>(value.element_type));
          Put<uint64_t>(out, v.size());
          for (const auto& e : v) PutScalar<typename T::value_type>(out, value.element_type, e);
        } else {
          PutScalar(out, value.type, v);
        }
      },
      value.data);
}

// What may be handed to a fill callback at once: whole rows, or whole blocks of very long rows.
uint64_t FillChunk(TensorType type, int64_t cols) {
  const auto row = static_cast<uint64_t>(RowBytes(type, cols));
  const uint64_t unit = row <= kChunkBytes ? row : GetTypeInfo(type).type_size;
  return kChunkBytes / unit * unit;
}

}  // namespace

struct Writer::Plan {
  std::string header;           // up to the data section, padded
  std::vector<size_t> written;  // tensors whose bytes go into the file, in order
  uint32_t alignment = 32;
};

void Writer::Set(std::string key, Value value) {
  TANDEM_CHECK(!key.empty() && IsConsistent(value));
  const auto [it, fresh] = metadata_index_.try_emplace(key, metadata_.size());
  if (fresh) {
    metadata_.emplace_back(std::move(key), std::move(value));
  } else {
    metadata_[it->second].second = std::move(value);
  }
}

void Writer::AddUint(std::string key, uint64_t value, ValueType type) {
  TANDEM_CHECK((IsUnsigned(type) || IsSigned(type)) && value <= MaxOf(type));
  Value v;
  v.type = type;
  if (IsUnsigned(type)) {
    v.data = value;
  } else {
    v.data = static_cast<int64_t>(value);
  }
  Set(std::move(key), std::move(v));
}

void Writer::AddInt(std::string key, int64_t value, ValueType type) {
  if (value >= 0) return AddUint(std::move(key), static_cast<uint64_t>(value), type);
  // The lowest value of a signed type is -(highest) - 1.
  TANDEM_CHECK(IsSigned(type) && value >= -static_cast<int64_t>(MaxOf(type)) - 1);
  Set(std::move(key), Value{.type = type, .data = value});
}

void Writer::AddFloat(std::string key, float value) {
  Set(std::move(key), Value{.type = ValueType::kFloat32, .data = static_cast<double>(value)});
}

void Writer::AddBool(std::string key, bool value) {
  Set(std::move(key), Value{.type = ValueType::kBool, .data = value});
}

void Writer::AddString(std::string key, std::string value) {
  Set(std::move(key), Value{.type = ValueType::kString, .data = std::move(value)});
}

void Writer::AddStrings(std::string key, std::vector<std::string> values) {
  Set(std::move(key),
      Value{.type = ValueType::kArray, .element_type = ValueType::kString, .data = std::move(values)});
}

void Writer::AddInts(std::string key, std::vector<int32_t> values) {
  Set(std::move(key), Value{.type = ValueType::kArray,
                            .element_type = ValueType::kInt32,
                            .data = std::vector<int64_t>(values.begin(), values.end())});
}

void Writer::AddFloats(std::string key, std::vector<float> values) {
  Set(std::move(key), Value{.type = ValueType::kArray,
                            .element_type = ValueType::kFloat32,
                            .data = std::vector<double>(values.begin(), values.end())});
}

void Writer::AddValue(std::string key, Value value) { Set(std::move(key), std::move(value)); }

absl::StatusOr<Writer::Pending> Writer::Check(std::string name, TensorType type,
                                              std::vector<int64_t> ne) const {
  const std::string prefix = absl::StrCat("tensor ", internal::Quoted(name), ": ");
  const TypeInfo info = GetTypeInfo(type);
  if (name.empty()) return absl::InvalidArgumentError("a tensor without a name");
  if (tensor_index_.contains(name)) return absl::InvalidArgumentError(absl::StrCat(prefix, "added before"));
  if (!info.supported) {
    return absl::InvalidArgumentError(
        absl::StrCat(prefix, "type id ", static_cast<uint32_t>(type), " cannot be written"));
  }
  if (ne.empty() || ne.size() > 4) {
    return absl::InvalidArgumentError(absl::StrCat(prefix, ne.size(), " dimensions; 1 to 4 are allowed"));
  }
  if (ne[0] % info.block_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(prefix, "rows of ", ne[0], " values are not a multiple of ", info.block_size));
  }
  std::optional<int64_t> bytes = CheckedMul<int64_t>(ne[0] / info.block_size, info.type_size);
  for (size_t i = 0; i < ne.size(); ++i) {
    if (ne[i] < 1) return absl::InvalidArgumentError(absl::StrCat(prefix, "dimension ", i, " is ", ne[i]));
    if (i > 0 && bytes) bytes = CheckedMul<int64_t>(*bytes, ne[i]);
  }
  if (!bytes) return absl::InvalidArgumentError(absl::StrCat(prefix, "its size overflows"));
  Pending out;
  out.name = std::move(name);
  out.type = type;
  out.ne = std::move(ne);
  out.nbytes = static_cast<uint64_t>(*bytes);
  return out;
}

absl::Status Writer::AddTensor(std::string name, TensorType type, std::vector<int64_t> ne,
                               std::span<const uint8_t> data) {
  TANDEM_ASSIGN_OR_RETURN(Pending tensor, Check(std::move(name), type, std::move(ne)));
  if (data.size() != tensor.nbytes) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", internal::Quoted(tensor.name),
                                                   ": its shape takes ", tensor.nbytes, " bytes, given are ",
                                                   data.size()));
  }
  tensor.data = data;
  tensor_index_.emplace(tensor.name, tensors_.size());
  tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::Status Writer::AddTensor(std::string name, TensorType type, std::vector<int64_t> ne, Fill fill) {
  TANDEM_CHECK(fill != nullptr);
  TANDEM_ASSIGN_OR_RETURN(Pending tensor, Check(std::move(name), type, std::move(ne)));
  tensor.fill = std::move(fill);
  tensor_index_.emplace(tensor.name, tensors_.size());
  tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::Status Writer::AddAlias(std::string name, std::string_view original) {
  const auto it = tensor_index_.find(absl::string_view(original.data(), original.size()));
  if (it == tensor_index_.end()) {
    return absl::NotFoundError(absl::StrCat("tensor ", internal::Quoted(name), ": no tensor ",
                                            internal::Quoted(original), " to share the bytes of"));
  }
  const size_t index = it->second;
  TANDEM_ASSIGN_OR_RETURN(Pending tensor, Check(std::move(name), tensors_[index].type, tensors_[index].ne));
  tensor.alias_of = tensors_[index].alias_of >= 0 ? tensors_[index].alias_of : static_cast<int64_t>(index);
  tensor_index_.emplace(tensor.name, tensors_.size());
  tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

// general.alignment is ours to say: it is left out where it is the default and nobody asked for it.
std::string Writer::SerializeKeyValues(uint64_t n_tensors, uint32_t alignment) const {
  const Value alignment_value{.type = ValueType::kUint32, .data = uint64_t{alignment}};
  const bool own_key =
      metadata_index_.contains(absl::string_view(kAlignmentKey.data(), kAlignmentKey.size()));
  const bool add_key = !own_key && alignment != 32;
  std::string out = "GGUF";
  Put<uint32_t>(&out, 3);
  Put<uint64_t>(&out, n_tensors);
  Put<uint64_t>(&out, metadata_.size() + (add_key ? 1 : 0));
  for (const auto& [key, value] : metadata_) {
    PutString(&out, key);
    PutValue(&out, key == kAlignmentKey ? alignment_value : value);
  }
  if (add_key) {
    PutString(&out, kAlignmentKey);
    PutValue(&out, alignment_value);
  }
  return out;
}

absl::StatusOr<Writer::Plan> Writer::MakePlan(const Options& options) const {
  if (!std::has_single_bit(options.alignment) || options.alignment > (1u << 20)) {
    return absl::InvalidArgumentError(
        absl::StrCat("alignment ", options.alignment, " is not a power of two of at most 1 MiB"));
  }
  Plan plan;
  plan.alignment = options.alignment;
  plan.header = SerializeKeyValues(tensors_.size(), options.alignment);
  std::vector<uint64_t> offsets(tensors_.size());
  std::map<std::pair<const uint8_t*, uint64_t>, uint64_t> shared;  // data and size -> offset
  uint64_t next = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Pending& tensor = tensors_[i];
    bool own_bytes = tensor.alias_of < 0;
    if (!own_bytes) {
      offsets[i] = offsets[tensor.alias_of];
    } else if (options.share_equal_data && !tensor.fill) {
      const auto [it, fresh] = shared.try_emplace({tensor.data.data(), tensor.nbytes}, next);
      offsets[i] = it->second;
      own_bytes = fresh;
    } else {
      offsets[i] = next;
    }
    if (own_bytes) {
      plan.written.push_back(i);
      const auto end = CheckedAdd<uint64_t>(next, tensor.nbytes);
      const auto padded = end ? CheckedRoundUp<uint64_t>(*end, options.alignment) : std::nullopt;
      if (!padded) return absl::InvalidArgumentError("the sum of the tensors' bytes overflows");
      next = *padded;
    }
    PutString(&plan.header, tensor.name);
    Put(&plan.header, static_cast<uint32_t>(tensor.ne.size()));
    for (const int64_t n : tensor.ne) Put(&plan.header, static_cast<uint64_t>(n));
    Put(&plan.header, static_cast<uint32_t>(tensor.type));
    Put(&plan.header, offsets[i]);
  }
  plan.header.resize((plan.header.size() + options.alignment - 1) / options.alignment * options.alignment,
                     '\0');
  return plan;
}

absl::Status Writer::WriteTo(const Options& options,
                             const std::function<absl::Status(std::span<const uint8_t>)>& sink) const {
  TANDEM_ASSIGN_OR_RETURN(const Plan plan, MakePlan(options));
  TANDEM_RETURN_IF_ERROR(sink({reinterpret_cast<const uint8_t*>(plan.header.data()), plan.header.size()}));
  const std::vector<uint8_t> zeros(plan.alignment);
  std::vector<uint8_t> chunk;
  for (const size_t i : plan.written) {
    const Pending& tensor = tensors_[i];
    if (tensor.fill) {
      const uint64_t step = std::min(FillChunk(tensor.type, tensor.ne[0]), tensor.nbytes);
      chunk.resize(step);
      for (uint64_t offset = 0; offset < tensor.nbytes; offset += step) {
        const std::span<uint8_t> part(chunk.data(), std::min(step, tensor.nbytes - offset));
        tensor.fill(offset, part);
        TANDEM_RETURN_IF_ERROR(sink(part));
      }
    } else {
      TANDEM_RETURN_IF_ERROR(sink(tensor.data));
    }
    const uint64_t past = tensor.nbytes % plan.alignment;
    if (past != 0) TANDEM_RETURN_IF_ERROR(sink(std::span(zeros).first(plan.alignment - past)));
  }
  return absl::OkStatus();
}

std::string Writer::SerializeMetadata() const { return SerializeKeyValues(0, 32); }

std::string Writer::SerializeAll(uint32_t alignment) const {
  std::string out;
  const absl::Status status = WriteTo({.alignment = alignment}, [&](std::span<const uint8_t> bytes) {
    out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return absl::OkStatus();
  });
  TANDEM_CHECK(status.ok());
  return out;
}

namespace {

// The file that `path` stands for, symbolic links followed, also to where nothing is yet. Renaming replaces
// whatever has the name: a link, and for root a device, must not be lost to a model.
absl::StatusOr<std::string> WriteTarget(const std::string& path) {
  constexpr int kMostLinks = 40;  // as in the kernel
  std::filesystem::path target = path;
  for (int links = 0; links <= kMostLinks; ++links) {
    struct stat info {};
    if (lstat(target.c_str(), &info) != 0) return target.string();  // what is wrong, creating it will say
    if (S_ISLNK(info.st_mode)) {
      std::error_code error;
      const std::filesystem::path link = std::filesystem::read_symlink(target, error);
      if (error) return absl::InternalError(absl::StrCat(target.string(), ": ", error.message()));
      target = target.parent_path() / link;
      continue;
    }
    if (S_ISREG(info.st_mode)) return target.string();
    return absl::FailedPreconditionError(absl::StrCat(
        path, target == path ? "" : absl::StrCat(" is a link to ", target.string(), ", which"), " is ",
        S_ISDIR(info.st_mode)                            ? "a folder"
        : S_ISCHR(info.st_mode) || S_ISBLK(info.st_mode) ? "a device"
        : S_ISFIFO(info.st_mode)                         ? "a pipe"
                                                         : "a socket",
        ": only a regular file can be replaced"));
  }
  return absl::FailedPreconditionError(absl::StrCat(path, ": too many symbolic links"));
}

}  // namespace

absl::Status Writer::WriteFile(const std::string& path, uint32_t alignment) const {
  return WriteFile(path, Options{.alignment = alignment});
}

absl::Status Writer::WriteFile(const std::string& path, const Options& options) const {
  TANDEM_ASSIGN_OR_RETURN(const std::string target, WriteTarget(path));
  const std::string partial = absl::StrCat(target, ".partial-", getpid());
  const int fd = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const auto failed = [&](const char* action, int error) {
    const std::string message = absl::StrCat(partial, ": cannot ", action, ": ", std::strerror(error));
    return error == ENOSPC || error == EDQUOT ? absl::ResourceExhaustedError(message)
           : error == ENOENT                  ? absl::NotFoundError(message)
                                              : absl::InternalError(message);
  };
  if (fd < 0) return failed("create", errno);
  absl::Status status = WriteTo(options, [&](std::span<const uint8_t> bytes) -> absl::Status {
    while (!bytes.empty()) {
      if (options.cancelled && options.cancelled()) {
        return absl::CancelledError(absl::StrCat(path, " is not written"));
      }
      const ssize_t n = write(fd, bytes.data(), std::min<size_t>(bytes.size(), kChunkBytes));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return failed("write", errno);
      bytes = bytes.subspan(static_cast<size_t>(n));
    }
    return absl::OkStatus();
  });
  if (close(fd) != 0 && status.ok()) status = failed("close", errno);
  if (status.ok() && std::rename(partial.c_str(), target.c_str()) != 0) status = failed("rename", errno);
  if (!status.ok()) unlink(partial.c_str());
  return status;
}

}  // namespace tandem::gguf
