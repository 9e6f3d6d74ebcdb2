#include "services/attention_gpu/backend/cuda/expanded_heads.h"

#include <algorithm>

namespace tandem::attention::cuda {
namespace {

template <typename T>
T* At(const ExpandedRows& r, uint64_t offset) {
  return reinterpret_cast<T*>(r.scratch + offset);
}

// From `count` positions' latents: [count, at.heads, nope keys then v values].
cudaError_t MakeKeysAndValues(const ExpandedRows& r, const PrefillLayout& at, int64_t first_head,
                              int64_t count, cudaStream_t stream) {
  const int64_t lora = r.cache.lora, nope = r.k_b.cols, v = r.v_b.rows;
  ProductParams p;
  p.w = {kF16, At<uint8_t>(r, at.key_weights), nope, lora, 2 * lora};
  p.x.h = At<uint16_t>(r, at.latents);
  p.x.cols = lora;
  p.x_batch = 0;  // all heads have the same latents
  p.y_half = At<uint16_t>(r, at.expanded);
  p.y_batch = nope + v;
  p.y_column = at.heads * (nope + v);
  p.columns = static_cast<int32_t>(count);
  p.batches = static_cast<int32_t>(at.heads);
  const cudaError_t e = LaunchMatMul(p, stream);
  if (e != cudaSuccess) return e;
  p.w = r.v_b;
  p.w.data += first_head * v * r.v_b.row_bytes;
  p.y_half += nope;
  return LaunchMatMul(p, stream);
}

}  // namespace

cudaError_t LaunchExpandedBegin(const ExpandedRows& r, const PrefillLayout& at, cudaStream_t stream) {
  return LaunchLatentUnit(r.cache, r.position + r.n, At<float>(r, at.unit), stream);
}

cudaError_t LaunchExpandedHeads(const ExpandedRows& r, const PrefillLayout& at, int64_t first_head,
                                cudaStream_t stream) {
  PrefillQueryParams query;
  query.rope = r.rope;
  query.q = At<float>(r, at.q);
  query.scale = r.scale;
  query.out = At<uint16_t>(r, at.query);
  query.out_scale = At<float>(r, at.query_scale);
  query.n = r.n;
  query.heads = static_cast<int32_t>(at.heads);
  query.nope = static_cast<int32_t>(r.k_b.cols);
  query.rope_dim = r.cache.rope;
  cudaError_t e = LaunchPrefillQuery(query, stream);
  if (e != cudaSuccess) return e;
  e = LaunchTransposeKeys(r.k_b, first_head, at.heads, At<uint16_t>(r, at.key_weights), stream);
  if (e != cudaSuccess) return e;

  const int64_t tokens = r.position + r.n, v = r.v_b.rows;
  for (int64_t first = 0; first < tokens; first += at.positions) {
    const int64_t count = std::min(at.positions, tokens - first);
    e = LaunchGatherLatents(r.cache, first, count, At<float>(r, at.unit), At<uint16_t>(r, at.latents),
                            At<uint16_t>(r, at.rotated), stream);
    if (e != cudaSuccess) return e;
    e = MakeKeysAndValues(r, at, first_head, count, stream);
    if (e != cudaSuccess) return e;
    PrefillAttentionParams p;
    p.query = query.out;
    p.query_scale = query.out_scale;
    p.expanded = At<uint16_t>(r, at.expanded);
    p.rotated = At<uint16_t>(r, at.rotated);
    p.unit = At<float>(r, at.unit);
    p.first_position = r.position;
    p.n = r.n;
    p.first = first;
    p.count = count;
    p.heads = query.heads;
    p.nope = query.nope;
    p.rope = query.rope_dim;
    p.v = static_cast<int32_t>(v);
    p.begins = first == 0;
    p.ends = first + count == tokens;
    p.carry = At<float>(r, at.carry);
    p.carry_state = At<float2>(r, at.carry_state);
    p.out = At<uint16_t>(r, at.attended) + first_head * v;
    p.out_row = r.heads * v;
    p.out_scale = first_head == 0 ? At<float>(r, at.attended_scale) : nullptr;
    e = LaunchPrefillAttention(p, stream);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace tandem::attention::cuda
