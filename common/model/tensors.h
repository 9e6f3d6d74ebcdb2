// The tensors of a deepseek2 model by role, with their shapes checked once at start-up.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"

namespace tandem::model {

// Pointers into the gguf::File, which must outlive them. {in, out} is GGUF order: `in` is contiguous.
struct DenseFfn {
  const gguf::Tensor* gate = nullptr;  // {hidden, inner}
  const gguf::Tensor* up = nullptr;    // {hidden, inner}
  const gguf::Tensor* down = nullptr;  // {inner, hidden}
};

struct LayerTensors {
  const gguf::Tensor* attn_norm = nullptr;      // {hidden} F32
  const gguf::Tensor* attn_q = nullptr;         // {hidden, heads * qk_head_dim}, without q_lora only
  const gguf::Tensor* attn_q_a = nullptr;       // {hidden, q_lora_rank}
  const gguf::Tensor* attn_q_a_norm = nullptr;  // {q_lora_rank} F32
  const gguf::Tensor* attn_q_b = nullptr;       // {q_lora_rank, heads * qk_head_dim}: nope, then rope, a head
  const gguf::Tensor* attn_kv_a_mqa = nullptr;  // {hidden, kv_lora_rank + rope}
  const gguf::Tensor* attn_kv_a_norm = nullptr;  // {kv_lora_rank} F32
  // Either the two of the MLA layout (3-D, or the same bytes as 2-D) ...
  const gguf::Tensor* attn_k_b = nullptr;  // {nope, kv_lora_rank, heads}
  const gguf::Tensor* attn_v_b = nullptr;  // {kv_lora_rank, v_head_dim, heads}
  // ... or the one of the legacy layout: {kv_lora_rank, heads * (nope + v)}, nope rows then v rows a head.
  const gguf::Tensor* attn_kv_b = nullptr;
  const gguf::Tensor* attn_output = nullptr;  // {heads * v_head_dim, hidden}
  const gguf::Tensor* ffn_norm = nullptr;     // {hidden} F32
  DenseFfn dense;                             // dense layers
  DenseFfn shared;  // MoE layers with shared experts: inner = n_shared * moe_intermediate
  const gguf::Tensor* ffn_gate_inp = nullptr;  // {hidden, n_routed_experts} router
  const gguf::Tensor* exp_probs_b = nullptr;   // {n_routed_experts} F32, selection bias; may be absent
};

struct ModelTensors {
  const gguf::Tensor* token_embd = nullptr;   // {hidden, vocab}
  const gguf::Tensor* output_norm = nullptr;  // {hidden} F32
  const gguf::Tensor* output = nullptr;       // {hidden, vocab}; token_embd where tied
  std::vector<LayerTensors> layers;
};

// Everything but the routed experts. NotFound / InvalidArgument name the tensor and the shapes.
absl::StatusOr<ModelTensors> BindTensors(const gguf::File& file, const ModelConfig& config);

// The routed experts of one MoE layer: {hidden, inner, experts} twice and {inner, hidden, experts}.
struct ExpertTensors {
  const gguf::Tensor* gate = nullptr;
  const gguf::Tensor* up = nullptr;
  const gguf::Tensor* down = nullptr;
  const gguf::Tensor* gate_up =
      nullptr;  // fused: {hidden, 2 * inner, experts}, gate rows first; then no gate, up
};
absl::StatusOr<ExpertTensors> BindExperts(const gguf::File& file, const ModelConfig& config, int64_t layer);

// "blk.7.ffn_gate_exps.weight": what expert processes hold, by the name alone.
bool IsRoutedExpertTensor(const std::string& name);

}  // namespace tandem::model
