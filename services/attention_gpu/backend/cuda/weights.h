// The dense weights in device memory: every matrix in its GGUF type, rows laid out as row_layout.h says. The
// embedding, of which a token takes one row, lies in page-locked memory of the host, where the device reads
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "common/threading/thread_pool.h"
#include "services/attention_gpu/backend/cpu/weights.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

struct DeviceFfn {
  DeviceMatrix gate, up;  // [inner, hidden]
  DeviceMatrix down;      // [hidden, inner]
};

struct DeviceLayer {
  const float* attn_norm = nullptr;  // [hidden]
  DeviceMatrix q;                    // without q_lora only
  DeviceMatrix q_a;                  // [q_lora, hidden]
  const float* q_a_norm = nullptr;
  DeviceMatrix q_b;   // [heads * qk, q_lora]
  DeviceMatrix kv_a;  // [kv_lora + rope, hidden]
  const float* kv_a_norm = nullptr;
  DeviceMatrix k_b;     // of a head: [kv_lora, nope]; the heads' follow each other
  DeviceMatrix v_b;     // of a head: [v, kv_lora]
  DeviceMatrix output;  // [hidden, heads * v]
  const float* ffn_norm = nullptr;
  DeviceFfn ffn;  // dense layers: the FFN; MoE layers: the shared expert
  bool has_ffn = false;
  DeviceMatrix router;                 // [experts, hidden]
  const float* router_bias = nullptr;  // [experts] or null
};

class DeviceWeights {
 public:
  // Bytes of device memory that Load will take. Unimplemented names a tensor whose shape has no kernel.
  static absl::StatusOr<uint64_t> Plan(const gguf::File& file, const model::ModelConfig& config);

  // Uploads everything to the current device. attn_kv_b of older files is split as CpuWeights does; types
  // without a kernel (Q4_1, Q5_1, Q2_K, Q3_K) are widened to F16. `file` is not needed afterwards.
  static absl::StatusOr<std::unique_ptr<DeviceWeights>> Load(const gguf::File& file,
                                                             const model::ModelConfig& config,
                                                             threading::ThreadPool& pool);

  DeviceMatrix embedding;  // [vocab, hidden]; in the host's memory, unless it is the head, too
  const float* output_norm = nullptr;
  DeviceMatrix head;  // [vocab, hidden]; the embedding's memory where the file ties them
  std::vector<DeviceLayer> layers;
  uint64_t bytes() const { return arena_.bytes(); }            // of device memory
  uint64_t host_bytes() const { return host_arena_.bytes(); }  // page-locked

 private:
  DeviceWeights() = default;
  Arena arena_{Arena::Kind::kDevice}, host_arena_{Arena::Kind::kPinnedHost};
  friend class WeightsLoader;
};

}  // namespace tandem::attention::cuda
