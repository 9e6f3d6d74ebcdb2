#include "common/shm/handover.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::shm {
namespace {

constexpr size_t kTokenBytes = 32;  // hexadecimal characters
constexpr char kGranted = 'y', kRefused = 'n';
constexpr int kPeerMilliseconds = 1000;  // what one peer may take of the server's thread

absl::Status Error(absl::StatusCode code, const std::string& path, const std::string& what) {
  return absl::Status(code, absl::StrCat("ring socket ", path, ": ", what));
}

absl::StatusOr<sockaddr_un> Address(const std::string& path) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof to.sun_path || path.find('\0') != std::string::npos) {
    return Error(absl::StatusCode::kInvalidArgument, path,
                 absl::StrCat("a path of 1 to ", sizeof to.sun_path - 1, " characters is needed"));
  }
  std::memcpy(to.sun_path, path.c_str(), path.size() + 1);
  return to;
}

absl::StatusOr<FileDescriptor> Socket(int flags) {
  FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
  if (!fd.valid()) return absl::InternalError(absl::StrCat("socket: ", std::strerror(errno)));
  return fd;
}

// Whether the peer's process runs as `uid`, by what the kernel says.
bool PeerIs(int fd, uid_t uid) {
  ucred peer{};
  socklen_t length = sizeof peer;
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && length == sizeof peer &&
         peer.uid == uid;
}

void SetTimeouts(int fd, int milliseconds) {
  const timeval t{milliseconds / 1000, (milliseconds % 1000) * 1000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
}

// A socket file that nobody listens at is removed.
absl::Status RemoveStale(const std::string& path, const sockaddr_un& address) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) {
    return Error(absl::StatusCode::kAlreadyExists, path, "a file that is not a socket stands there");
  }
  TANDEM_ASSIGN_OR_RETURN(const FileDescriptor probe, Socket(SOCK_NONBLOCK));
  if (connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
      (errno != ECONNREFUSED && errno != ENOENT)) {
    return Error(absl::StatusCode::kAlreadyExists, path, "another process listens there");
  }
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return Error(absl::StatusCode::kPermissionDenied, path, std::strerror(errno));
  }
  return absl::OkStatus();
}

// One byte, with a descriptor beside it if `passed` is one.
bool SendAnswer(int socket, char answer, int passed) {
  iovec data{&answer, 1};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (passed >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &passed, sizeof passed);
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL) == 1;
}

}  // namespace

absl::StatusOr<std::string> RandomToken() {
  unsigned char random[kTokenBytes / 2];
  if (getrandom(random, sizeof random, 0) != static_cast<ssize_t>(sizeof random)) {
    return absl::InternalError("no random numbers from the kernel");
  }
  std::string out;
  for (const unsigned char byte : random) absl::StrAppend(&out, absl::Hex(byte, absl::kZeroPad2));
  return out;
}

struct HandoverServer::Impl {
  std::string path;
  uid_t uid = 0;
  FileDescriptor listener;
  FileDescriptor stop;
  std::mutex mutex;
  std::map<std::string, FileDescriptor> offers;  // by token
  std::thread thread;

