// Forward's attention for many rows of one sequence (prefill_attention.h). A chunk of rows is projected as
// far as what does not depend on the head; then, some heads at a time, queries, keys and values are made and
// attended to; then the output projection takes all heads at once.
#include <algorithm>

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/expanded_heads.h"
#include "services/attention_gpu/backend/cuda/forward.h"

namespace tandem::attention::cuda {

absl::Status Forward::NormAlone(const float* x, const float* weight, float* y, int64_t rows, int64_t cols) {
  RmsNormParams p;
  p.x = x;
  p.x_stride = p.cols = cols;
  p.weight = weight;
  p.eps = static_cast<float>(c_.rms_norm_eps);
  p.y = y;
  p.rows = rows;
  return ToStatus(LaunchRmsNorm(p, stream_), "a norm");
}

absl::Status Forward::ToHalf(const float* x, int64_t rows, int64_t cols, uint16_t* h, float* h_scale) {
  QuantizeParams p;
  p.x = x;
  p.x_stride = p.cols = cols;
  p.rows = rows;
  p.h = h;
  p.h_scale = h_scale;
  return ToStatus(LaunchToHalf(p, stream_), "activations");
}

// A product on the float16 form, also where columns are few.
absl::Status Forward::RunWide(const ProductParams& p) {
  return ToStatus(p.w.type == kF32 ? LaunchMatVec(p, stream_) : LaunchMatMul(p, stream_), "a product");
}

absl::Status Forward::ExpandedAttention(int64_t layer, const AttentionBlock& block) {
  const PrefillLayout at =
      LayOutPrefill(c_, block.count, block.position + block.count, work_.scratch_bytes());
  for (int64_t done = 0; done < block.count; done += at.rows) {
    const Piece rows{block.first + done, std::min(at.rows, block.count - done)};
    TANDEM_RETURN_IF_ERROR(ExpandedChunk(layer, at, rows, block.position + done));
  }
  return absl::OkStatus();
}

// x += attention(norm(x)) for rows of a sequence, the first at `position`.
absl::Status Forward::ExpandedChunk(int64_t layer, const PrefillLayout& at, const Piece& rows,
                                    int64_t position) {
  const DeviceLayer& w = weights_.layers[layer];
  const int64_t wide = std::min(at.wide, work_.FormRows(c_.hidden_size)), heads = c_.num_attention_heads;
  for (int64_t done = 0; done < rows.n; done += wide) {
    TANDEM_RETURN_IF_ERROR(Project(layer, at, {rows.first + done, std::min(wide, rows.n - done)}, done));
  }
  ExpandedRows r;
  r.cache.cache = cache_.Layer(layer);
  r.cache.type = cache_.type;
  r.cache.pages = work_.rows.pages;
  r.cache.first_page = work_.rows.first_page + rows.first;
  r.cache.page_tokens = work_.rows.page_tokens;
  r.cache.lora = static_cast<int32_t>(c_.kv_lora_rank);
  r.cache.rope = static_cast<int32_t>(c_.qk_rope_head_dim);
  r.k_b = w.k_b;
  r.v_b = w.v_b;
  r.rope = work_.RowsFrom(rows.first).rope;
  r.scale = scale_;
  r.position = position;
  r.n = rows.n;
  r.heads = static_cast<int32_t>(heads);
  r.scratch = work_.scratch();
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchExpandedBegin(r, at, stream_), "the latents"));
  for (int64_t head = 0; head < heads; head += at.heads) {
    TANDEM_RETURN_IF_ERROR(MakeQueries(w, at, rows, head));
    TANDEM_RETURN_IF_ERROR(ToStatus(LaunchExpandedHeads(r, at, head, stream_), "attention"));
  }

  ProductParams out;
  out.w = w.output;
  out.x.h = Scratch<uint16_t>(at.attended);
  out.x.h_scale = Scratch<float>(at.attended_scale);
  out.x.cols = heads * c_.v_head_dim;
  out.y = work_.x + rows.first * c_.hidden_size;
  out.y_column = c_.hidden_size;
  out.columns = static_cast<int32_t>(rows.n);
  out.accumulate = true;
  return RunWide(out);
}

// What does not depend on the head: the rows' cache entries, and what their queries are made of, from row
// `done` of the chunk on.
absl::Status Forward::Project(int64_t layer, const PrefillLayout& at, const Piece& rows, int64_t done) {
  const DeviceLayer& w = weights_.layers[layer];
  const int64_t n = rows.n, hidden = c_.hidden_size, width = c_.latent_dim(), q_lora = c_.q_lora_rank;
  TANDEM_RETURN_IF_ERROR(NormAlone(work_.x + rows.first * hidden, w.attn_norm, work_.normed, n, hidden));
  ProductParams p;
  p.x.x = work_.normed;
  p.x.x_stride = p.x.cols = hidden;
  p.columns = static_cast<int32_t>(n);
  float* const low_scale = Scratch<float>(at.low_scale) + done;
  uint16_t* const low = Scratch<uint16_t>(at.low) + done * (q_lora > 0 ? q_lora : hidden);
  uint16_t* const form = q_lora > 0 ? work_.form_h : low;
  float* const form_scale = q_lora > 0 ? work_.form_h_scale : low_scale;
  TANDEM_RETURN_IF_ERROR(ToHalf(work_.normed, n, hidden, form, form_scale));
  p.x.h = form;
  p.x.h_scale = form_scale;
  p.w = w.kv_a;
  p.y = Scratch<float>(at.kv);
  p.y_column = width;
  TANDEM_RETURN_IF_ERROR(RunWide(p));
  if (q_lora > 0) {
    float* const q_a = Scratch<float>(at.q_a);
    p.w = w.q_a;
    p.y = q_a;
    p.y_column = q_lora;
    TANDEM_RETURN_IF_ERROR(RunWide(p));
    TANDEM_RETURN_IF_ERROR(NormAlone(q_a, w.q_a_norm, q_a, n, q_lora));
    TANDEM_RETURN_IF_ERROR(ToHalf(q_a, n, q_lora, low, low_scale));
  }

  CacheWriteParams write;
  write.rows = work_.RowsFrom(rows.first);
  write.kv = Scratch<float>(at.kv);
  write.weight = w.kv_a_norm;
  write.eps = static_cast<float>(c_.rms_norm_eps);
  write.cache = cache_.Layer(layer);
  write.type = cache_.type;
  write.n = n;
  write.lora = static_cast<int32_t>(c_.kv_lora_rank);
  write.rope = static_cast<int32_t>(c_.qk_rope_head_dim);
  return ToStatus(LaunchCacheWrite(write, stream_), "the KV cache");
}

// at.q = the queries of at.heads heads from first_head on, for all rows of the chunk.
absl::Status Forward::MakeQueries(const DeviceLayer& w, const PrefillLayout& at, const Piece& rows,
                                  int64_t first_head) {
  const DeviceMatrix& all = c_.q_lora_rank > 0 ? w.q_b : w.q;
  ProductParams p;
  p.w = all;
  p.w.rows = at.heads * c_.qk_head_dim();
  p.w.data += first_head * c_.qk_head_dim() * all.row_bytes;
  p.x.h = Scratch<uint16_t>(at.low);
  p.x.h_scale = Scratch<float>(at.low_scale);
  p.x.cols = all.cols;
  p.y = Scratch<float>(at.q);
  p.y_column = p.w.rows;
  p.columns = static_cast<int32_t>(rows.n);
  return RunWide(p);
}

}  // namespace tandem::attention::cuda
