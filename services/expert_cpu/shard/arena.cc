#include "services/expert_cpu/shard/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/topology/limits.h"

namespace tandem::expert {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
#ifdef F_SEAL_FUTURE_WRITE
constexpr int kNoNewWriters = F_SEAL_FUTURE_WRITE;
#else
constexpr int kNoNewWriters = 0x10;
#endif

absl::Status NoMemory(uint64_t bytes, int error) {
  return absl::ResourceExhaustedError(
      absl::StrCat("the system does not give ", bytes, " bytes of memory: ", std::strerror(error)));
}

uint64_t FreeReservedPages() {
  uint64_t free = 0;
  for (const topology::HugePagePool& pool : topology::ReadHugePages().pools) {
    if (pool.page_bytes == kHugePage) free += pool.free;
  }
  return free;
}

bool SharedHugePagesAllowed() {
  const std::string shmem = topology::ReadHugePages().shmem;
  return shmem == "advise" || shmem == "always" || shmem == "within_size" || shmem == "force";
}

}  // namespace

absl::StatusOr<Arena> Arena::Allocate(uint64_t bytes, ArenaKind kind) {
  const auto rounded = CheckedRoundUp<uint64_t>(bytes, kHugePage);
  const auto with_slack = rounded ? CheckedAdd<uint64_t>(*rounded, kHugePage) : std::nullopt;
  if (!with_slack || *with_slack > static_cast<uint64_t>(INT64_MAX)) {
    return absl::ResourceExhaustedError(absl::StrCat(bytes, " bytes are beyond this machine"));
  }
  if (kind == ArenaKind::kAuto) {
    auto reserved = Shared(bytes, *rounded, ArenaKind::kHugeTlb);
    if (reserved.ok()) return reserved;
    kind = SharedHugePagesAllowed() ? ArenaKind::kSharedHuge : ArenaKind::kAnonymous;
  }
  return kind == ArenaKind::kAnonymous ? Anonymous(bytes, *rounded) : Shared(bytes, *rounded, kind);
}

absl::StatusOr<Arena> Arena::Shared(uint64_t bytes, uint64_t rounded, ArenaKind kind) {
  const bool reserved = kind == ArenaKind::kHugeTlb;
  Arena arena;
  arena.fd_ = memfd_create("tandem-experts", MFD_CLOEXEC | MFD_ALLOW_SEALING | (reserved ? MFD_HUGETLB : 0));
  if (arena.fd_ < 0) return NoMemory(bytes, errno);
  if (ftruncate(arena.fd_, static_cast<off_t>(rounded)) != 0) return NoMemory(bytes, errno);
  // Reserved pages are set aside by the mapping: too few of them is an error here, not a signal later.
  void* map = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED | (reserved ? 0 : MAP_NORESERVE),
                   arena.fd_, 0);
  if (map == MAP_FAILED) {
    if (!reserved) return NoMemory(bytes, errno);
    return absl::ResourceExhaustedError(absl::StrCat(rounded / kHugePage,
                                                     " reserved huge pages of 2 MB are needed, ",
                                                     FreeReservedPages(), " are free (vm.nr_hugepages)"));
  }
  if (!reserved) madvise(map, rounded, kind == ArenaKind::kSharedHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  arena.map_ = map;
  arena.map_bytes_ = rounded;
  arena.data_ = static_cast<uint8_t*>(map);
  arena.bytes_ = bytes;
  arena.kind_ = kind;
  return arena;
}

absl::StatusOr<Arena> Arena::Anonymous(uint64_t bytes, uint64_t rounded) {
  Arena arena;
  void* map = mmap(nullptr, rounded + kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return NoMemory(bytes, errno);
  arena.map_ = map;
  arena.map_bytes_ = rounded + kHugePage;
  const auto address = reinterpret_cast<uintptr_t>(map);
  arena.data_ = static_cast<uint8_t*>(map) + (kHugePage - address % kHugePage) % kHugePage;
  arena.bytes_ = bytes;
  madvise(arena.data_, rounded, MADV_HUGEPAGE);  // best effort
  return arena;
}

std::string Arena::Description() const {
  switch (kind_) {
    case ArenaKind::kHugeTlb:
      return "reserved huge pages, shared";
    case ArenaKind::kSharedHuge:
      return "transparent huge pages, shared";
    case ArenaKind::kSharedSmall:
      return "4 KB pages, shared";
    case ArenaKind::kAuto:
    case ArenaKind::kAnonymous:
      break;
  }
  const std::string thp = topology::ReadHugePages().thp;
  return thp == "always" || thp == "madvise" ? "transparent huge pages, private" : "4 KB pages, private";
}

absl::StatusOr<shm::FileDescriptor> Arena::OpenReadOnly() const {
  if (fd_ < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the weights lie in ", Description(),
                     " memory, which no other process can map: reserve huge pages (vm.nr_hugepages), set "
                     "/sys/kernel/mm/transparent_hugepage/shmem_enabled to advise, or say --arena shared"));
  }
  constexpr int kSameSize = F_SEAL_SHRINK | F_SEAL_GROW;
  // This process's own mapping stays writable: a full F_SEAL_WRITE is not to be had beside it.
  if (fcntl(fd_, F_ADD_SEALS, kSameSize | kNoNewWriters) != 0 && fcntl(fd_, F_ADD_SEALS, kSameSize) != 0) {
    return absl::InternalError(absl::StrCat("sealing the weights' memory: ", std::strerror(errno)));
  }
  // Opened anew rather than duplicated: a duplicate would carry the right to write.
  const std::string path = absl::StrCat("/proc/self/fd/", fd_);
  shm::FileDescriptor out(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!out.valid()) return absl::InternalError(absl::StrCat(path, ": ", std::strerror(errno)));
  return out;
}

Arena::~Arena() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
  if (fd_ >= 0) close(fd_);
}

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(map_, other.map_);
  std::swap(map_bytes_, other.map_bytes_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  std::swap(kind_, other.kind_);
  return *this;
}

}  // namespace tandem::expert
