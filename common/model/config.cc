#include "common/model/config.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numbers>
#include <optional>

#include <nlohmann/json.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/status_macros.h"

namespace tandem::model {
namespace {

constexpr char kPrefix[] = "deepseek2.";
constexpr int64_t kMaxSize = int64_t{1} << 24;  // no dimension of a real model is near it: products fit int64

// Reads keys under the architecture's prefix; the first error is kept and later reads return zero.
class KeyReader {
 public:
  explicit KeyReader(const gguf::File& file) : file_(file) {}

  int64_t Size(std::string_view key) {
    std::optional<int64_t> v = OptionalSize(key);
    if (!v && status_.ok()) {
      status_ = absl::NotFoundError(absl::StrCat(file_.path(), ": metadata key ", Full(key), " is missing"));
    }
    return v.value_or(0);
  }
  std::optional<int64_t> OptionalSize(std::string_view key) {
    if (file_.Find(Full(key)) == nullptr) return std::nullopt;
    auto v = file_.GetUint(Full(key));
    if (!v.ok()) {
      Keep(v.status());
      return std::nullopt;
    }
    if (*v > static_cast<uint64_t>(kMaxSize)) {
      Keep(absl::InvalidArgumentError(
          absl::StrCat(file_.path(), ": metadata key ", Full(key), " = ", *v, " is larger than ", kMaxSize)));
      return std::nullopt;
    }
    return static_cast<int64_t>(*v);
  }
  std::optional<double> OptionalFloat(std::string_view key) {
    if (file_.Find(Full(key)) == nullptr) return std::nullopt;
    auto v = file_.GetFloat(Full(key));
    if (!v.ok()) {
      Keep(v.status());
      return std::nullopt;
    }
    if (!std::isfinite(*v)) {
      Keep(absl::InvalidArgumentError(
          absl::StrCat(file_.path(), ": metadata key ", Full(key), " is not finite")));
      return std::nullopt;
    }
    return *v;
  }
  std::optional<bool> OptionalBool(std::string_view key) {
    if (file_.Find(Full(key)) == nullptr) return std::nullopt;
    auto v = file_.GetBool(Full(key));
    if (!v.ok()) {
      Keep(v.status());
      return std::nullopt;
    }
    return *v;
  }
  void Keep(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }
  const absl::Status& status() const { return status_; }

 private:
  static std::string Full(std::string_view key) { return std::string(kPrefix) + std::string(key); }
  const gguf::File& file_;
  absl::Status status_;
};

absl::Status CheckRange(const gguf::File& file, std::string_view what, int64_t value, int64_t low,
                        int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file.path(), ": ", std::string(what), " = ", value,
                                                 " is not between ", low, " and ", high));
}

struct Groups {
  int64_t n_group = 1;
  int64_t topk_group = 1;
};

// n_group and topk_group of a Hugging Face config.json in the model's folder.
absl::StatusOr<std::optional<Groups>> GroupsFromConfigJson(const gguf::File& file) {
  const std::filesystem::path path = std::filesystem::path(file.path()).parent_path() / "config.json";
  std::ifstream in(path);
  if (!in) return std::nullopt;
  const nlohmann::json j = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (j.is_discarded() || !j.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path.string(), ": not a JSON object; remove it or give --expert-groups"));
  }
  if (!j.contains("n_group") || !j.contains("topk_group")) return std::nullopt;
  if (j["n_group"].is_null() || j["topk_group"].is_null()) return Groups{};
  if (!j["n_group"].is_number_integer() || !j["topk_group"].is_number_integer()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path.string(), ": n_group and topk_group must be integers"));
  }
  return Groups{j["n_group"].get<int64_t>(), j["topk_group"].get<int64_t>()};
}

