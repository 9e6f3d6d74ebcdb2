#include "services/expert_cpu/shard/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"

namespace tandem::expert {
namespace {
constexpr uint64_t kHugePage = 2 << 20;
}

absl::StatusOr<Arena> Arena::Allocate(uint64_t bytes) {
  Arena arena;
  const auto rounded = CheckedRoundUp<uint64_t>(bytes, kHugePage);
  const auto with_slack = rounded ? CheckedAdd<uint64_t>(*rounded, kHugePage) : std::nullopt;
  if (!with_slack) return absl::ResourceExhaustedError(absl::StrCat(bytes, " bytes are beyond this machine"));
  void* map =
      mmap(nullptr, *with_slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the system does not give ", bytes, " bytes of memory: ", std::strerror(errno)));
  }
  arena.map_ = map;
  arena.map_bytes_ = *with_slack;
  const auto address = reinterpret_cast<uintptr_t>(map);
  arena.data_ = static_cast<uint8_t*>(map) + (kHugePage - address % kHugePage) % kHugePage;
  arena.bytes_ = bytes;
  madvise(arena.data_, *rounded, MADV_HUGEPAGE);  // best effort
  return arena;
}

Arena::~Arena() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(map_, other.map_);
  std::swap(map_bytes_, other.map_bytes_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace tandem::expert
