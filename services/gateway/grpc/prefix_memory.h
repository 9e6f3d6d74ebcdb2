// Which prompts an engine has had: where a prompt with the same beginning is best sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

namespace tandem::gateway {

// Tokens of a page here; an engine's own pages may be of another size.
inline constexpr size_t kAffinityPageTokens = 32;

// Hashes of the prompt's prefixes of 1, 2, ... whole pages.
std::vector<uint64_t> PrefixHashes(std::span<const int32_t> prompt);

// The latest prefixes of one engine; those that were used longest ago are forgotten first. What it says is a
// guess: the engine may have dropped them, too. Not thread-safe.
class PrefixMemory {
 public:
  explicit PrefixMemory(size_t most_pages) : most_pages_(most_pages) {}

  // How many of `hashes` (of one prompt) are known, counted from the first.
  size_t Match(std::span<const uint64_t> hashes) const;
  void Add(std::span<const uint64_t> hashes);
  void Clear();
  size_t pages() const { return places_.size(); }

 private:
  const size_t most_pages_;
  std::list<uint64_t> order_;  // the latest first
  std::unordered_map<uint64_t, std::list<uint64_t>::iterator> places_;
};

}  // namespace tandem::gateway
