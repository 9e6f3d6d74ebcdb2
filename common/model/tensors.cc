#include "common/model/tensors.h"

#include <initializer_list>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status_macros.h"

namespace tandem::model {
namespace {

using gguf::Tensor;
using gguf::TensorType;

class Binder {
 public:
  explicit Binder(const gguf::File& file) : file_(file) {}

  const Tensor* Optional(const std::string& name, std::initializer_list<int64_t> shape) {
    const Tensor* t = file_.FindTensor(name);
    if (t != nullptr) CheckShape(*t, shape);
    return t;
  }
  const Tensor* Required(const std::string& name, std::initializer_list<int64_t> shape) {
    const Tensor* t = Optional(name, shape);
    if (t == nullptr) Fail(absl::NotFoundError(absl::StrCat(file_.path(), ": tensor ", name, " is missing")));
    return t;
  }
  const Tensor* RequiredF32(const std::string& name, std::initializer_list<int64_t> shape) {
    return CheckF32(Required(name, shape));
  }
  const Tensor* OptionalF32(const std::string& name, std::initializer_list<int64_t> shape) {
    return CheckF32(Optional(name, shape));
  }
  // A 3-D weight that some converters store as 2-D with the last two dimensions joined.
  const Tensor* RequiredPerHead(const std::string& name, int64_t in, int64_t out, int64_t heads) {
    const Tensor* t = file_.FindTensor(name);
    if (t != nullptr && t->n_dims == 2) return Required(name, {in, out * heads});
    return Required(name, {in, out, heads});
  }
  const absl::Status& status() const { return status_; }

 private:
  void Fail(const absl::Status& s) {
    if (status_.ok()) status_ = s;
  }
  const Tensor* CheckF32(const Tensor* t) {
    if (t != nullptr && t->type != TensorType::kF32) {
      Fail(absl::InvalidArgumentError(absl::StrCat(file_.path(), ": tensor ", t->name, " has type ",
                                                   std::string(gguf::TypeName(t->type)), ", expected F32")));
    }
    return t;
  }
  void CheckShape(const Tensor& t, std::initializer_list<int64_t> shape) {
    bool same = true;
    size_t i = 0;
    for (int64_t n : shape) same = same && t.ne[i++] == n;
    for (; i < 4; ++i) same = same && t.ne[i] == 1;
    if (!same) {
      Fail(absl::InvalidArgumentError(absl::StrCat(file_.path(), ": tensor ", t.name, " has shape ",
                                                   t.ShapeString(), ", the metadata asks for {",
                                                   absl::StrJoin(shape, ", "), "}")));
    }
  }
  const gguf::File& file_;
  absl::Status status_;
};

void BindAttention(const gguf::File& file, const ModelConfig& c, const std::string& blk, Binder& b,
                   LayerTensors& l) {
  const int64_t heads = c.num_attention_heads;
  l.attn_norm = b.RequiredF32(blk + "attn_norm.weight", {c.hidden_size});
  if (c.q_lora_rank > 0) {
    l.attn_q_a = b.Required(blk + "attn_q_a.weight", {c.hidden_size, c.q_lora_rank});
    l.attn_q_a_norm = b.RequiredF32(blk + "attn_q_a_norm.weight", {c.q_lora_rank});
    l.attn_q_b = b.Required(blk + "attn_q_b.weight", {c.q_lora_rank, heads * c.qk_head_dim()});
  } else {
    l.attn_q = b.Required(blk + "attn_q.weight", {c.hidden_size, heads * c.qk_head_dim()});
  }
  l.attn_kv_a_mqa = b.Required(blk + "attn_kv_a_mqa.weight", {c.hidden_size, c.latent_dim()});
  l.attn_kv_a_norm = b.RequiredF32(blk + "attn_kv_a_norm.weight", {c.kv_lora_rank});
  if (file.FindTensor(blk + "attn_k_b.weight") != nullptr) {
    l.attn_k_b = b.RequiredPerHead(blk + "attn_k_b.weight", c.qk_nope_head_dim, c.kv_lora_rank, heads);
    l.attn_v_b = b.RequiredPerHead(blk + "attn_v_b.weight", c.kv_lora_rank, c.v_head_dim, heads);
  } else {
    l.attn_kv_b =
        b.Required(blk + "attn_kv_b.weight", {c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)});
  }
  l.attn_output = b.Required(blk + "attn_output.weight", {heads * c.v_head_dim, c.hidden_size});
}

DenseFfn BindFfn(Binder& b, const std::string& blk, const std::string& suffix, int64_t hidden,
                 int64_t inner) {
  return {b.Required(blk + "ffn_gate" + suffix + ".weight", {hidden, inner}),
          b.Required(blk + "ffn_up" + suffix + ".weight", {hidden, inner}),
          b.Required(blk + "ffn_down" + suffix + ".weight", {inner, hidden})};
}

std::string Block(int64_t layer) { return absl::StrCat("blk.", layer, "."); }

}  // namespace

absl::StatusOr<ModelTensors> BindTensors(const gguf::File& file, const ModelConfig& c) {
  Binder b(file);
  ModelTensors m;
  m.token_embd = b.Required("token_embd.weight", {c.hidden_size, c.vocab_size});
  m.output_norm = b.RequiredF32("output_norm.weight", {c.hidden_size});
  m.output = b.Optional("output.weight", {c.hidden_size, c.vocab_size});
  if (m.output == nullptr) m.output = m.token_embd;
  for (int64_t i = 0; i < c.num_hidden_layers && b.status().ok(); ++i) {
    const std::string blk = Block(i);
    LayerTensors l;
    BindAttention(file, c, blk, b, l);
    l.ffn_norm = b.RequiredF32(blk + "ffn_norm.weight", {c.hidden_size});
    if (!c.IsMoe(i)) {
      l.dense = BindFfn(b, blk, "", c.hidden_size, c.intermediate_size);
    } else {
      l.ffn_gate_inp = b.Required(blk + "ffn_gate_inp.weight", {c.hidden_size, c.n_routed_experts});
      l.exp_probs_b = b.OptionalF32(blk + "exp_probs_b.bias", {c.n_routed_experts});
      if (c.n_shared_experts > 0) {
        l.shared = BindFfn(b, blk, "_shexp", c.hidden_size, c.n_shared_experts * c.moe_intermediate_size);
      }
    }
    m.layers.push_back(l);
  }
  TANDEM_RETURN_IF_ERROR(b.status());
  return m;
}

absl::StatusOr<ExpertTensors> BindExperts(const gguf::File& file, const ModelConfig& c, int64_t layer) {
  Binder b(file);
  const std::string blk = Block(layer);
  const int64_t hidden = c.hidden_size, inner = c.moe_intermediate_size, experts = c.n_routed_experts;
  ExpertTensors e;
  e.gate_up = b.Optional(blk + "ffn_gate_up_exps.weight", {hidden, 2 * inner, experts});
  if (e.gate_up == nullptr) {
    e.gate = b.Required(blk + "ffn_gate_exps.weight", {hidden, inner, experts});
    e.up = b.Required(blk + "ffn_up_exps.weight", {hidden, inner, experts});
  }
  e.down = b.Required(blk + "ffn_down_exps.weight", {inner, hidden, experts});
  TANDEM_RETURN_IF_ERROR(b.status());
  return e;
}

bool IsRoutedExpertTensor(const std::string& name) { return name.find("_exps.") != std::string::npos; }

}  // namespace tandem::model
