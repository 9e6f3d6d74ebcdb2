// Reader of GGUF model files, versions 2 and 3, whole or split (shared reference: the GGUF specification;
// split keys split.no, split.count, split.tensors.count).
//
// Everything a file says is checked before it is used: counts against the bytes left, every size with checked
// arithmetic, every tensor against the end of its file. Errors name the file, the key or tensor, and the
// byte.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::gguf {

// Tensor types by their GGUF ids. Only those for which TypeInfo::supported holds can be opened.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

struct TypeInfo {
  std::string_view name;  // "Q4_K"; "unknown" for ids nobody has given out
  uint32_t block_size;    // values in a block; 0 if unsupported
  uint32_t type_size;     // bytes of a block; 0 if unsupported
  bool supported;
};

// Also answers for the types that we know by name but do not support (IQ2_XXS, TQ1_0, MXFP4, ...).
TypeInfo GetTypeInfo(TensorType type);
inline std::string_view TypeName(TensorType type) { return GetTypeInfo(type).name; }

// Bytes of a row of `cols` values; cols must be a multiple of the type's block size.
int64_t RowBytes(TensorType type, int64_t cols);

enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

std::string_view ValueTypeName(ValueType type);

// One metadata value. Integers of every width are held as uint64/int64; `type` keeps what the file said.
struct Value {
  ValueType type = ValueType::kUint32;
  ValueType element_type = ValueType::kUint32;  // of an array
  std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint64_t>, std::vector<int64_t>,
               std::vector<double>, std::vector<bool>, std::vector<std::string>>
      data;

  // For people: "32", "yarn", "[129280 strings]".
  std::string DebugString(size_t max_length = 80) const;
};

struct Tensor {
  std::string name;
  TensorType type = TensorType::kF32;
  uint32_t n_dims = 0;
  int64_t ne[4] = {1, 1, 1, 1};   // ne[0] is contiguous: the input dimension of a weight
  uint64_t nbytes = 0;            // of the whole tensor
  const uint8_t* data = nullptr;  // in the map of its file; nullptr for a header without data
  int shard = 0;                  // which file, 0-based
  uint64_t file_offset = 0;       // of the data in that file

  int64_t cols() const { return ne[0]; }
  int64_t rows() const { return ne[1]; }
  std::string ShapeString() const;  // "{7168, 2048, 256}"
};

// An opened model: the metadata of the first file and the tensors of all of them. Immutable and thread-safe
// after opening; owns the read-only memory maps that Tensor::data points into. The files must not shrink
// while they are mapped: the system answers a read past a new end with SIGBUS.
class File {
 public:
  struct Options {
    bool map_data = true;  // false: metadata and tensor list only, Tensor::data stays nullptr
  };

  // `path`: a single file, the first file of a split model (NAME-00001-of-0000N.gguf), or a folder that holds
  // one of the two. NotFound / InvalidArgument / DataLoss / Unimplemented (a type by name, with a hint).
  static absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, const Options& options);
  static absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path) { return Open(path, Options()); }

  // A header (metadata, tensor list) in memory; used where the metadata travels without the weights.
  // `name` stands in errors for the path. `bytes` is not kept; bytes behind the header are not looked at.
  static absl::StatusOr<std::unique_ptr<File>> ParseHeader(std::span<const uint8_t> bytes,
                                                           const std::string& name);

  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  uint32_t version() const { return version_; }
  const std::string& path() const { return paths_.front(); }
  const std::vector<std::string>& paths() const { return paths_; }  // one a shard
  uint64_t file_bytes() const { return file_bytes_; }               // of all shards

  // Metadata in the order of the file.
  const std::vector<std::pair<std::string, Value>>& metadata() const { return metadata_; }
  const Value* Find(std::string_view key) const;  // nullptr if absent

  // Typed reads. NotFound if absent, InvalidArgument naming the key and both types if it is of another kind.
  // Integers of any width are accepted where they fit the result.
  absl::StatusOr<uint64_t> GetUint(std::string_view key) const;
  absl::StatusOr<double> GetFloat(std::string_view key) const;  // also from integers
  absl::StatusOr<bool> GetBool(std::string_view key) const;
  absl::StatusOr<std::string> GetString(std::string_view key) const;
  absl::StatusOr<std::span<const std::string>> GetStrings(std::string_view key) const;
  absl::StatusOr<std::vector<int64_t>> GetInts(std::string_view key) const;
  absl::StatusOr<std::vector<double>> GetFloats(std::string_view key) const;

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const Tensor* FindTensor(std::string_view name) const;  // nullptr if absent

  // 16 hex digits over metadata, tensor list, sizes and two samples of each tensor (after ParseHeader: of
  // none), not over how the model is split and aligned: tells whether two processes opened the same model.
  std::string Fingerprint() const;

 private:
  struct Map;
  friend class Loader;
  File();

  uint32_t version_ = 0;
  std::vector<std::string> paths_;
  uint64_t file_bytes_ = 0;
  std::vector<std::pair<std::string, Value>> metadata_;
  absl::flat_hash_map<std::string, size_t> metadata_index_;
  std::vector<Tensor> tensors_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
  std::vector<std::unique_ptr<Map>> maps_;
};

