// Hyperparameters of a deepseek2 model, by their Hugging Face names (DeepseekV3Config), read from GGUF
// metadata.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"

namespace tandem::model {

enum class ScoringFunc { kSoftmax, kSigmoid };

// YaRN (Peng et al. 2023) as DeepSeek uses it. factor == 1 means plain RoPE.
struct RopeScaling {
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale_all_dim = 0.0;  // GGUF: rope.scaling.yarn_log_multiplier / 0.1
};

struct ModelConfig {
  std::string name;  // general.name
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;      // of the dense layers
  int64_t moe_intermediate_size = 0;  // of one expert
  int64_t num_hidden_layers = 0;
  int64_t first_k_dense_replace = 0;  // layers [0, this) are dense
  int64_t num_attention_heads = 0;
  int64_t q_lora_rank = 0;  // 0: q is projected directly (V2-Lite, Moonlight)
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;  // 1: no group limit
  int64_t topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1.0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  int64_t max_position_embeddings = 0;
  RopeScaling rope_scaling;
  std::string expert_groups_source;  // for people: where n_group / topk_group come from

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }  // cached values a token and layer
  bool IsMoe(int64_t layer) const { return layer >= first_k_dense_replace; }
  int64_t num_moe_layers() const {
    return n_routed_experts > 0 ? num_hidden_layers - first_k_dense_replace : 0;
  }
};

// How group-limited routing is chosen: "auto" (the file's keys, else config.json beside the file, else
// DeepSeek's own numbers for the shapes of V3/R1 and V2), "off", or "N/M" (N groups, best M kept).
// NotFound / InvalidArgument errors name the key; Unimplemented names an architecture that is not deepseek2.
absl::StatusOr<ModelConfig> ReadModelConfig(const gguf::File& file, std::string_view expert_groups = "auto");

// cos/sin frequencies of the rotary pairs: qk_rope_head_dim / 2 values; angle = position * frequency.
// Low frequencies are interpolated by 1 / factor, high ones kept, with a linear ramp between the pairs that
// turn beta_fast and beta_slow times over the original context. float32, and angles are formed in float32
// too, as the models were trained: at position 100000 that is 0.004 rad away from the exact product.
std::vector<float> RopeFrequencies(const ModelConfig& config);

// Factor of q.k before the softmax: mscale^2 / sqrt(qk_head_dim), mscale = 1 + 0.1 mscale_all_dim ln(factor).
double AttentionScale(const ModelConfig& config);

}  // namespace tandem::model
