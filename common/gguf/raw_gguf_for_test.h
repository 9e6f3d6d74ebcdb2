// Puts GGUF bytes together by hand, right or wrong, and keeps a folder for a test. For tests only.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace tandem::gguf {

class RawGguf {
 public:
  explicit RawGguf(uint64_t n_tensors = 0, uint64_t n_kv = 0, uint32_t version = 3) {
    bytes_ = "GGUF";
    Put(version);
    Put(n_tensors);
    Put(n_kv);
  }

  template <typename T>
  RawGguf& Put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  RawGguf& String(const std::string& s) {
    Put<uint64_t>(s.size());
    bytes_ += s;
    return *this;
  }
  // A metadata entry of a scalar type with the given id.
  template <typename T>
  RawGguf& KeyValue(const std::string& key, uint32_t type, T value) {
    return String(key).Put(type).Put(value);
  }
  RawGguf& TensorInfo(const std::string& name, const std::vector<uint64_t>& ne, uint32_t type,
                      uint64_t offset) {
    String(name).Put(static_cast<uint32_t>(ne.size()));
    for (const uint64_t n : ne) Put(n);
    return Put(type).Put(offset);
  }
  RawGguf& PadTo(size_t alignment) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment, '\0');
    return *this;
  }
  RawGguf& Data(size_t count, char fill = 7) {
    bytes_.append(count, fill);
    return *this;
  }
  const std::string& str() const { return bytes_; }

 private:
  std::string bytes_;
};

inline std::span<const uint8_t> AsBytes(const std::string& s) {
  return {reinterpret_cast<const uint8_t*>(s.data()), s.size()};
}

// A folder of its own, removed at the end.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tandem-gguf-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::string Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << bytes;
    return path_ + "/" + name;
  }

 private:
  std::string path_;
};

// The folder of shared test data (TANDEM_SHARED, or ../shared beside the repository); nullopt where absent.
inline std::optional<std::string> SharedFolder() {
  std::vector<std::string> candidates;
  if (const char* shared = std::getenv("TANDEM_SHARED")) candidates.push_back(shared);
  if (const char* source = std::getenv("TANDEM_SOURCE_DIR"))
    candidates.push_back(std::string(source) + "/../shared");
  candidates.push_back("../shared");
  for (const std::string& path : candidates) {
    if (std::filesystem::is_directory(path)) return path;
  }
  return std::nullopt;
}

}  // namespace tandem::gguf
