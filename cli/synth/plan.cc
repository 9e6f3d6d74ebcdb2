#include "cli/synth/plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

using gguf::TensorType;
using model::ModelConfig;

class Planner {
 public:
  Planner(const ModelConfig& config, const TypeScheme& types, bool mla)
      : c_(config), types_(types), mla_(mla) {
    plan_.config = config;
  }

  SynthPlan Run(int64_t alias_layers) {
    // Values are kept at about one everywhere: matrices of 1 / sqrt(inputs) behind norms of one.
    Matrix("token_embd.weight", TensorRole::kEmbedding, {c_.hidden_size, c_.vocab_size});
    plan_.tensors.back().rms = 1.0;
    Vector("output_norm.weight", c_.hidden_size, SynthContent::kOnes);
    Matrix("output.weight", TensorRole::kOutput, {c_.hidden_size, c_.vocab_size});
    for (layer_ = 0; layer_ < c_.num_hidden_layers; ++layer_) {
      block_ = absl::StrCat("blk.", layer_, ".");
      Attention();
      Vector(block_ + "ffn_norm.weight", c_.hidden_size, SynthContent::kOnes);
      if (c_.IsMoe(layer_)) {
        Moe();
      } else {
        Ffn("", c_.intermediate_size);
      }
    }
    Alias(alias_layers);
    for (const SynthTensor& tensor : plan_.tensors) {
      (tensor.alias_of < 0 ? plan_.bytes : plan_.alias_bytes) += tensor.nbytes();
    }
    return std::move(plan_);
  }

 private:
  void Vector(std::string name, int64_t n, SynthContent content) {
    plan_.tensors.push_back(
        {.name = std::move(name), .type = TensorType::kF32, .ne = {n}, .content = content});
  }
  void Matrix(std::string name, TensorRole role, std::vector<int64_t> ne) {
    const TensorType type = types_.TypeOf(role, layer_, c_.num_hidden_layers, ne[0]);
    const double rms = 1 / std::sqrt(static_cast<double>(ne[0]));
    plan_.tensors.push_back({.name = std::move(name), .type = type, .ne = std::move(ne), .rms = rms});
  }

  void Attention() {
    const int64_t heads = c_.num_attention_heads;
    Vector(block_ + "attn_norm.weight", c_.hidden_size, SynthContent::kOnes);
    if (c_.q_lora_rank > 0) {
      Vector(block_ + "attn_q_a_norm.weight", c_.q_lora_rank, SynthContent::kOnes);
      Matrix(block_ + "attn_q_a.weight", TensorRole::kOther, {c_.hidden_size, c_.q_lora_rank});
      Matrix(block_ + "attn_q_b.weight", TensorRole::kOther, {c_.q_lora_rank, heads * c_.qk_head_dim()});
    } else {
      Matrix(block_ + "attn_q.weight", TensorRole::kOther, {c_.hidden_size, heads * c_.qk_head_dim()});
    }
    Vector(block_ + "attn_kv_a_norm.weight", c_.kv_lora_rank, SynthContent::kOnes);
    Matrix(block_ + "attn_kv_a_mqa.weight", TensorRole::kOther, {c_.hidden_size, c_.latent_dim()});
    if (mla_) {
      Matrix(block_ + "attn_k_b.weight", TensorRole::kOther, {c_.qk_nope_head_dim, c_.kv_lora_rank, heads});
      // Applied the other way round in the model: a key's values are sums over the latent ones.
      plan_.tensors.back().rms = 1 / std::sqrt(static_cast<double>(c_.kv_lora_rank));
      Matrix(block_ + "attn_v_b.weight", TensorRole::kOther, {c_.kv_lora_rank, c_.v_head_dim, heads});
    } else {
      Matrix(block_ + "attn_kv_b.weight", TensorRole::kOther,
             {c_.kv_lora_rank, heads * (c_.qk_nope_head_dim + c_.v_head_dim)});
    }
    Matrix(block_ + "attn_output.weight", TensorRole::kOther, {heads * c_.v_head_dim, c_.hidden_size});
  }

  void Ffn(const char* suffix, int64_t inner) {
    Matrix(absl::StrCat(block_, "ffn_gate", suffix, ".weight"), TensorRole::kOther, {c_.hidden_size, inner});
    Matrix(absl::StrCat(block_, "ffn_up", suffix, ".weight"), TensorRole::kOther, {c_.hidden_size, inner});
    Matrix(absl::StrCat(block_, "ffn_down", suffix, ".weight"), TensorRole::kDown, {inner, c_.hidden_size});
  }

