// Reads of an opened file: look-ups, typed metadata, fingerprint.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"
#include "common/gguf/file_map.h"
#include "common/gguf/gguf.h"
#include "common/gguf/header_parser.h"

namespace tandem::gguf {
namespace {

absl::string_view View(std::string_view s) { return absl::string_view(s.data(), s.size()); }

std::string TypeText(const Value& value) {
  if (value.type != ValueType::kArray) return std::string(ValueTypeName(value.type));
  return absl::StrCat("array of ", View(ValueTypeName(value.element_type)));
}

absl::Status WrongType(const std::string& path, std::string_view key, const Value& value,
                       std::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": key ", internal::Quoted(key), " is ",
                                                 TypeText(value), " (", value.DebugString(40), "), not ",
                                                 View(wanted)));
}

absl::StatusOr<const Value*> Need(const File& file, std::string_view key) {
  const Value* value = file.Find(key);
  if (value == nullptr) {
    return absl::NotFoundError(
        absl::StrCat(file.path(), ": no key ", internal::Quoted(key), " in the metadata"));
  }
  return value;
}

// FNV-1a over 64 bits; lengths are hashed with the bytes, so that neighbours cannot run into each other.
class Hasher {
 public:
  void Bytes(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ bytes[i]) * 0x100000001b3ull;
  }
  void Add(uint64_t v) { Bytes(&v, sizeof v); }
  void Add(int64_t v) { Bytes(&v, sizeof v); }
  void Add(double v) { Bytes(&v, sizeof v); }
  void Add(bool v) { Add(static_cast<uint64_t>(v)); }
  void Add(const std::string& s) {
    Add(static_cast<uint64_t>(s.size()));
    Bytes(s.data(), s.size());
  }
  template <typename T>
  void Add(const std::vector<T>& values) {
    Add(static_cast<uint64_t>(values.size()));
    for (const auto& v : values) {
      if constexpr (std::is_same_v<T, bool>) {
        Add(static_cast<bool>(v));  // of a vector<bool>: a proxy
      } else {
        Add(v);
      }
    }
  }
  uint64_t state() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325ull;
};

// Two pieces of a tensor: the metadata of a file with other weights (half copied, quantized anew) may be the
// same. The whole would take minutes; of R1's 1025 tensors this is some 2000 page faults.
void AddSamples(std::span<const uint8_t> data, Hasher& hasher) {
  constexpr size_t kSample = 64;
  const size_t size = std::min(kSample, data.size());
  for (const size_t eighths : {3, 7}) {
    hasher.Bytes(data.data() + std::min(data.size() / 8 * eighths, data.size() - size), size);
  }
}

}  // namespace

std::string Value::DebugString(size_t max_length) const {
  return std::visit(
      [&](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return v ? "true" : "false";
        } else if constexpr (std::is_arithmetic_v<T>) {
          return absl::StrCat(v);
        } else if constexpr (std::is_same_v<T, std::string>) {
          std::string text = absl::Utf8SafeCEscape(absl::string_view(v).substr(0, max_length + 4));
          if (text.size() <= max_length && v.size() <= max_length) return text;
          size_t cut = std::min(max_length, text.size());
          while (cut > 0 && (static_cast<uint8_t>(text[cut]) & 0xc0) == 0x80) --cut;  // whole characters only
          return text.substr(0, cut) + "...";
        } else {
          return absl::StrCat("[", v.size(), " ", View(ValueTypeName(element_type)), v.size() == 1 ? "" : "s",
                              "]");
        }
      },
      data);
}

const Value* File::Find(std::string_view key) const {
  const auto it = metadata_index_.find(View(key));
  return it == metadata_index_.end() ? nullptr : &metadata_[it->second].second;
}

const Tensor* File::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(View(name));
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

absl::StatusOr<uint64_t> File::GetUint(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* u = std::get_if<uint64_t>(&value->data)) return *u;
  if (const auto* i = std::get_if<int64_t>(&value->data)) {
    if (*i >= 0) return static_cast<uint64_t>(*i);
    return WrongType(path(), key, *value, "an integer of 0 or above");
  }
  return WrongType(path(), key, *value, "an integer");
}

absl::StatusOr<double> File::GetFloat(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* d = std::get_if<double>(&value->data)) return *d;
  if (const auto* u = std::get_if<uint64_t>(&value->data)) return static_cast<double>(*u);
  if (const auto* i = std::get_if<int64_t>(&value->data)) return static_cast<double>(*i);
  return WrongType(path(), key, *value, "a number");
}

absl::StatusOr<bool> File::GetBool(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* b = std::get_if<bool>(&value->data)) return *b;
  return WrongType(path(), key, *value, "a bool");
}

absl::StatusOr<std::string> File::GetString(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* s = std::get_if<std::string>(&value->data)) return *s;
  return WrongType(path(), key, *value, "a string");
}

absl::StatusOr<std::span<const std::string>> File::GetStrings(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* s = std::get_if<std::vector<std::string>>(&value->data))
    return std::span<const std::string>(*s);
  return WrongType(path(), key, *value, "an array of strings");
}

absl::StatusOr<std::vector<int64_t>> File::GetInts(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* i = std::get_if<std::vector<int64_t>>(&value->data)) return *i;
  if (const auto* u = std::get_if<std::vector<uint64_t>>(&value->data)) {
    for (const uint64_t v : *u) {
      if (v > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return absl::InvalidArgumentError(absl::StrCat(path(), ": key ", internal::Quoted(key), " holds ", v,
                                                       ", above the range of int64"));
      }
    }
    return std::vector<int64_t>(u->begin(), u->end());
  }
  return WrongType(path(), key, *value, "an array of integers");
}

absl::StatusOr<std::vector<double>> File::GetFloats(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* value, Need(*this, key));
  if (const auto* d = std::get_if<std::vector<double>>(&value->data)) return *d;
  if (const auto* u = std::get_if<std::vector<uint64_t>>(&value->data)) {
    return std::vector<double>(u->begin(), u->end());
  }
  if (const auto* i = std::get_if<std::vector<int64_t>>(&value->data)) {
    return std::vector<double>(i->begin(), i->end());
  }
  return WrongType(path(), key, *value, "an array of numbers");
}

std::string File::Fingerprint() const {
  Hasher hasher;
  for (const auto& [key, value] : metadata_) {
    // How the model is cut into files does not make it another model.
    if (absl::StartsWith(key, "split.") || key == "general.alignment") continue;
    hasher.Add(key);
    hasher.Add(static_cast<uint64_t>(value.type));
    std::visit([&](const auto& v) { hasher.Add(v); }, value.data);
  }
  for (const Tensor& tensor : tensors_) {
    hasher.Add(tensor.name);
    hasher.Add(static_cast<uint64_t>(tensor.type));
    for (const int64_t n : tensor.ne) hasher.Add(n);
    hasher.Add(tensor.nbytes);
    // Not tensor.data: whoever opened the file without data is to come to the same value.
    if (!maps_.empty()) {
      AddSamples(maps_[tensor.shard]->bytes().subspan(tensor.file_offset, tensor.nbytes), hasher);
    }
  }
  return absl::StrFormat("%016x", hasher.state());
}

}  // namespace tandem::gguf
