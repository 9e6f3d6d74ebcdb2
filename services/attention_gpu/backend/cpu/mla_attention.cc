#include "services/attention_gpu/backend/cpu/mla_attention.h"

#include <algorithm>
#include <limits>

#include "common/kernels/attention.h"

namespace tandem::attention {

void MlaAttend(const LatentCache& cache, int64_t layer, std::span<const int32_t> page_table, int64_t position,
               int64_t heads, int64_t kv_lora, const float* query, float* out, MlaScratch& scratch) {
  const int64_t page_tokens = cache.page_tokens();
  scratch.scores.resize(heads * (page_tokens + 2));
  float* running_max = scratch.scores.data() + heads * page_tokens;
  float* running_sum = running_max + heads;
  std::fill(running_max, running_max + heads, -std::numeric_limits<float>::infinity());
  std::fill(running_sum, running_sum + heads, 0.0f);
  std::fill(out, out + heads * kv_lora, 0.0f);
  for (int64_t begin = 0; begin <= position; begin += page_tokens) {
    kernels::AttendPage(query, heads, cache.width(), cache.Page(layer, page_table[begin / page_tokens]),
                        std::min(page_tokens, position + 1 - begin), kv_lora, {running_max, running_sum, out},
                        scratch.scores.data());
  }
  for (int64_t h = 0; h < heads; ++h) {
    const float inverse = 1.0f / running_sum[h];
    float* o = out + h * kv_lora;
    for (int64_t j = 0; j < kv_lora; ++j) o[j] *= inverse;
  }
}

}  // namespace tandem::attention