// Writes GGUF v3. Tensors are written in the order of their Add calls. Adding a key again replaces its value.
// Not thread-safe.
class Writer {
 public:
  // Fills `out` with the tensor's bytes from byte `offset` on. Called in ascending order; every call starts
  // and ends on whole rows (rows above 8 MiB: on whole blocks).
  using Fill = std::function<void(uint64_t offset, std::span<uint8_t> out)>;

  struct Options {
    uint32_t alignment = 32;  // of tensor data: a power of two, at most 1 MiB
    // Tensors added with the same data pointer and size are written once and share their bytes in the file.
    bool share_equal_data = false;
    // Asked again and again by WriteFile, which stops when it is true; empty: it never is.
    std::function<bool()> cancelled = nullptr;
  };

  // Integers must fit `type`, which must be an integer type; signed and unsigned alike.
  void AddUint(std::string key, uint64_t value, ValueType type = ValueType::kUint32);
  void AddInt(std::string key, int64_t value, ValueType type = ValueType::kInt32);
  void AddFloat(std::string key, float value);
  void AddBool(std::string key, bool value);
  void AddString(std::string key, std::string value);
  void AddStrings(std::string key, std::vector<std::string> values);
  void AddInts(std::string key, std::vector<int32_t> values);
  void AddFloats(std::string key, std::vector<float> values);
  void AddValue(std::string key, Value value);  // copied from another file

  // `data` (nbytes of the shape and type) is not copied and must live until the write; it may be a map of
  // many GB. InvalidArgument for a bad name, shape, type or size, and for a name added before.
  absl::Status AddTensor(std::string name, TensorType type, std::vector<int64_t> ne,
                         std::span<const uint8_t> data);
  // The bytes come from `fill` while the file is written: for tensors that are nowhere in memory.
  absl::Status AddTensor(std::string name, TensorType type, std::vector<int64_t> ne, Fill fill);
  // A tensor of its own name whose bytes are those of `original`, added before, with the same type and shape.
  absl::Status AddAlias(std::string name, std::string_view original);

  // The header alone, tensor data left out and the tensor list empty: what ParseHeader reads.
  std::string SerializeMetadata() const;
  // Written beside `path` first and renamed when complete: neither an error nor Cancelled leaves anything
  // behind. Links are followed; FailedPrecondition where something other than a regular file has the name.
  absl::Status WriteFile(const std::string& path, const Options& options) const;
  absl::Status WriteFile(const std::string& path, uint32_t alignment = 32) const;
  std::string SerializeAll(uint32_t alignment = 32) const;  // for tests

 private:
  struct Pending {
    std::string name;
    TensorType type;
    std::vector<int64_t> ne;
    uint64_t nbytes = 0;
    std::span<const uint8_t> data;
    Fill fill;              // instead of data
    int64_t alias_of = -1;  // index of the tensor whose bytes these are
  };
  struct Plan;
  void Set(std::string key, Value value);
  absl::StatusOr<Pending> Check(std::string name, TensorType type, std::vector<int64_t> ne) const;
  absl::StatusOr<Plan> MakePlan(const Options& options) const;
  std::string SerializeKeyValues(uint64_t n_tensors, uint32_t alignment) const;
  absl::Status WriteTo(const Options& options,
                       const std::function<absl::Status(std::span<const uint8_t>)>& sink) const;

  std::vector<std::pair<std::string, Value>> metadata_;
  absl::flat_hash_map<std::string, size_t> metadata_index_;
  std::vector<Pending> tensors_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
};

}  // namespace tandem::gguf
