#include "services/gateway/grpc/prefix_memory.h"

#include "absl/hash/hash.h"
#include "absl/types/span.h"

namespace tandem::gateway {

std::vector<uint64_t> PrefixHashes(std::span<const int32_t> prompt) {
  std::vector<uint64_t> hashes;
  hashes.reserve(prompt.size() / kAffinityPageTokens);
  uint64_t hash = 0;
  for (size_t at = 0; at + kAffinityPageTokens <= prompt.size(); at += kAffinityPageTokens) {
    hash = absl::HashOf(hash, absl::MakeConstSpan(prompt.data() + at, kAffinityPageTokens));
    hashes.push_back(hash);
  }
  return hashes;
}

size_t PrefixMemory::Match(std::span<const uint64_t> hashes) const {
  size_t count = 0;
  while (count < hashes.size() && places_.contains(hashes[count])) ++count;
  return count;
}

// From the last page to the first: the beginnings, which more prompts share, outlive the ends.
void PrefixMemory::Add(std::span<const uint64_t> hashes) {
  for (size_t i = hashes.size(); i-- > 0;) {
    const auto [it, fresh] = places_.try_emplace(hashes[i]);
    if (fresh) {
      it->second = order_.insert(order_.begin(), hashes[i]);
    } else {
      order_.splice(order_.begin(), order_, it->second);
    }
  }
  while (order_.size() > most_pages_) {
    places_.erase(order_.back());
    order_.pop_back();
  }
}

void PrefixMemory::Clear() {
  order_.clear();
  places_.clear();
}

}  // namespace tandem::gateway
