// Opens a GGUF model: finds the files of a split model, maps them, joins their tensor lists.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/status_macros.h"
#include "common/gguf/file_map.h"
#include "common/gguf/gguf.h"
#include "common/gguf/header_parser.h"

namespace tandem::gguf {

File::File() = default;
File::~File() = default;

namespace {

absl::Status ErrnoStatus(int error, const std::string& path, const char* action) {
  const std::string message = absl::StrCat(path, ": cannot ", action, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InternalError(message);
  }
}

// NAME-00002-of-00009.gguf: prefix "NAME", number 2, count 9.
struct SplitName {
  std::string prefix;
  int number = 0;  // 1-based
  int count = 0;
};

std::optional<SplitName> ParseSplitName(const std::string& path) {
  constexpr size_t kSuffix = sizeof("-00001-of-00009.gguf") - 1;
  if (path.size() <= kSuffix) return std::nullopt;
  const std::string tail = path.substr(path.size() - kSuffix);
  if (tail[0] != '-' || tail.substr(6, 4) != "-of-" || tail.substr(15) != ".gguf") return std::nullopt;
  SplitName out;
  for (int i = 0; i < 5; ++i) {
    const char a = tail[1 + i];
    const char b = tail[10 + i];
    if (a < '0' || a > '9' || b < '0' || b > '9') return std::nullopt;
    out.number = out.number * 10 + (a - '0');
    out.count = out.count * 10 + (b - '0');
  }
  if (out.number < 1 || out.count < 1 || out.number > out.count) return std::nullopt;
  out.prefix = path.substr(0, path.size() - kSuffix);
  return out;
}

std::string MakeSplitName(const SplitName& name, int number) {
  return absl::StrFormat("%s-%05d-of-%05d.gguf", name.prefix, number, name.count);
}

// The one model in a folder: its file, or the first file of its split set.
absl::StatusOr<std::string> ResolveFolder(const std::string& folder) {
  std::error_code error;
  std::filesystem::directory_iterator it(folder, error);
  if (error) return ErrnoStatus(error.value(), folder, "list the folder");
  std::map<std::string, std::string> models;  // what stands for the model -> its (first) file
  for (const std::filesystem::directory_iterator end; it != end; it.increment(error)) {
    if (error) return ErrnoStatus(error.value(), folder, "list the folder");
    const std::string name = it->path().filename().string();
    if (!absl::EndsWith(name, ".gguf") || absl::StartsWith(name, ".")) continue;
    std::error_code ignored;
    if (std::filesystem::is_directory(it->path(), ignored)) continue;
    const std::string path = it->path().string();
    const auto split = ParseSplitName(path);
    const std::string first = split ? MakeSplitName(*split, 1) : path;
    models.emplace(first, first);
  }
  if (error) return ErrnoStatus(error.value(), folder, "list the folder");
  if (models.empty()) {
    return absl::NotFoundError(
        absl::StrCat(folder, ": no .gguf file in this folder (folders below it are not searched)"));
  }
  if (models.size() > 1) {
    std::vector<std::string> names;
    for (const auto& [name, path] : models) {
      if (names.size() == 8) {
        names.push_back("...");
        break;
      }
      names.push_back(std::filesystem::path(name).filename().string());
    }
    return absl::InvalidArgumentError(absl::StrCat(
        folder, ": holds ", models.size(), " models; give the path of one: ", absl::StrJoin(names, ", ")));
  }
  return models.begin()->second;
}

}  // namespace

class Loader {
 public:
  static absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, const File::Options& options);
  static absl::StatusOr<std::unique_ptr<File>> Parse(std::span<const uint8_t> bytes, const std::string& name);

 private:
  static absl::StatusOr<std::unique_ptr<File::Map>> MapFile(const std::string& path);
  // The files of the model that `first`, already loaded as shard 0, belongs to; itself alone if it is not
  // split.
  static absl::StatusOr<std::vector<std::string>> ShardPaths(const File& file, const std::string& first);
  // Appends the tensors of one file. Shard 0 also gives the metadata; the split.no and split.count of others
  // are checked against `count`.
  static absl::Status LoadShard(const std::string& path, int shard, uint64_t count, bool map_data,
                                File* file);
  static absl::Status AdoptTensors(internal::Header header, int shard, const uint8_t* base, File* file);
};

