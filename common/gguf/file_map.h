// The memory maps of an opened model, for the reader's own files.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/gguf/gguf.h"

namespace tandem::gguf {

// A read-only map of a whole file.
struct File::Map {
  void* address = nullptr;
  size_t size = 0;

  Map() = default;
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;
  ~Map() {
    if (address != nullptr) munmap(address, size);
  }
  std::span<const uint8_t> bytes() const { return {static_cast<const uint8_t*>(address), size}; }
};

}  // namespace tandem::gguf
