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
  std::vector<float> scores;  // [rows, page_tokens], then maxima and sums
  std::vector<int32_t> seen;  // [rows]
};

// Attention in one layer for some heads of consecutive tokens of one sequence, the first at `position`.
//   query: [tokens, heads, width], the absorbed query (kv_lora) followed by the rotated one (rope), scaled
//   out:   [tokens, heads, kv_lora], the softmax-weighted sums of latents
// A token attends to positions up to its own. Pages are taken in order, each folded into running softmaxes
// (maximum, sum and weighted latents) of all rows, so that a result depends on nothing but the cache's
// contents and its query.
void MlaAttend(const LatentCache& cache, int64_t layer, std::span<const int32_t> page_table, int64_t position,
               int64_t tokens, int64_t heads, int64_t kv_lora, const float* query, float* out,
               MlaScratch& scratch);
// One token.
inline void MlaAttend(const LatentCache& cache, int64_t layer, std::span<const int32_t> page_table,
                      int64_t position, int64_t heads, int64_t kv_lora, const float* query, float* out,
                      MlaScratch& scratch) {
  MlaAttend(cache, layer, page_table, position, 1, heads, kv_lora, query, out, scratch);
}

}  // namespace tandem::attention