absl::Status ReadGroups(const gguf::File& file, std::string_view choice, KeyReader& keys, ModelConfig& c) {
  Groups g;
  if (choice == "off") {
    c.expert_groups_source = "off (flag)";
  } else if (choice != "auto") {
    const std::vector<std::string> parts = absl::StrSplit(std::string(choice), '/');
    if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &g.n_group) ||
        !absl::SimpleAtoi(parts[1], &g.topk_group)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--expert-groups ", std::string(choice), ": expected auto, off or N/M such as 8/4"));
    }
    c.expert_groups_source = "flag";
  } else {
    const auto n = keys.OptionalSize("expert_group_count");
    const auto m = keys.OptionalSize("expert_group_used_count");
    TANDEM_RETURN_IF_ERROR(keys.status());
    if (n && m) {
      g = {std::max<int64_t>(*n, 1), std::max<int64_t>(*m, 1)};
      c.expert_groups_source = "file";
    } else {
      TANDEM_ASSIGN_OR_RETURN(std::optional<Groups> from_json, GroupsFromConfigJson(file));
      if (from_json) {
        g = *from_json;
        c.expert_groups_source = "config.json";
      } else if (c.scoring_func == ScoringFunc::kSigmoid && c.hidden_size == 7168 &&
                 c.n_routed_experts == 256) {
        g = {8, 4};
        c.expert_groups_source = "known shape (DeepSeek-V3/R1)";
      } else if (c.scoring_func == ScoringFunc::kSoftmax && c.hidden_size == 5120 &&
                 c.n_routed_experts == 160) {
        g = {8, 3};
        c.expert_groups_source = "known shape (DeepSeek-V2)";
      } else {
        c.expert_groups_source = "none in the file";
      }
    }
  }
  c.n_group = g.n_group;
  c.topk_group = g.topk_group;
  if (c.n_group < 1 || c.topk_group < 1 || c.topk_group > c.n_group || c.n_routed_experts % c.n_group != 0 ||
      c.topk_group * (c.n_routed_experts / c.n_group) < c.num_experts_per_tok) {
    return absl::InvalidArgumentError(
        absl::StrCat("expert groups ", c.n_group, "/", c.topk_group, " (", c.expert_groups_source,
                     ") do not fit ", c.n_routed_experts, " experts, ", c.num_experts_per_tok, " per token"));
  }
  return absl::OkStatus();
}

absl::Status ReadHeads(const gguf::File& file, KeyReader& keys, ModelConfig& c) {
  c.qk_rope_head_dim = keys.Size("rope.dimension_count");
  // The MLA layout states the head sizes of the absorbed form in key_length / value_length and the plain ones
  // in *_mla; files of before have the plain ones alone.
  const auto key_mla = keys.OptionalSize("attention.key_length_mla");
  const auto value_mla = keys.OptionalSize("attention.value_length_mla");
  const int64_t key = key_mla ? *key_mla : keys.Size("attention.key_length");
  c.v_head_dim = value_mla ? *value_mla : keys.Size("attention.value_length");
  TANDEM_RETURN_IF_ERROR(keys.status());
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.rope.dimension_count", c.qk_rope_head_dim, 2, 1024));
  if (c.qk_rope_head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": deepseek2.rope.dimension_count = ", c.qk_rope_head_dim, " is odd"));
  }
  c.qk_nope_head_dim = key - c.qk_rope_head_dim;
  TANDEM_RETURN_IF_ERROR(
      CheckRange(file, "deepseek2.attention.key_length less the rotary part", c.qk_nope_head_dim, 1, 4096));
  return CheckRange(file, "deepseek2.attention.value_length", c.v_head_dim, 1, 4096);
}

