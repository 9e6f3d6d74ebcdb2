#include "services/attention_gpu/backend/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tandem::attention {
namespace {

constexpr float kOut = -std::numeric_limits<float>::infinity();

void Score(const model::ModelConfig& c, const float* logits, float* scores) {
  const int64_t n = c.n_routed_experts;
  if (c.scoring_func == model::ScoringFunc::kSigmoid) {
    for (int64_t e = 0; e < n; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float top = *std::max_element(logits, logits + n);
  float sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += scores[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < n; ++e) scores[e] /= sum;
}

float GroupScore(const float* selection, int64_t n, bool two) {
  float first = kOut, second = kOut;
  for (int64_t i = 0; i < n; ++i) {
    if (selection[i] > first) {
      second = first;
      first = selection[i];
    } else if (selection[i] > second) {
      second = selection[i];
    }
  }
  return two && n > 1 ? first + second : first;
}

// Puts the selection values of all groups but the best `topk_group` out of reach.
void LimitGroups(const model::ModelConfig& c, float* selection) {
  const int64_t size = c.n_routed_experts / c.n_group;
  const bool two = c.scoring_func == model::ScoringFunc::kSigmoid;
  float group_scores[256];
  bool kept[256] = {};
  const int64_t groups = std::min<int64_t>(c.n_group, 256);
  for (int64_t g = 0; g < groups; ++g) group_scores[g] = GroupScore(selection + g * size, size, two);
  for (int64_t k = 0; k < c.topk_group; ++k) {
    int64_t best = -1;
    for (int64_t g = 0; g < groups; ++g) {
      if (!kept[g] && (best < 0 || group_scores[g] > group_scores[best])) best = g;
    }
    if (best >= 0) kept[best] = true;
  }
  for (int64_t g = 0; g < groups; ++g) {
    if (!kept[g]) std::fill(selection + g * size, selection + (g + 1) * size, kOut);
  }
}

}  // namespace

void Route(const model::ModelConfig& c, const float* logits, const float* bias, int32_t* ids, float* weights,
           float* scratch) {
  const int64_t n = c.n_routed_experts;
  float* scores = scratch;
  float* selection = scratch + n;
  Score(c, logits, scores);
  for (int64_t e = 0; e < n; ++e) {
    selection[e] = bias != nullptr ? scores[e] + bias[e] : scores[e];
    // A NaN (a broken activation) must not pick an id out of range; it loses against everything.
    if (std::isnan(selection[e])) selection[e] = -std::numeric_limits<float>::max();
  }
  if (c.n_group > 1) LimitGroups(c, selection);

  float sum = 0;
  for (int64_t k = 0; k < c.num_experts_per_tok; ++k) {
    int64_t best = 0;
    for (int64_t e = 1; e < n; ++e) {
      if (selection[e] > selection[best]) best = e;
    }
    selection[best] = kOut;
    ids[k] = static_cast<int32_t>(best);
    weights[k] = scores[best];
    sum += scores[best];
  }
  const float scale = static_cast<float>(c.routed_scaling_factor);
  for (int64_t k = 0; k < c.num_experts_per_tok; ++k) {
    if (c.norm_topk_prob) weights[k] /= std::max(sum, 6.103515625e-5f);
    weights[k] *= scale;
  }
}

}  // namespace tandem::attention
