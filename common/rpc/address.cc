#include "common/rpc/address.h"

#include <grpc/grpc.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace tandem::rpc {

std::optional<std::string> UnixPath(const std::string& address) {
  if (absl::StartsWith(address, "unix:///")) return address.substr(7);
  if (absl::StartsWith(address, "unix:")) return address.substr(5);
  return std::nullopt;
}

absl::Status PrepareUnixPath(const std::string& path) {
  const std::string context = absl::StrCat("cannot listen at unix:", path, ": ");
  sockaddr_un to{};
  if (path.empty()) return absl::InvalidArgumentError(absl::StrCat(context, "the path is empty"));
  if (path.size() >= sizeof to.sun_path) {
    return absl::InvalidArgumentError(absl::StrCat(
        context, "the path has ", path.size(), " characters, the system allows ", sizeof to.sun_path - 1));
  }
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash == 0 ? 1 : slash);
  struct stat info {};
  if (stat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return absl::NotFoundError(absl::StrCat(context, "there is no folder ", folder));
  }
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    return absl::PermissionDeniedError(absl::StrCat(context, "no permission to write in ", folder));
  }
  if (lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) {
    return absl::AlreadyExistsError(absl::StrCat(context, "a file that is not a socket stands there"));
  }
  to.sun_family = AF_UNIX;
  std::memcpy(to.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return absl::InternalError(absl::StrCat(context, std::strerror(errno)));
  const int error = connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0 ? 0 : errno;
  close(fd);
  if (error != ECONNREFUSED && error != ENOENT) {  // also EAGAIN, a full backlog: somebody is there
    return absl::AlreadyExistsError(absl::StrCat(context, "another program listens there"));
  }
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return absl::PermissionDeniedError(
        absl::StrCat(context, "a stale socket cannot be removed: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadPem(const std::string& file, const char* what) {
  errno = 0;
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  if (in) text << in.rdbuf();
  if (!in || in.bad()) {
    return absl::NotFoundError(absl::StrCat("TLS: ", what, " ", file, " cannot be read: ",
                                            errno != 0 ? std::strerror(errno) : "empty or not a file"));
  }
  std::string pem = std::move(text).str();
  if (!absl::StrContains(pem, "-----BEGIN ")) {
    return absl::InvalidArgumentError(absl::StrCat("TLS: ", what, " ", file, " is not in PEM form"));
  }
  return pem;
}

void KeepGrpc() {
  static const bool done = [] {
    grpc_init();  // without its grpc_shutdown
    return true;
  }();
  (void)done;
}

}  // namespace tandem::rpc
