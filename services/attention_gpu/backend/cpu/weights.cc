#include "services/attention_gpu/backend/cpu/weights.h"

#include <cstring>

#include "common/base/status_macros.h"
#include "common/quant/quant.h"

namespace tandem::attention {
namespace {

using gguf::TensorType;
using kernels::Matrix;

Matrix MatrixOf(const gguf::Tensor& t) {
  return Matrix::Of(t.type, t.data, t.ne[1] * t.ne[2] * t.ne[3], t.ne[0]);
}
const float* Floats(const gguf::Tensor* t) {
  return t == nullptr ? nullptr : reinterpret_cast<const float*>(t->data);
}

Matrix Rows(const Matrix& m, int64_t begin, int64_t count) {
  Matrix out = m;
  out.data = m.data + begin * m.row_bytes;
  out.rows = count;
  return out;
}

void StoreAs(TensorType type, float value, uint8_t* dst) {
  if (type == TensorType::kF32) {
    std::memcpy(dst, &value, sizeof value);
    return;
  }
  const uint16_t h = type == TensorType::kBF16 ? quant::FloatToBf16(value) : quant::FloatToHalf(value);
  std::memcpy(dst, &h, sizeof h);
}

// attn_kv_b's k rows, [heads][nope][kv_lora], as [heads][kv_lora][nope].
std::vector<uint8_t> TransposeK(const gguf::Tensor& kv_b, const model::ModelConfig& c, TensorType type,
                                threading::ThreadPool& pool) {
  const int64_t lora = c.kv_lora_rank, nope = c.qk_nope_head_dim, per_head = nope + c.v_head_dim;
  const int64_t value_bytes = gguf::RowBytes(type, 1);
  const int64_t row_bytes = gguf::RowBytes(kv_b.type, lora);
  std::vector<uint8_t> out(static_cast<size_t>(c.num_attention_heads) * lora * nope * value_bytes);
  pool.ParallelFor(c.num_attention_heads, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(lora);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t i = 0; i < nope; ++i) {
        quant::Dequantize(kv_b.type, kv_b.data + (h * per_head + i) * row_bytes, row.data(), lora);
        for (int64_t j = 0; j < lora; ++j) {
          StoreAs(type, row[j], out.data() + ((h * lora + j) * nope + i) * value_bytes);
        }
      }
    }
  });
  return out;
}

}  // namespace

absl::StatusOr<CpuWeights> CpuWeights::Load(const gguf::File& file, const model::ModelConfig& c,
                                            kernels::Precision precision, threading::ThreadPool& pool) {
  TANDEM_ASSIGN_OR_RETURN(const model::ModelTensors tensors, model::BindTensors(file, c));
  CpuWeights w;
  w.embedding_type = tensors.token_embd->type;
  w.embedding = MatrixOf(*tensors.token_embd);
  w.output_norm = Floats(tensors.output_norm);
  w.head = MatrixOf(*tensors.output);
  for (const model::LayerTensors& t : tensors.layers) {
    CpuLayer l;
    l.attn_norm = Floats(t.attn_norm);
    if (t.attn_q != nullptr) {
      l.q = MatrixOf(*t.attn_q);
    } else {
      l.q_a = MatrixOf(*t.attn_q_a);
      l.q_a_norm = Floats(t.attn_q_a_norm);
      l.q_b = MatrixOf(*t.attn_q_b);
    }
    l.kv_a = MatrixOf(*t.attn_kv_a_mqa);
    l.kv_a_norm = Floats(t.attn_kv_a_norm);
    const int64_t heads = c.num_attention_heads;
    if (t.attn_kv_b != nullptr) {
      const TensorType type = precision == kernels::Precision::kReference ? TensorType::kF32
                              : t.attn_kv_b->type == TensorType::kBF16    ? TensorType::kBF16
                                                                          : TensorType::kF16;
      w.derived_.push_back(TransposeK(*t.attn_kv_b, c, type, pool));
      const Matrix all_k =
          Matrix::Of(type, w.derived_.back().data(), heads * c.kv_lora_rank, c.qk_nope_head_dim);
      const Matrix all_kv = MatrixOf(*t.attn_kv_b);
      const int64_t per_head = c.qk_nope_head_dim + c.v_head_dim;
      for (int64_t h = 0; h < heads; ++h) {
        l.k_b.push_back(Rows(all_k, h * c.kv_lora_rank, c.kv_lora_rank));
        l.v_b.push_back(Rows(all_kv, h * per_head + c.qk_nope_head_dim, c.v_head_dim));
      }
    } else {
      const Matrix all_k = MatrixOf(*t.attn_k_b);
      const Matrix all_v = MatrixOf(*t.attn_v_b);
      for (int64_t h = 0; h < heads; ++h) {
        l.k_b.push_back(Rows(all_k, h * c.kv_lora_rank, c.kv_lora_rank));
        l.v_b.push_back(Rows(all_v, h * c.v_head_dim, c.v_head_dim));
      }
    }
    l.output = MatrixOf(*t.attn_output);
    l.ffn_norm = Floats(t.ffn_norm);
    const model::DenseFfn& ffn = t.ffn_gate_inp == nullptr ? t.dense : t.shared;
    if (ffn.gate != nullptr) {
      l.ffn = {MatrixOf(*ffn.gate), MatrixOf(*ffn.up), MatrixOf(*ffn.down)};
      l.has_ffn = true;
    }
    if (t.ffn_gate_inp != nullptr) l.router = MatrixOf(*t.ffn_gate_inp);
    l.router_bias = Floats(t.exp_probs_b);
    w.layers.push_back(std::move(l));
  }
  return w;
}

uint64_t CpuWeights::derived_bytes() const {
  uint64_t n = 0;
  for (const auto& d : derived_) n += d.size();
  return n;
}

}  // namespace tandem::attention
