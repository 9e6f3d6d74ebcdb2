#include "cli/bench/serve/prefix_ideal.h"

#include <algorithm>

namespace tandem::cli {

uint64_t Mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

int64_t PrefixIdeal::Add(std::span<const int32_t> prompt) {
  const auto page = static_cast<size_t>(page_units_);
  uint64_t hash = 0;
  int64_t hit = 0;
  bool shared = true;
  for (size_t begin = 0; begin + page <= prompt.size(); begin += page) {
    for (const int32_t unit : prompt.subspan(begin, page)) hash = Mix(hash ^ static_cast<uint32_t>(unit));
    const bool fresh = pages_.insert(hash).second;
    shared = shared && !fresh;
    if (shared) hit += page_units_;
  }
  if (hit == static_cast<int64_t>(prompt.size())) hit -= page_units_;
  return std::max<int64_t>(hit, 0);
}

}  // namespace tandem::cli
