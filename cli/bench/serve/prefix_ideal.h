// What a prefix cache without bounds would save.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_set>

namespace tandem::cli {

// Prompts in the order of their arrival; each is kept in whole pages for ever, as if it were computed the
// moment it arrives. Answers are not kept. Not thread-safe.
class PrefixIdeal {
 public:
  explicit PrefixIdeal(int64_t page_units) : page_units_(page_units) {}  // > 0

  // Units of the longest prefix of whole pages that earlier prompts have, at least one unit short of the
  // prompt, whose last position must be computed in any case. Then takes the prompt in.
  int64_t Add(std::span<const int32_t> prompt);

 private:
  const int64_t page_units_;
  std::unordered_set<uint64_t> pages_;  // hashes of prefixes
};

// A well-mixed 64-bit hash of a number (the finalizer of splitmix64).
uint64_t Mix(uint64_t value);

}  // namespace tandem::cli
