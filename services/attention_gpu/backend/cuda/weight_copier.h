// Copies stretches of host memory that somebody else owns (the experts' arenas) to the device, on a stream of
// its own: straight out of the memory where CUDA takes it as page-locked, else through page-locked buffers
// that a few threads fill.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::attention::cuda {

struct CopyPiece {
  const std::byte* from = nullptr;  // in one of the memories given to Create
  uint8_t* to = nullptr;            // device memory
  uint64_t bytes = 0;
};

// One thread calls Copy and Await.
class WeightCopier {
 public:
  static constexpr uint64_t kMostAtOnce = 64;  // tickets that may be waited for

  struct Options {
    bool page_lock = true;                      // false: always through buffers
    int threads = 0;                            // that fill buffers; 0: half of the CPUs, 8 at most
    uint64_t buffer_bytes = uint64_t{4} << 20;  // of one; there are two for each thread
  };
  // For the current device. The memories must outlive this; they are only read.
  static absl::StatusOr<std::unique_ptr<WeightCopier>> Create(
      const std::vector<std::span<const std::byte>>& memories, const Options& options);
  virtual ~WeightCopier() = default;

  // Copies all pieces, after those of earlier calls and after the device has come past `after` (null: at
  // once). Returns the copy's ticket; they go up by one.
  virtual absl::StatusOr<uint64_t> Copy(std::vector<CopyPiece> pieces, cudaEvent_t after) = 0;
  // What is put on `stream` from now on waits for that copy, which must be one of the last kMostAtOnce.
  virtual absl::Status Await(uint64_t ticket, cudaStream_t stream) = 0;
  // For people: how the bytes travel, and why.
  virtual std::string Description() const = 0;

 protected:
  WeightCopier() = default;
};

}  // namespace tandem::attention::cuda
