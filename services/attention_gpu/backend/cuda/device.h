// The device and its memory, with absl::Status for CUDA's errors. Host code only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::attention::cuda {

// OK, ResourceExhausted (no memory), NotFound (no driver, no device), else Internal; the message names
// `what`.
absl::Status ToStatus(cudaError_t error, std::string_view what);

struct Device {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;
  uint64_t total_bytes = 0;
  uint64_t free_bytes = 0;
};

// Makes device `index` the calling thread's, and checks that this build's kernels run on it. NotFound says
// what is missing: the driver, a device of that number, or its compute capability (8.0 at least).
absl::StatusOr<Device> OpenDevice(int index);

// Pieces of one allocation: asked for first, allocated together. Not copyable; frees what it holds.
class Arena {
 public:
  enum class Kind { kDevice, kPinnedHost };
  explicit Arena(Kind kind) : kind_(kind) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // *p will point to room for n values, aligned to 256 bytes.
  template <typename T>
  void Want(T** p, int64_t n) {
    wants_.push_back(
        {p, bytes_, [](void* slot, void* memory) { *static_cast<T**>(slot) = static_cast<T*>(memory); }});
    bytes_ += (static_cast<uint64_t>(n) * sizeof(T) + 255) / 256 * 256;
  }
  uint64_t bytes() const { return bytes_; }  // of all that was asked for
  absl::Status Allocate(std::string_view what);

 private:
  struct Piece {
    void* slot;
    uint64_t offset;
    void (*set)(void* slot, void* memory);
  };
  const Kind kind_;
  uint64_t bytes_ = 0;
  std::vector<Piece> wants_;
  void* memory_ = nullptr;
};

}  // namespace tandem::attention::cuda
