#include "services/attention_gpu/kv/host_pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace tandem::attention {

absl::StatusOr<HostPages> HostPages::Create(int64_t bytes, int64_t page_bytes) {
  TANDEM_CHECK(page_bytes > 0);
  const int64_t pages = bytes / page_bytes;
  if (pages > INT32_MAX) return absl::InvalidArgumentError("more than 2^31 pages");
  HostPages out;
  if (pages <= 0) return out;
  void* p = ::mmap(nullptr, pages * page_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", pages * page_bytes / 1000000,
                                                     " MB of KV pages: ", std::strerror(errno)));
  }
  // Most of what storing a page takes would be the system's work for its pages of 4 KB. A wish, nothing more.
  ::madvise(p, pages * page_bytes, MADV_HUGEPAGE);
  out.data_ = static_cast<std::byte*>(p);
  out.page_bytes_ = page_bytes;
  out.in_use_.assign(pages, false);
  for (int32_t slot = static_cast<int32_t>(pages) - 1; slot >= 0; --slot) out.free_.push_back(slot);
  return out;
}

HostPages::HostPages(HostPages&& other) noexcept { *this = std::move(other); }

HostPages& HostPages::operator=(HostPages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(page_bytes_, other.page_bytes_);
  std::swap(free_, other.free_);
  std::swap(in_use_, other.in_use_);
  return *this;
}

HostPages::~HostPages() {
  if (data_ != nullptr) ::munmap(data_, in_use_.size() * page_bytes_);
}

int32_t HostPages::Take() {
  if (free_.empty()) return -1;
  const int32_t slot = free_.back();
  free_.pop_back();
  in_use_[slot] = true;
  return slot;
}

void HostPages::Give(int32_t slot) {
  TANDEM_CHECK(slot >= 0 && slot < total() && in_use_[slot]);
  in_use_[slot] = false;
  free_.push_back(slot);
}

}  // namespace tandem::attention
