// Handing a file descriptor to another process of the same user: over a Unix socket, against a token that the
// other process was given on another way and that is good once.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/memory.h"

namespace tandem::shm {

// 128 random bits of the kernel's, in hexadecimal. Internal if the kernel has none.
absl::StatusOr<std::string> RandomToken();

// Listens at a path socket (mode 0600) in a thread of its own. Thread-safe.
class HandoverServer {
 public:
  // Replaces a socket file that nobody listens at; AlreadyExists if somebody does, or if it is another kind
  // of file. Peers must run as `uid`.
  static absl::StatusOr<std::unique_ptr<HandoverServer>> Start(const std::string& path, uid_t uid);
  ~HandoverServer();  // removes the socket file

  const std::string& path() const;

  // Keeps a duplicate of `fd` until somebody has come for it. Returns the token.
  absl::StatusOr<std::string> Offer(const FileDescriptor& fd);
  // Nobody has come, and nobody is to. Unknown tokens are ignored.
  void Withdraw(const std::string& token);

 private:
  struct Impl;
  explicit HandoverServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Unavailable: nobody listens at `path`, or it cannot be reached from here (another host, another container);
// PermissionDenied: the peer runs as another user, or refuses this one, or the token; DeadlineExceeded.
absl::StatusOr<FileDescriptor> ReceiveDescriptor(const std::string& path, const std::string& token,
                                                 absl::Duration patience);

}  // namespace tandem::shm
