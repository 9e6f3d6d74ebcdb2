// One stretch of anonymous memory for a shard's weights, in huge pages where the kernel gives them.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"

namespace tandem::expert {

// Owns the memory; movable. Pages are taken from the system at first touch.
class Arena {
 public:
  // ResourceExhausted names the size.
  static absl::StatusOr<Arena> Allocate(uint64_t bytes);
  Arena() = default;
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }  // aligned to 2 MiB
  uint64_t bytes() const { return bytes_; }

 private:
  void* map_ = nullptr;
  uint64_t map_bytes_ = 0;
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace tandem::expert
