// Absorbed MLA attention over the paged latent cache (DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2:
// W_UK and W_UV are moved to the query's and the output's side).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "services/attention_gpu/backend/cpu/latent_cache.h"

namespace tandem::attention {

// Scratch of one worker; grows as needed, reused.
struct MlaScratch {
  std::vector<float> scores;  // [heads, page_tokens], then maxima and sums
};

// One token's attention in one layer.
//   query: [heads, width], the absorbed query (kv_lora) followed by the rotated one (rope), already scaled
//   out:   [heads, kv_lora], the softmax-weighted sum of latents
// Attends to positions [0, position]. Pages are taken in order, each folded into a running softmax (maximum,
// sum and weighted latents), so that the result depends on nothing but the cache's contents and the query.
void MlaAttend(const LatentCache& cache, int64_t layer, std::span<const int32_t> page_table, int64_t position,
               int64_t heads, int64_t kv_lora, const float* query, float* out, MlaScratch& scratch);

}  // namespace tandem::attention
