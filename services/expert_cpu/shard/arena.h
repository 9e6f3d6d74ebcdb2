// One stretch of memory for a shard's weights, in huge pages where the kernel gives them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/shm/memory.h"

namespace tandem::expert {

// What lies behind an arena. All but kAnonymous are a memfd, which another process may map.
enum class ArenaKind {
  kAuto,         // the first of the next three that the machine gives huge pages for, else kAnonymous
  kHugeTlb,      // reserved huge pages (vm.nr_hugepages)
  kSharedHuge,   // transparent huge pages of shared memory: needs shmem_enabled = advise or more
  kAnonymous,    // private memory, transparent huge pages where they are enabled
  kSharedSmall,  // shared memory in 4 KB pages: about a tenth slower to read
};

// Owns the memory; movable. Pages are taken from the system at first touch.
class Arena {
 public:
  // ResourceExhausted names the size, and for kHugeTlb how many pages are reserved and free.
  static absl::StatusOr<Arena> Allocate(uint64_t bytes, ArenaKind kind = ArenaKind::kAuto);
  Arena() = default;
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }  // aligned to 2 MiB
  uint64_t bytes() const { return bytes_; }
  ArenaKind kind() const { return kind_; }  // never kAuto
  int fd() const { return fd_; }            // of the memfd, -1 for kAnonymous; weights begin at offset 0
  std::string Description() const;          // "reserved huge pages, shared"

  // A descriptor of the memfd that can only be read from, for another process. From the first one on the file
  // keeps its size and, where the kernel has that seal (Linux 5.1), nobody can map it for writing any more.
  // FailedPrecondition: the memory is private; the message says how to get another kind.
  absl::StatusOr<shm::FileDescriptor> OpenReadOnly() const;

 private:
  static absl::StatusOr<Arena> Shared(uint64_t bytes, uint64_t rounded, ArenaKind kind);
  static absl::StatusOr<Arena> Anonymous(uint64_t bytes, uint64_t rounded);

  void* map_ = nullptr;
  uint64_t map_bytes_ = 0;
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
  int fd_ = -1;
  ArenaKind kind_ = ArenaKind::kAnonymous;
};

}  // namespace tandem::expert
