// Attention for many rows of one sequence: keys and values of the heads are made from the latents once
// (K = c W_UK, V = c W_UV; DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2) and every row attends to
// them. A pair of a row and a position then costs 2 (nope + rope + v) operations a head instead of the
// absorbed form's 2 (2 lora + rope), a third to a sixth; against that stand 2 lora (nope + v) for each
// position. Parameters and launchers as in kernels.h; read by the host compiler and by nvcc.
//
// Numerics. Latents and rotated keys are float16, relative to a power of two that is at least the largest
// magnitude in the sequence (`unit`), so that keys and values of a head, which are float16 too, cannot
// overflow unless the weights do; a query of a head likewise, relative to its own. (Latents are normalized:
// their sizes differ little.) Scores and sums are float32, the weights of the softmax float16. Results are
// float16, relative to `unit`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

constexpr int kPrefillRows = 128;  // of a block
constexpr int kPrefillTile = 64;   // positions handled together

// The latents of one sequence in one layer's cache.
struct SequenceCache {
  const void* cache = nullptr;     // the layer's, aligned to 16 bytes
  const int32_t* pages = nullptr;  // of all, and where the sequence's table begins in it
  const int32_t* first_page = nullptr;
  int32_t page_tokens = 0;
  int32_t lora = 0, rope = 0;  // multiples of 8
  CacheType type = kCacheBf16;
};

// *unit = the power of two of positions [0, positions).
cudaError_t LaunchLatentUnit(const SequenceCache& c, int64_t positions, float* unit, cudaStream_t stream);
// Positions [first, first + count) relative to *unit, float16: latents [count, lora], rotated [count, rope].
// Both are aligned to 16 bytes.
cudaError_t LaunchGatherLatents(const SequenceCache& c, int64_t first, int64_t count, const float* unit,
                                uint16_t* latents, uint16_t* rotated, cudaStream_t stream);

// out[h, d, l] = w_h[l, d] as float16 for heads [first_head, first_head + heads) of k_b, whose matrices have
// lora rows of nope values: the weights that make keys from latents.
cudaError_t LaunchTransposeKeys(const DeviceMatrix& w, int64_t first_head, int64_t heads, uint16_t* out,
                                cudaStream_t stream);

// Queries of some heads: the part that meets K as it is, the rest rotated; float16 relative to a power of two
// for each. out_scale times `unit` makes a product with a key a score, as an exponent of 2.
struct PrefillQueryParams {
  const float* rope = nullptr;  // StepRows::rope
  const float* q = nullptr;     // [n, heads, nope + rope]
  float scale = 0;              // of the softmax
  uint16_t* out = nullptr;      // [n, heads, nope + rope], aligned to 16 bytes
  float* out_scale = nullptr;   // [n, heads]
  int64_t n = 0;
  int32_t heads = 0, nope = 0, rope_dim = 0;  // even
};
cudaError_t LaunchPrefillQuery(const PrefillQueryParams& p, cudaStream_t stream);

// Rows [0, n) at positions from first_position on attend to [first, first + count) as far as they see it. A
// row's positions may come in several such calls, in rising order: the first `begins`, the last `ends`, and
// in between `carry` holds sums and state.
struct PrefillAttentionParams {
  const uint16_t* query = nullptr;  // [n, heads, nope + rope]
  const float* query_scale = nullptr;
  const uint16_t* expanded = nullptr;  // [count, heads, nope keys then v values]
  const uint16_t* rotated = nullptr;   // [count, rope]
  const float* unit = nullptr;
  int64_t first_position = 0, n = 0;
  int64_t first = 0, count = 0;
  int32_t heads = 0, nope = 0, rope = 0, v = 0;
  bool begins = true, ends = true;
  float* carry = nullptr;         // [n, heads, v]
  float2* carry_state = nullptr;  // [n, heads]: (largest score, sum of weights)
  uint16_t* out = nullptr;        // row i, head h: v values at i * out_row + h * v
  int64_t out_row = 0;
  float* out_scale = nullptr;  // [n], or null: `unit`, what out is relative to
};
bool PrefillAttentionSupports(int64_t nope, int64_t rope, int64_t v);
cudaError_t PreparePrefillAttention();  // once for the current device, before the first launch
cudaError_t LaunchPrefillAttention(const PrefillAttentionParams& p, cudaStream_t stream);

}  // namespace tandem::attention::cuda
