// Room in host memory for pages that left the device: slots of one page each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::attention {

// Not thread-safe.
class HostPages {
 public:
  HostPages() = default;  // none
  // As many slots as `bytes` hold. Memory is taken from the system as slots are first written.
  // ResourceExhausted says the size if it cannot be had.
  static absl::StatusOr<HostPages> Create(int64_t bytes, int64_t page_bytes);
  HostPages(HostPages&& other) noexcept;
  HostPages& operator=(HostPages&& other) noexcept;
  ~HostPages();

  int32_t Take();  // a free slot, or -1
  void Give(int32_t slot);
  std::span<std::byte> Data(int32_t slot) {
    return {data_ + slot * page_bytes_, static_cast<size_t>(page_bytes_)};
  }

  int32_t total() const { return static_cast<int32_t>(in_use_.size()); }
  int32_t used() const { return total() - static_cast<int32_t>(free_.size()); }

 private:
  std::byte* data_ = nullptr;
  int64_t page_bytes_ = 0;
  std::vector<int32_t> free_;
  std::vector<bool> in_use_;
};

}  // namespace tandem::attention