absl::StatusOr<std::unique_ptr<File::Map>> Loader::MapFile(const std::string& path) {
  // O_NONBLOCK: opening a pipe must fail below, not wait for its writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return ErrnoStatus(errno, path, "open");
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return ErrnoStatus(error, path, "stat");
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  auto map = std::make_unique<File::Map>();
  if (info.st_size > 0) {
    void* address = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
      const int error = errno;
      close(fd);
      return ErrnoStatus(error, path, "map");
    }
    map->address = address;
    map->size = static_cast<size_t>(info.st_size);
  }
  close(fd);
  return map;
}

absl::Status Loader::AdoptTensors(internal::Header header, int shard, const uint8_t* base, File* file) {
  file->tensors_.reserve(file->tensors_.size() + header.tensors.size());
  for (Tensor& tensor : header.tensors) {
    tensor.shard = shard;
    tensor.data = base == nullptr ? nullptr : base + tensor.file_offset;
    const auto [it, fresh] = file->tensor_index_.try_emplace(tensor.name, file->tensors_.size());
    if (!fresh) {
      const Tensor& other = file->tensors_[it->second];
      return absl::InvalidArgumentError(absl::StrCat(file->paths_[shard], ": tensor ",
                                                     internal::Quoted(tensor.name), " is also in ",
                                                     file->paths_[other.shard]));
    }
    file->tensors_.push_back(std::move(tensor));
  }
  return absl::OkStatus();
}

absl::Status Loader::LoadShard(const std::string& path, int shard, uint64_t count, bool map_data,
                               File* file) {
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<File::Map> map, MapFile(path));
  TANDEM_ASSIGN_OR_RETURN(internal::Header header, internal::ParseHeader(map->bytes(), path));
  TANDEM_RETURN_IF_ERROR(internal::CheckDataLayout(header, map->size, path));
  file->paths_.push_back(path);
  file->file_bytes_ += map->size;
  const uint8_t* base = map_data ? static_cast<const uint8_t*>(map->address) : nullptr;
  if (shard == 0) {
    file->version_ = header.version;
    file->metadata_ = std::move(header.metadata);
    file->metadata_index_ = std::move(header.metadata_index);
  } else {
    File own;  // for its typed reads of this shard's keys
    own.metadata_ = std::move(header.metadata);
    own.metadata_index_ = std::move(header.metadata_index);
    own.paths_ = {path};
    TANDEM_ASSIGN_OR_RETURN(const uint64_t no, own.GetUint("split.no"));
    TANDEM_ASSIGN_OR_RETURN(const uint64_t own_count, own.GetUint("split.count"));
    if (no != static_cast<uint64_t>(shard)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": split.no is ", no,
                                                     ", but by its name it is shard ", shard,
                                                     " (counted from 0): were the files renamed?"));
    }
    if (own_count != count) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": split.count is ", own_count, ", but ",
                                                     file->path(), " says ", count,
                                                     ": do the files belong together?"));
    }
  }
  TANDEM_RETURN_IF_ERROR(AdoptTensors(std::move(header), shard, base, file));
  file->maps_.push_back(std::move(map));  // without data, too: Fingerprint looks into it
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> Loader::ShardPaths(const File& file, const std::string& first) {
  const auto name = ParseSplitName(first);
  if (file.Find("split.count") == nullptr) {
    if (!name || name->count == 1) return std::vector<std::string>{first};
    return absl::InvalidArgumentError(
        absl::StrCat(first, ": by its name one of ", name->count,
                     " files of a split model, but it has no key 'split.count'"));
  }
  TANDEM_ASSIGN_OR_RETURN(const uint64_t count, file.GetUint("split.count"));
  uint64_t no = 0;
  if (file.Find("split.no") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(no, file.GetUint("split.no"));
  }
  if (no != 0) {
    return absl::InvalidArgumentError(absl::StrCat(first, ": this is shard ", no, " of ", count,
                                                   " (split.no, counted from 0), not the first one",
                                                   name ? absl::StrCat(": open ", MakeSplitName(*name, 1))
                                                        : std::string(": open the first file of the set")));
  }
  if (count <= 1) {  // 0: a split model merged again
    if (name && name->count > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(first, ": by its name one of ", name->count, " files, but split.count is ", count));
    }
    return std::vector<std::string>{first};
  }
  if (!name) {
    return absl::InvalidArgumentError(
        absl::StrCat(first, ": the first of ", count, " files (split.count), but its name does not end in ",
                     absl::StrFormat("-00001-of-%05d.gguf", count), ", so the others cannot be found"));
  }
  if (static_cast<uint64_t>(name->count) != count) {
    return absl::InvalidArgumentError(
        absl::StrCat(first, ": by its name one of ", name->count, " files, but split.count is ", count));
  }
  std::vector<std::string> paths;
  std::vector<std::string> missing;
  for (int i = 1; i <= name->count; ++i) {
    paths.push_back(i == 1 ? first : MakeSplitName(*name, i));
    if (access(paths.back().c_str(), F_OK) != 0) missing.push_back(paths.back());
  }
  if (!missing.empty()) {
    return absl::NotFoundError(absl::StrCat(
        first, ": ", missing.size(), " of ", count,
        " files of the split model are missing: ", missing.front(),
        missing.size() > 1 ? absl::StrCat(" and ", missing.size() - 1, " more") : std::string()));
  }
  return paths;
}

