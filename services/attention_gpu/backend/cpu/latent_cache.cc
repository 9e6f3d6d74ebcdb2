#include "services/attention_gpu/backend/cpu/latent_cache.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"

namespace tandem::attention {

void UnmapFloats::operator()(float* p) const {
  if (p != nullptr) ::munmap(p, bytes);
}

absl::StatusOr<LatentCache> LatentCache::Create(int64_t layers, int32_t pages, int32_t page_tokens,
                                                int64_t width) {
  const int64_t stride = page_tokens * width;
  const auto entries = CheckedMul<int64_t>(stride, layers);
  const auto values = entries ? CheckedMul<int64_t>(*entries, pages) : std::nullopt;
  const auto bytes = values ? CheckedMul<int64_t>(*values, sizeof(float)) : std::nullopt;
  if (!bytes || *bytes <= 0) return absl::InvalidArgumentError("the KV cache's size is out of range");
  void* p =
      ::mmap(nullptr, *bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for a KV cache of ", *bytes / 1000000,
                                                     " MB: ", std::strerror(errno),
                                                     "; a smaller --ctx needs less"));
  }
  ::madvise(p, *bytes, MADV_HUGEPAGE);
  LatentCache c;
  c.data_ =
      std::unique_ptr<float[], UnmapFloats>(static_cast<float*>(p), UnmapFloats{static_cast<size_t>(*bytes)});
  c.layers_ = layers;
  c.pages_ = pages;
  c.page_tokens_ = page_tokens;
  c.width_ = width;
  c.page_stride_ = stride;
  return c;
}

void LatentCache::CopyOut(int32_t page, std::byte* to) const {
  const size_t bytes = page_stride_ * sizeof(float);
  for (int64_t layer = 0; layer < layers_; ++layer) std::memcpy(to + layer * bytes, Page(layer, page), bytes);
}

void LatentCache::CopyIn(const std::byte* from, int32_t page) {
  const size_t bytes = page_stride_ * sizeof(float);
  for (int64_t layer = 0; layer < layers_; ++layer)
    std::memcpy(Page(layer, page), from + layer * bytes, bytes);
}

}  // namespace tandem::attention
