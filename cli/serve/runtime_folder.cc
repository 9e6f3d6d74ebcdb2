#include "cli/serve/runtime_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "tandem-";
constexpr char kLock[] = "/lock";
// sockaddr_un holds 108 bytes; the longest name below the folder is "/attention.sock".
constexpr size_t kLongest = 80;

int Lock(const std::string& folder, int flags) {
  const int fd = open((folder + kLock).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
  if (fd < 0) return -1;
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

// A new folder in `place` with its lock; -1 and errno where there is none. A RemoveStale of another start may
// find the file of a lock before it is taken, and take it away: then EAGAIN.
int MakeFolder(const std::string& place, std::string* folder) {
  *folder = absl::StrCat(place, "/", kPrefix, "XXXXXX");
  if (mkdtemp(folder->data()) == nullptr) return -1;
  const int lock = Lock(*folder, O_CREAT | O_EXCL);
  struct stat info {};
  if (lock < 0 || (fstat(lock, &info) == 0 && info.st_nlink > 0)) return lock;
  close(lock);
  errno = EAGAIN;
  return -1;
}

// gRPC takes a part of such a path for something else: lists of addresses are split at commas, a percent sign
// begins an escape.
bool FitsAddresses(const std::string& place) { return place.find_first_of(",:%") == std::string::npos; }

// Folders of this user in `place` whose lock nobody holds. Ones without a lock file are left alone: they may
// be coming into being, or be something else.
void RemoveStale(const std::string& place) {
  std::error_code error;
  for (fs::directory_iterator it(place, error), end; !error && it != end; it.increment(error)) {
    const std::string path = it->path().string();
    struct stat info {};
    if (it->path().filename().string().rfind(kPrefix, 0) != 0 || lstat(path.c_str(), &info) != 0) continue;
    if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid()) continue;
    const int lock = Lock(path, 0);
    if (lock < 0) continue;
    std::error_code ignored;
    fs::remove_all(path, ignored);
    close(lock);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<RuntimeFolder>> RuntimeFolder::Make() {
  std::vector<std::string> places;
  const char* xdg = std::getenv("XDG_RUNTIME_DIR");
  if (xdg != nullptr && *xdg == '/') places.emplace_back(xdg);
  places.emplace_back("/tmp");
  std::string why;
  for (const std::string& place : places) {
    constexpr size_t kNameSize = 14;  // "/tandem-XXXXXX"
    if (place.size() + kNameSize > kLongest || !FitsAddresses(place)) continue;
    RemoveStale(place);
    std::string folder;
    constexpr int kAttempts = 20;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const int lock = MakeFolder(place, &folder);
      if (lock >= 0) return std::unique_ptr<RuntimeFolder>(new RuntimeFolder(folder, lock));
      if (errno != EAGAIN) break;
    }
    absl::StrAppend(&why, why.empty() ? "" : "; ", place, ": ", std::strerror(errno));
  }
  return absl::PermissionDeniedError(absl::StrCat("no folder for the sockets can be made: ", why));
}

RuntimeFolder::~RuntimeFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  close(lock_);
}

}  // namespace tandem::cli
