// The paged latent (MLA) KV cache in host memory: for each layer and position the normalized latent followed
// by the rotated shared key, float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"

namespace tandem::attention {

struct UnmapFloats {
  size_t bytes = 0;
  void operator()(float* p) const;
};

// Not thread-safe for writes of one position; reads of written positions are.
class LatentCache {
 public:
  // `width` = kv_lora_rank + qk_rope_head_dim. ResourceExhausted says the size if it cannot be had.
  static absl::StatusOr<LatentCache> Create(int64_t layers, int32_t pages, int32_t page_tokens,
                                            int64_t width);

  // [page_tokens, width] of a page.
  float* Page(int64_t layer, int32_t page) { return data_.get() + (layer * pages_ + page) * page_stride_; }
  const float* Page(int64_t layer, int32_t page) const {
    return data_.get() + (layer * pages_ + page) * page_stride_;
  }
  float* Entry(int64_t layer, std::span<const int32_t> page_table, int64_t position) {
    return Page(layer, page_table[position / page_tokens_]) + (position % page_tokens_) * width_;
  }
  // A page's entries in all layers, as bytes in the order of layers.
  int64_t page_bytes() const { return layers_ * page_stride_ * static_cast<int64_t>(sizeof(float)); }
  void CopyOut(int32_t page, std::byte* to) const;
  void CopyIn(const std::byte* from, int32_t page);

  int32_t pages() const { return pages_; }
  int32_t page_tokens() const { return page_tokens_; }
  int64_t width() const { return width_; }

 private:
  std::unique_ptr<float[], UnmapFloats> data_;
  int64_t layers_ = 0;
  int32_t pages_ = 0;
  int32_t page_tokens_ = 0;
  int64_t width_ = 0;
  int64_t page_stride_ = 0;  // floats
};

}  // namespace tandem::attention
