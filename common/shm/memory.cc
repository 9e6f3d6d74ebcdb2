#include "common/shm/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::shm {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr uint64_t kMostBytes = uint64_t{1} << 40;

absl::Status SystemError(const char* what, int error) {
  const std::string message = absl::StrCat("shared memory: ", what, ": ", std::strerror(error));
  if (error == ENOSPC || error == ENOMEM || error == EMFILE || error == ENFILE) {
    return absl::ResourceExhaustedError(message);
  }
  return absl::InternalError(message);
}

}  // namespace

void FileDescriptor::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

absl::StatusOr<FileDescriptor> FileDescriptor::Duplicate() const {
  FileDescriptor copy(fcntl(fd_, F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) return SystemError("dup", errno);
  return copy;
}

absl::StatusOr<SharedMemory> SharedMemory::Create(const char* name, uint64_t bytes) {
  if (bytes == 0 || bytes > kMostBytes) {
    return absl::InvalidArgumentError(absl::StrCat("shared memory of ", bytes, " bytes"));
  }
  FileDescriptor fd(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return SystemError("memfd_create", errno);
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return SystemError("ftruncate", errno);
  // Now, and with an error, rather than at the first access and with a signal.
  int error;
  do {
    error = posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error != 0) return SystemError("fallocate", error);
  if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) return SystemError("sealing", errno);
  return Map(std::move(fd), bytes);
}

absl::StatusOr<SharedMemory> SharedMemory::Adopt(FileDescriptor fd, uint64_t bytes) {
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("shared memory: the descriptor is not a memfd: ", std::strerror(errno)));
  }
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  if ((seals & kNeeded) != kNeeded) {
    return absl::FailedPreconditionError("shared memory: it is not sealed against resizing");
  }
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return SystemError("fstat", errno);
  if (bytes == 0 || info.st_size < 0 || static_cast<uint64_t>(info.st_size) != bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("shared memory: it has ", info.st_size, " bytes, announced are ", bytes));
  }
  return Map(std::move(fd), bytes);
}

absl::StatusOr<SharedMemory> SharedMemory::Map(FileDescriptor fd, uint64_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) return SystemError("mmap", errno);
  SharedMemory out;
  out.fd_ = std::move(fd);
  out.data_ = static_cast<uint8_t*>(data);
  out.bytes_ = bytes;
  return out;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace tandem::shm
