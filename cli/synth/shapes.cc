#include "cli/synth/shapes.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace tandem::cli {
namespace {

using gguf::TensorType;
using model::ModelConfig;

ModelConfig R1() {
  ModelConfig c;
  c.vocab_size = 129280;
  c.hidden_size = 7168;
  c.intermediate_size = 18432;
  c.moe_intermediate_size = 2048;
  c.num_hidden_layers = 61;
  c.first_k_dense_replace = 3;
  c.num_attention_heads = 128;
  c.q_lora_rank = 1536;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  c.n_routed_experts = 256;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = 8;
  c.n_group = 8;
  c.topk_group = 4;
  c.scoring_func = model::ScoringFunc::kSigmoid;
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.5;
  c.max_position_embeddings = 163840;
  c.rope_scaling.factor = 40;
  c.rope_scaling.original_max_position_embeddings = 4096;
  c.rope_scaling.mscale_all_dim = 1.0;
  return c;
}

ModelConfig V2Lite() {
  ModelConfig c = R1();
  c.vocab_size = 102400;
  c.hidden_size = 2048;
  c.intermediate_size = 10944;
  c.moe_intermediate_size = 1408;
  c.num_hidden_layers = 27;
  c.first_k_dense_replace = 1;
  c.num_attention_heads = 16;
  c.q_lora_rank = 0;
  c.n_routed_experts = 64;
  c.n_shared_experts = 2;
  c.num_experts_per_tok = 6;
  c.n_group = 1;
  c.topk_group = 1;
  c.scoring_func = model::ScoringFunc::kSoftmax;
  c.norm_topk_prob = false;
  c.routed_scaling_factor = 1.0;
  c.rope_scaling.mscale_all_dim = 0.707;
  return c;
}

ModelConfig Tiny() {
  ModelConfig c = R1();
  c.vocab_size = 512;
  c.hidden_size = 256;
  c.intermediate_size = 512;
  c.moe_intermediate_size = 512;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  c.num_attention_heads = 4;
  c.q_lora_rank = 256;
  c.kv_lora_rank = 256;
  c.qk_nope_head_dim = 32;
  c.qk_rope_head_dim = 32;
  c.v_head_dim = 64;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = 4;
  c.n_group = 4;
  c.topk_group = 2;
  c.max_position_embeddings = 4096;
  c.rope_scaling = {};
  return c;
}

struct NamedScheme {
  const char* name;
  TensorType base;
  TensorType output;
  bool mixed;
  uint64_t file_type;
};
constexpr NamedScheme kSchemes[] = {
    {"q4_k_m", TensorType::kQ4_K, TensorType::kQ6_K, true, 15},
    {"q5_k_m", TensorType::kQ5_K, TensorType::kQ6_K, true, 17},
    {"q2_k", TensorType::kQ2_K, TensorType::kQ6_K, false, 10},
    {"q3_k", TensorType::kQ3_K, TensorType::kQ6_K, false, 11},
    {"q4_k", TensorType::kQ4_K, TensorType::kQ6_K, false, 14},
    {"q5_k", TensorType::kQ5_K, TensorType::kQ6_K, false, 16},
    {"q6_k", TensorType::kQ6_K, TensorType::kQ6_K, false, 18},
    {"q4_0", TensorType::kQ4_0, TensorType::kQ6_K, false, 2},
    {"q5_0", TensorType::kQ5_0, TensorType::kQ6_K, false, 8},
    {"q8_0", TensorType::kQ8_0, TensorType::kQ8_0, false, 7},
    {"f16", TensorType::kF16, TensorType::kF16, false, 1},
    {"bf16", TensorType::kBF16, TensorType::kBF16, false, 32},
    {"f32", TensorType::kF32, TensorType::kF32, false, 0},
};

// The layers whose down projections a mixed scheme raises: the first and the last eighth, and of the others
// every third.
bool IsRaised(int64_t layer, int64_t layers) {
  const int64_t eighth = layers / 8;
  return layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2;
}

TensorType Fitting(TensorType type, int64_t cols) {
  if (cols % gguf::GetTypeInfo(type).block_size == 0) return type;
  if (cols % 32 != 0) return TensorType::kF16;
  switch (type) {
    case TensorType::kQ4_K:
      return TensorType::kQ5_0;
    case TensorType::kQ5_K:
      return TensorType::kQ5_1;
    case TensorType::kQ6_K:
      return TensorType::kQ8_0;
    default:
      return TensorType::kQ4_0;  // Q2_K and Q3_K
  }
}

}  // namespace

std::vector<std::string> ShapeNames() { return {"r1", "v2-lite", "tiny"}; }

absl::StatusOr<ModelConfig> NamedShape(const std::string& name) {
  if (name == "r1") return R1();
  if (name == "v2-lite") return V2Lite();
  if (name == "tiny") return Tiny();
  return absl::InvalidArgumentError(
      absl::StrCat("--shape ", name, ": there are ", absl::StrJoin(ShapeNames(), ", ")));
}

absl::StatusOr<ModelConfig> Resize(ModelConfig c, int64_t n_dense, int64_t n_moe, int64_t n_experts) {
  const int64_t moe = n_moe < 0 ? c.num_moe_layers() : n_moe;
  if (n_dense >= 0) c.first_k_dense_replace = n_dense;
  c.num_hidden_layers = c.first_k_dense_replace + moe;
  if (c.num_hidden_layers == 0) return absl::InvalidArgumentError("a model needs at least one layer");
  if (n_experts < 0 || n_experts == c.n_routed_experts) return c;
  if (n_experts < c.num_experts_per_tok) {
    return absl::InvalidArgumentError(absl::StrCat("--experts ", n_experts, ": a token of this shape uses ",
                                                   c.num_experts_per_tok, " of them"));
  }
  c.n_routed_experts = n_experts;
  // Groups stay where every group keeps at least two experts, which is what its rank is made of.
  if (n_experts % c.n_group != 0 || n_experts / c.n_group < 2 ||
      n_experts / c.n_group * c.topk_group < c.num_experts_per_tok) {
    c.n_group = c.topk_group = 1;
  }
  return c;
}

std::vector<std::string> TypeScheme::Names() {
  std::vector<std::string> names;
  for (const NamedScheme& scheme : kSchemes) names.emplace_back(scheme.name);
  return names;
}

absl::StatusOr<TypeScheme> TypeScheme::Find(const std::string& name) {
  for (const NamedScheme& scheme : kSchemes) {
    if (name != scheme.name) continue;
    TypeScheme out;
    out.base_ = scheme.base;
    out.output_ = scheme.output;
    out.mixed_ = scheme.mixed;
    out.file_type_ = scheme.file_type;
    return out;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--type ", name, ": there are ", absl::StrJoin(Names(), ", ")));
}

TensorType TypeScheme::TypeOf(TensorRole role, int64_t layer, int64_t layers, int64_t cols) const {
  if (role == TensorRole::kOutput) return Fitting(output_, cols);
  if (role == TensorRole::kDown && mixed_ && IsRaised(layer, layers)) return Fitting(TensorType::kQ6_K, cols);
  return Fitting(base_, cols);
}

}  // namespace tandem::cli
