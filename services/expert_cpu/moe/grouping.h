// A batch's (token, expert) pairs, sorted by expert.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::expert {

struct ExpertGroup {
  int64_t expert = 0;      // among those held: 0 is the first held
  int64_t first_pair = 0;  // its pairs are [first_pair, first_pair + pairs)
  int64_t pairs = 0;
};

// Reusable: Build keeps the memory. Not thread-safe.
class Grouping {
 public:
  // ids, weights: [n_tokens, k]. Ids outside [expert_begin, expert_end) are left out.
  void Build(std::span<const int32_t> ids, std::span<const float> weights, int64_t k, int64_t expert_begin,
             int64_t expert_end);

  // Those with the most pairs first, equals by number. Pairs of an expert are in the order of the tokens.
  const std::vector<ExpertGroup>& groups() const { return groups_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }  // of each pair
  const std::vector<float>& weights() const { return weights_; }  // of each pair

 private:
  std::vector<ExpertGroup> groups_;
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<int64_t> counts_;
};

}  // namespace tandem::expert