absl::Status ReadRope(const gguf::File& file, KeyReader& keys, ModelConfig& c) {
  c.rope_theta = keys.OptionalFloat("rope.freq_base").value_or(10000.0);
  if (!(c.rope_theta > 1.0)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": deepseek2.rope.freq_base must be above 1"));
  }
  if (file.Find("deepseek2.rope.scaling.type") == nullptr) return keys.status();
  TANDEM_ASSIGN_OR_RETURN(const std::string type, file.GetString("deepseek2.rope.scaling.type"));
  if (type == "none") return keys.status();
  if (type != "yarn") {
    return absl::UnimplementedError(absl::StrCat(file.path(), ": deepseek2.rope.scaling.type is \"", type,
                                                 "\"; only yarn and none are known"));
  }
  RopeScaling& r = c.rope_scaling;
  r.factor = keys.OptionalFloat("rope.scaling.factor").value_or(1.0);
  r.original_max_position_embeddings = keys.Size("rope.scaling.original_context_length");
  r.beta_fast = keys.OptionalFloat("rope.scaling.yarn_beta_fast").value_or(32.0);
  r.beta_slow = keys.OptionalFloat("rope.scaling.yarn_beta_slow").value_or(1.0);
  r.mscale_all_dim = keys.OptionalFloat("rope.scaling.yarn_log_multiplier").value_or(0.0) / 0.1;
  TANDEM_RETURN_IF_ERROR(keys.status());
  if (!(r.factor >= 1.0) || r.original_max_position_embeddings < 1 || !(r.beta_fast > 0) ||
      !(r.beta_slow > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        file.path(), ": deepseek2.rope.scaling.* out of range: factor ", r.factor, ", original context ",
        r.original_max_position_embeddings, ", beta ", r.beta_fast, " and ", r.beta_slow));
  }
  return absl::OkStatus();
}

absl::Status ReadExperts(const gguf::File& file, std::string_view expert_groups, KeyReader& keys,
                         ModelConfig& c) {
  c.n_routed_experts = keys.OptionalSize("expert_count").value_or(0);
  TANDEM_RETURN_IF_ERROR(keys.status());
  if (c.n_routed_experts == 0) {
    c.first_k_dense_replace = c.num_hidden_layers;
    return absl::OkStatus();
  }
  c.first_k_dense_replace = keys.OptionalSize("leading_dense_block_count").value_or(0);
  c.num_experts_per_tok = keys.Size("expert_used_count");
  c.moe_intermediate_size = keys.Size("expert_feed_forward_length");
  c.n_shared_experts = keys.OptionalSize("expert_shared_count").value_or(0);
  c.routed_scaling_factor = keys.OptionalFloat("expert_weights_scale").value_or(1.0);
  c.norm_topk_prob = keys.OptionalBool("expert_weights_norm").value_or(false);
  const int64_t gating = keys.OptionalSize("expert_gating_func").value_or(0);
  TANDEM_RETURN_IF_ERROR(keys.status());
  // Files of DeepSeek-V2 and V2.5 from before the key existed are softmax models.
  if (gating > 2) {
    return absl::UnimplementedError(absl::StrCat(file.path(), ": deepseek2.expert_gating_func = ", gating,
                                                 "; only 1 (softmax) and 2 (sigmoid) are known"));
  }
  c.scoring_func = gating == 2 ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.expert_count", c.n_routed_experts, 1, 65536));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.expert_used_count", c.num_experts_per_tok, 1,
                                    std::min<int64_t>(c.n_routed_experts, 64)));
  TANDEM_RETURN_IF_ERROR(
      CheckRange(file, "deepseek2.expert_feed_forward_length", c.moe_intermediate_size, 1, kMaxSize));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.leading_dense_block_count", c.first_k_dense_replace, 0,
                                    c.num_hidden_layers));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.expert_shared_count", c.n_shared_experts, 0, 64));
  return ReadGroups(file, expert_groups, keys, c);
}

}  // namespace

