#include "services/attention_gpu/kv/page_allocator.h"

#include "common/base/check.h"

namespace tandem::attention {

PageAllocator::PageAllocator(int32_t pages) : in_use_(pages, false) {
  free_.reserve(pages);
  for (int32_t p = pages - 1; p >= 0; --p) free_.push_back(p);
}

bool PageAllocator::Allocate(int32_t n, std::vector<int32_t>& out) {
  if (n > free()) return false;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t page = free_.back();
    free_.pop_back();
    in_use_[page] = true;
    out.push_back(page);
  }
  return true;
}

void PageAllocator::Release(std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    TANDEM_CHECK(page >= 0 && page < total() && in_use_[page]);
    in_use_[page] = false;
    free_.push_back(page);
  }
  pages.clear();
}

}  // namespace tandem::attention