absl::StatusOr<std::unique_ptr<File>> Loader::Open(const std::string& path, const File::Options& options) {
  if (path.empty()) return absl::InvalidArgumentError("the path of the model is empty");
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    const int error = errno;
    return ErrnoStatus(error, path, "open the model");
  }
  std::string first = path;
  if (S_ISDIR(info.st_mode)) {
    TANDEM_ASSIGN_OR_RETURN(first, ResolveFolder(path));
    if (access(first.c_str(), F_OK) != 0) {
      return absl::NotFoundError(
          absl::StrCat(path, ": the first file of the split model is missing: ", first));
    }
  }
  if (const auto name = ParseSplitName(first); name && name->number != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(first, ": this is file ", name->number, " of ", name->count,
                     " of a split model; open the first one: ", MakeSplitName(*name, 1)));
  }
  std::unique_ptr<File> file(new File());
  TANDEM_RETURN_IF_ERROR(LoadShard(first, 0, 0, options.map_data, file.get()));
  TANDEM_ASSIGN_OR_RETURN(const std::vector<std::string> paths, ShardPaths(*file, first));
  for (size_t i = 1; i < paths.size(); ++i) {
    TANDEM_RETURN_IF_ERROR(
        LoadShard(paths[i], static_cast<int>(i), paths.size(), options.map_data, file.get()));
  }
  if (paths.size() > 1 && file->Find("split.tensors.count") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(const uint64_t expected, file->GetUint("split.tensors.count"));
    if (expected != file->tensors_.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(first, ": split.tensors.count is ", expected, ", but the ", paths.size(),
                       " files hold ", file->tensors_.size(), " tensors: do the files belong together?"));
    }
  }
  return file;
}

absl::StatusOr<std::unique_ptr<File>> Loader::Parse(std::span<const uint8_t> bytes, const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(internal::Header header, internal::ParseHeader(bytes, name));
  std::unique_ptr<File> file(new File());
  file->version_ = header.version;
  file->paths_ = {name};
  file->file_bytes_ = bytes.size();
  file->metadata_ = std::move(header.metadata);
  file->metadata_index_ = std::move(header.metadata_index);
  TANDEM_RETURN_IF_ERROR(AdoptTensors(std::move(header), 0, nullptr, file.get()));
  return file;
}

absl::StatusOr<std::unique_ptr<File>> File::Open(const std::string& path, const Options& options) {
  return Loader::Open(path, options);
}

absl::StatusOr<std::unique_ptr<File>> File::ParseHeader(std::span<const uint8_t> bytes,
                                                        const std::string& name) {
  return Loader::Parse(bytes, name);
}

}  // namespace tandem::gguf