absl::StatusOr<ModelConfig> ReadModelConfig(const gguf::File& file, std::string_view expert_groups) {
  TANDEM_ASSIGN_OR_RETURN(const std::string architecture, file.GetString("general.architecture"));
  if (architecture != "deepseek2") {
    return absl::UnimplementedError(absl::StrCat(
        file.path(), ": architecture \"", architecture,
        "\" is not served; Tandem runs deepseek2 models (DeepSeek-V2, V3, R1, Kimi-K2, Moonlight)"));
  }
  ModelConfig c;
  if (auto name = file.GetString("general.name"); name.ok()) c.name = *name;
  KeyReader keys(file);
  c.hidden_size = keys.Size("embedding_length");
  c.intermediate_size = keys.OptionalSize("feed_forward_length").value_or(0);
  c.num_hidden_layers = keys.Size("block_count");
  c.num_attention_heads = keys.Size("attention.head_count");
  c.q_lora_rank = keys.OptionalSize("attention.q_lora_rank").value_or(0);
  c.kv_lora_rank = keys.Size("attention.kv_lora_rank");
  c.max_position_embeddings = keys.Size("context_length");
  c.rms_norm_eps = keys.OptionalFloat("attention.layer_norm_rms_epsilon").value_or(1e-6);
  TANDEM_RETURN_IF_ERROR(keys.status());
  // Layers for multi-token prediction lie behind the others and are not run.
  c.num_hidden_layers -= keys.OptionalSize("nextn_predict_layers").value_or(0);
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.block_count", c.num_hidden_layers, 1, 4096));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.embedding_length", c.hidden_size, 1, 1 << 20));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.attention.head_count", c.num_attention_heads, 1, 4096));
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "deepseek2.attention.kv_lora_rank", c.kv_lora_rank, 1, 1 << 16));
  TANDEM_RETURN_IF_ERROR(
      CheckRange(file, "deepseek2.context_length", c.max_position_embeddings, 1, kMaxSize));
  TANDEM_RETURN_IF_ERROR(ReadHeads(file, keys, c));
  TANDEM_RETURN_IF_ERROR(ReadRope(file, keys, c));
  TANDEM_RETURN_IF_ERROR(ReadExperts(file, expert_groups, keys, c));

  const gguf::Tensor* embedding = file.FindTensor("token_embd.weight");
  if (embedding != nullptr) {
    c.vocab_size = embedding->ne[1];
  } else if (auto tokens = file.GetStrings("tokenizer.ggml.tokens"); tokens.ok()) {
    c.vocab_size = static_cast<int64_t>(tokens->size());
  } else {
    c.vocab_size = keys.Size("vocab_size");
    TANDEM_RETURN_IF_ERROR(keys.status());
  }
  TANDEM_RETURN_IF_ERROR(CheckRange(file, "vocabulary size", c.vocab_size, 1, kMaxSize));
  return c;
}

std::vector<float> RopeFrequencies(const ModelConfig& c) {
  const int64_t dim = c.qk_rope_head_dim;
  const int64_t pairs = dim / 2;
  const RopeScaling& r = c.rope_scaling;
  const float theta = static_cast<float>(c.rope_theta);
  std::vector<float> freq(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    freq[i] = 1.0f / std::pow(theta, static_cast<float>(2 * i) / static_cast<float>(dim));
  }
  if (r.factor == 1.0) return freq;

  // The pair that turns `rotations` times over the original context.
  auto pair_of = [&](double rotations) {
    return dim * std::log(r.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(c.rope_theta));
  };
  const double low = std::max(std::floor(pair_of(r.beta_fast)), 0.0);
  const double high = std::min(std::ceil(pair_of(r.beta_slow)), static_cast<double>(dim - 1));
  const double width = std::max(high - low, 0.001);
  for (int64_t i = 0; i < pairs; ++i) {
    const float ramp = static_cast<float>(std::clamp((static_cast<double>(i) - low) / width, 0.0, 1.0));
    freq[i] = freq[i] / static_cast<float>(r.factor) * ramp + freq[i] * (1.0f - ramp);
  }
  return freq;
}

double AttentionScale(const ModelConfig& c) {
  const double mscale = 1.0 + 0.1 * c.rope_scaling.mscale_all_dim * std::log(c.rope_scaling.factor);
  return mscale * mscale / std::sqrt(static_cast<double>(c.qk_head_dim()));
}

}  // namespace tandem::model
