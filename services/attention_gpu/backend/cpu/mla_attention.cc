#include "services/attention_gpu/backend/cpu/mla_attention.h"

#include <algorithm>
#include <limits>

#include "common/kernels/attention.h"

namespace tandem::attention {

void MlaAttend(const LatentCache& cache, int64_t layer, std::span<const int32_t> page_table, int64_t position,
               int64_t tokens, int64_t heads, int64_t kv_lora, const float* query, float* out,
               MlaScratch& scratch) {
  const int64_t page_tokens = cache.page_tokens(), rows = tokens * heads;
  scratch.scores.resize(rows * (page_tokens + 2));
  scratch.seen.resize(rows);
  float* running_max = scratch.scores.data() + rows * page_tokens;
  float* running_sum = running_max + rows;
  std::fill(running_max, running_max + rows, -std::numeric_limits<float>::infinity());
  std::fill(running_sum, running_sum + rows, 0.0f);
  std::fill(out, out + rows * kv_lora, 0.0f);
  for (int64_t begin = 0; begin < position + tokens; begin += page_tokens) {
    const int64_t n = std::min(page_tokens, position + tokens - begin);
    // Tokens before this one are past their own positions: they see nothing of this page.
    const int64_t first = std::max<int64_t>(0, begin - position);
    const int32_t* seen = nullptr;
    if (begin + n > position + first + 1) {
      for (int64_t t = first; t < tokens; ++t) {
        std::fill_n(scratch.seen.begin() + (t - first) * heads, heads,
                    static_cast<int32_t>(std::min(n, position + t + 1 - begin)));
      }
      seen = scratch.seen.data();
    }
    const int64_t row = first * heads;
    kernels::AttendPage(query + row * cache.width(), rows - row, cache.width(),
                        cache.Page(layer, page_table[begin / page_tokens]), n, seen, kv_lora,
                        {running_max + row, running_sum + row, out + row * kv_lora}, scratch.scores.data());
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = 1.0f / running_sum[r];
    float* o = out + r * kv_lora;
    int64_t j = 0;
    for (; j + 16 <= kv_lora; j += 16) {  // so many that the compiler takes them together
      for (int64_t i = 0; i < 16; ++i) o[j + i] *= inverse;
    }
    for (; j < kv_lora; ++j) o[j] *= inverse;
  }
}

}  // namespace tandem::attention
