// The folder of a server's Unix sockets.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace tandem::cli {

// A fresh folder tandem-XXXXXX, mode 0700, under XDG_RUNTIME_DIR or /tmp, short enough for the names of
// sockets and without characters that mean something in their addresses. Gone with the object. A server that
// was killed leaves its folder behind; the next one takes it away: a lock on a file in it, which the kernel
// gives up with the process, tells the dead from the living.
class RuntimeFolder {
 public:
  // PermissionDenied: none can be made; says why for each place.
  static absl::StatusOr<std::unique_ptr<RuntimeFolder>> Make();
  ~RuntimeFolder();
  RuntimeFolder(const RuntimeFolder&) = delete;
  RuntimeFolder& operator=(const RuntimeFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  RuntimeFolder(std::string path, int lock) : path_(std::move(path)), lock_(lock) {}
  const std::string path_;
  const int lock_;  // descriptor, not inherited by children
};

}  // namespace tandem::cli
