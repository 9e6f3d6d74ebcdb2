// Ids of the KV cache's pages: which are free.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem::attention {

// Not thread-safe: the scheduler's thread owns it.
class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages);

  // Appends `n` pages to `out`, or changes nothing and returns false if fewer are free.
  bool Allocate(int32_t n, std::vector<int32_t>& out);
  // Gives all of them back and empties the list.
  void Release(std::vector<int32_t>& pages);

  int32_t total() const { return static_cast<int32_t>(in_use_.size()); }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }

 private:
  std::vector<int32_t> free_;
  std::vector<bool> in_use_;
};

}  // namespace tandem::attention
