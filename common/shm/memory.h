// A piece of memory that two processes share: a memfd that can never be resized again.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::shm {

// A file descriptor that is closed with its owner.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() { Reset(); }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) {
      Reset();
      fd_ = other.Release();
    }
    return *this;
  }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void Reset();
  absl::StatusOr<FileDescriptor> Duplicate() const;

 private:
  int fd_ = -1;
};

// A mapping, readable and writable, and the descriptor behind it. Since the size is sealed, no access inside
// data() can raise SIGBUS: the other side cannot cut the file, and Create has all of its pages made.
class SharedMemory {
 public:
  // Zeros. `name` shows in /proc/PID/maps. ResourceExhausted: there is no memory for it.
  static absl::StatusOr<SharedMemory> Create(const char* name, uint64_t bytes);
  // Takes over a descriptor that came from another process. FailedPrecondition unless it is a memfd of
  // exactly `bytes`, sealed against shrinking and growing.
  static absl::StatusOr<SharedMemory> Adopt(FileDescriptor fd, uint64_t bytes);

  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;

  std::span<uint8_t> data() const { return {data_, bytes_}; }
  const FileDescriptor& fd() const { return fd_; }

 private:
  static absl::StatusOr<SharedMemory> Map(FileDescriptor fd, uint64_t bytes);

  FileDescriptor fd_;
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace tandem::shm