  void Moe() {
    const int64_t experts = c_.n_routed_experts, inner = c_.moe_intermediate_size;
    plan_.tensors.push_back({.name = block_ + "ffn_gate_inp.weight",
                             .type = TensorType::kF32,
                             .ne = {c_.hidden_size, experts},
                             .rms = 1 / std::sqrt(static_cast<double>(c_.hidden_size))});
    if (c_.scoring_func == model::ScoringFunc::kSigmoid) {
      Vector(block_ + "exp_probs_b.bias", experts, SynthContent::kZeros);
    }
    Matrix(block_ + "ffn_gate_exps.weight", TensorRole::kOther, {c_.hidden_size, inner, experts});
    gates_.push_back(plan_.tensors.size() - 1);
    Matrix(block_ + "ffn_up_exps.weight", TensorRole::kOther, {c_.hidden_size, inner, experts});
    ups_.push_back(plan_.tensors.size() - 1);
    Matrix(block_ + "ffn_down_exps.weight", TensorRole::kDown, {inner, c_.hidden_size, experts});
    downs_.push_back(plan_.tensors.size() - 1);
    if (c_.n_shared_experts > 0) Ffn("_shexp", c_.n_shared_experts * inner);
  }

  void Alias(int64_t distinct) {
    for (const std::vector<size_t>* stack : {&gates_, &ups_, &downs_}) {
      std::vector<TensorType> types;
      for (const size_t i : *stack) types.push_back(plan_.tensors[i].type);
      const std::vector<size_t> sources = AliasSources(types, distinct);
      for (size_t i = 0; i < sources.size(); ++i) {
        if (sources[i] != i) plan_.tensors[(*stack)[i]].alias_of = static_cast<int64_t>((*stack)[sources[i]]);
      }
    }
  }

  const ModelConfig& c_;
  const TypeScheme& types_;
  const bool mla_;
  SynthPlan plan_;
  std::string block_;  // "blk.3."
  int64_t layer_ = 0;
  std::vector<size_t> gates_, ups_, downs_;  // indices of the experts' tensors
};

}  // namespace

uint64_t SynthTensor::nbytes() const {
  uint64_t rows = 1;
  for (size_t d = 1; d < ne.size(); ++d) rows *= static_cast<uint64_t>(ne[d]);
  return rows * static_cast<uint64_t>(gguf::RowBytes(type, ne[0]));
}

std::vector<size_t> AliasSources(const std::vector<TensorType>& types, int64_t distinct) {
  const auto n = static_cast<int64_t>(types.size());
  std::map<TensorType, std::vector<size_t>> by_type;
  for (size_t i = 0; i < types.size(); ++i) by_type[types[i]].push_back(i);
  std::vector<size_t> sources(types.size());
  int64_t left = distinct <= 0 || distinct > n ? n : distinct;
  auto types_left = static_cast<int64_t>(by_type.size());
  int64_t members_left = n;
  for (const auto& [type, members] : by_type) {
    const auto have = static_cast<int64_t>(members.size());
    // Its share of what is left, rounded; one for it and for each of the types behind it.
    const int64_t share = (2 * left * have + members_left) / (2 * members_left);
    const int64_t keep =
        std::min(std::clamp<int64_t>(share, 1, std::max<int64_t>(1, left - (types_left - 1))), have);
    for (int64_t i = 0; i < have; ++i) {
      sources[members[static_cast<size_t>(i)]] = members[static_cast<size_t>(i % keep)];
    }
    left = std::max<int64_t>(0, left - keep);
    members_left -= have;
    --types_left;
  }
  return sources;
}

absl::StatusOr<SynthPlan> PlanSynth(const ModelConfig& config, const TypeScheme& types, bool mla,
                                    int64_t alias_layers) {
  const int64_t moe = config.num_moe_layers();
  if (alias_layers > moe) {
    return absl::InvalidArgumentError(
        absl::StrCat("--alias-layers ", alias_layers, ": the model has ", moe, " MoE layers"));
  }
  SynthPlan plan = Planner(config, types, mla).Run(alias_layers);
  for (const SynthTensor& tensor : plan.tensors) {
    if (tensor.ne[0] % gguf::GetTypeInfo(tensor.type).block_size != 0) {
      return absl::InvalidArgumentError(absl::StrCat(tensor.name, ": rows of ", tensor.ne[0],
                                                     " values do not fit ",
                                                     std::string(gguf::TypeName(tensor.type))));
    }
  }
  return plan;
}

}  // namespace tandem::cli
