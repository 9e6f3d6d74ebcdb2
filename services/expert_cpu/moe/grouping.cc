#include "services/expert_cpu/moe/grouping.h"

#include <algorithm>

namespace tandem::expert {

void Grouping::Build(std::span<const int32_t> ids, std::span<const float> weights, int64_t k,
                     int64_t expert_begin, int64_t expert_end) {
  counts_.assign(static_cast<size_t>(expert_end - expert_begin), 0);
  for (const int32_t id : ids) {
    if (id >= expert_begin && id < expert_end) ++counts_[static_cast<size_t>(id - expert_begin)];
  }
  groups_.clear();
  for (size_t e = 0; e < counts_.size(); ++e) {
    if (counts_[e] > 0) groups_.push_back({static_cast<int64_t>(e), 0, counts_[e]});
  }
  std::sort(groups_.begin(), groups_.end(), [](const ExpertGroup& a, const ExpertGroup& b) {
    return a.pairs != b.pairs ? a.pairs > b.pairs : a.expert < b.expert;
  });
  int64_t total = 0;
  for (ExpertGroup& group : groups_) {
    group.first_pair = total;
    counts_[static_cast<size_t>(group.expert)] = total;  // from here on: where its next pair goes
    total += group.pairs;
  }
  tokens_.resize(static_cast<size_t>(total));
  weights_.resize(static_cast<size_t>(total));
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < expert_begin || ids[i] >= expert_end) continue;
    const auto to = static_cast<size_t>(counts_[static_cast<size_t>(ids[i] - expert_begin)]++);
    tokens_[to] = static_cast<int32_t>(static_cast<int64_t>(i) / k);
    weights_[to] = weights[i];
  }
}

}  // namespace tandem::expert
