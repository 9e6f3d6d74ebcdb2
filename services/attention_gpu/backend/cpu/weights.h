// The dense weights as the CPU backend uses them: views into the model file's map, and what is derived from
// them once at load.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/kernels/kernels.h"
#include "common/model/config.h"
#include "common/model/tensors.h"
#include "common/threading/thread_pool.h"

namespace tandem::attention {

struct CpuFfn {
  kernels::Matrix gate, up;  // [inner, hidden]
  kernels::Matrix down;      // [hidden, inner]
};

struct CpuLayer {
  const float* attn_norm = nullptr;  // [hidden]
  kernels::Matrix q;                 // [heads * qk, hidden], without q_lora only
  kernels::Matrix q_a;               // [q_lora, hidden]
  const float* q_a_norm = nullptr;   // [q_lora]
  kernels::Matrix q_b;               // [heads * qk, q_lora]
  kernels::Matrix kv_a;              // [kv_lora + rope, hidden]
  const float* kv_a_norm = nullptr;  // [kv_lora]
  std::vector<kernels::Matrix> k_b;  // a head: [kv_lora, nope]
  std::vector<kernels::Matrix> v_b;  // a head: [v, kv_lora]
  kernels::Matrix output;            // [hidden, heads * v]
  const float* ffn_norm = nullptr;   // [hidden]
  CpuFfn ffn;                        // dense layers: the FFN; MoE layers: the shared expert
  bool has_ffn = false;
  kernels::Matrix router;              // [experts, hidden]
  const float* router_bias = nullptr;  // [experts] or null
};

class CpuWeights {
 public:
  // `file` must outlive the result. Legacy files (attn_kv_b) are split here: the v rows are used where they
  // lie, the k rows are dequantized and transposed, once, and kept in BF16 where the file has BF16 (exact),
  // in F32 for Precision::kReference, else in F16 (11 bits of mantissa against the 4 to 8 of the blocks).
  static absl::StatusOr<CpuWeights> Load(const gguf::File& file, const model::ModelConfig& config,
                                         kernels::Precision precision, threading::ThreadPool& pool);

  gguf::TensorType embedding_type = gguf::TensorType::kF32;
  kernels::Matrix embedding;  // [vocab, hidden]
  const float* output_norm = nullptr;
  kernels::Matrix head;  // [vocab, hidden]
  std::vector<CpuLayer> layers;

  uint64_t derived_bytes() const;  // memory beside the file's map

 private:
  std::vector<std::vector<uint8_t>> derived_;
};

}  // namespace tandem::attention