  void Loop() {
    for (;;) {
      pollfd wait[2] = {{listener.get(), POLLIN, 0}, {stop.get(), POLLIN, 0}};
      if (poll(wait, 2, -1) < 0 && errno != EINTR) return;
      if (wait[1].revents != 0) return;
      if (wait[0].revents == 0) continue;
      const FileDescriptor peer(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (peer.valid()) {
        Serve(peer.get());
      } else if (errno == EMFILE || errno == ENFILE) {
        poll(wait + 1, 1, 50);  // until descriptors are free again
      }
    }
  }

  void Serve(int peer) {
    SetTimeouts(peer, kPeerMilliseconds);
    char token[kTokenBytes];
    if (!PeerIs(peer, uid) ||
        recv(peer, token, sizeof token, MSG_WAITALL) != static_cast<ssize_t>(sizeof token)) {
      SendAnswer(peer, kRefused, -1);
      return;
    }
    FileDescriptor fd;
    {
      const std::lock_guard lock(mutex);
      const auto it = offers.find(std::string(token, sizeof token));
      if (it != offers.end()) {
        fd = std::move(it->second);
        offers.erase(it);
      }
    }
    SendAnswer(peer, fd.valid() ? kGranted : kRefused, fd.get());
  }
};

HandoverServer::HandoverServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<HandoverServer>> HandoverServer::Start(const std::string& path, uid_t uid) {
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  TANDEM_RETURN_IF_ERROR(RemoveStale(path, address));
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  impl->uid = uid;
  TANDEM_ASSIGN_OR_RETURN(impl->listener, Socket(SOCK_NONBLOCK));
  impl->stop = FileDescriptor(eventfd(0, EFD_CLOEXEC));
  // The mode of the socket becomes that of the file, which so is never open to others, not for a moment.
  if (!impl->stop.valid() || fchmod(impl->listener.get(), 0600) != 0 ||
      bind(impl->listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      listen(impl->listener.get(), 16) != 0) {
    return Error(errno == EACCES ? absl::StatusCode::kPermissionDenied : absl::StatusCode::kUnavailable, path,
                 std::strerror(errno));
  }
  impl->thread = std::thread([server = impl.get()] { server->Loop(); });
  return std::unique_ptr<HandoverServer>(new HandoverServer(std::move(impl)));
}

HandoverServer::~HandoverServer() {
  eventfd_write(impl_->stop.get(), 1);
  impl_->thread.join();
  unlink(impl_->path.c_str());
}

const std::string& HandoverServer::path() const { return impl_->path; }

absl::StatusOr<std::string> HandoverServer::Offer(const FileDescriptor& fd) {
  TANDEM_ASSIGN_OR_RETURN(FileDescriptor copy, fd.Duplicate());
  TANDEM_ASSIGN_OR_RETURN(std::string token, RandomToken());
  const std::lock_guard lock(impl_->mutex);
  impl_->offers[token] = std::move(copy);
  return token;
}

void HandoverServer::Withdraw(const std::string& token) {
  const std::lock_guard lock(impl_->mutex);
  impl_->offers.erase(token);
}

absl::StatusOr<FileDescriptor> ReceiveDescriptor(const std::string& path, const std::string& token,
                                                 absl::Duration patience) {
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  if (token.size() != kTokenBytes) {
    return Error(absl::StatusCode::kInvalidArgument, path, "the token has another length");
  }
  TANDEM_ASSIGN_OR_RETURN(const FileDescriptor fd, Socket(0));
  SetTimeouts(fd.get(), static_cast<int>(absl::ToInt64Milliseconds(
                            std::clamp(patience, absl::Milliseconds(1), absl::Hours(1)))));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return Error(errno == EACCES ? absl::StatusCode::kPermissionDenied : absl::StatusCode::kUnavailable, path,
                 std::strerror(errno));
  }
  if (!PeerIs(fd.get(), geteuid())) {
    return Error(absl::StatusCode::kPermissionDenied, path, "its owner is another user");
  }
  if (send(fd.get(), token.data(), token.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(token.size())) {
    return Error(absl::StatusCode::kUnavailable, path, "the token could not be sent");
  }
  char answer = 0;
  iovec data{&answer, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(fd.get(), &message, MSG_CMSG_CLOEXEC);
  const int error = errno;
  // Whatever came is closed, if it is not the one descriptor that was to come.
  FileDescriptor received;
  int count = 0;
  for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr && got >= 0; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = CMSG_LEN(0); at + sizeof(int) <= h->cmsg_len; at += sizeof(int)) {
      int passed;
      std::memcpy(&passed, reinterpret_cast<const char*>(h) + at, sizeof passed);
      received = FileDescriptor(passed);
      ++count;
    }
  }
  if (got < 0 && (error == EAGAIN || error == EWOULDBLOCK)) {
    return Error(absl::StatusCode::kDeadlineExceeded, path, "no answer");
  }
  if (got != 1) return Error(absl::StatusCode::kUnavailable, path, "it was closed without an answer");
  if (answer != kGranted || count != 1) {
    return Error(absl::StatusCode::kPermissionDenied, path, "the region was refused");
  }
  return received;
}

}  // namespace tandem::shm
