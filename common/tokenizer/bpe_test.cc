#include "common/tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace tandem::tokenizer {
namespace {

// The definition: join the leftmost pair of the lowest rank until there is none.
std::vector<int32_t> MergeByDefinition(const MergeTable& merges, std::vector<int32_t> ids) {
  while (true) {
    const MergeTable::Entry* best = nullptr;
    size_t at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const MergeTable::Entry* entry = merges.Find(ids[i], ids[i + 1]);
      if (entry == nullptr || (best != nullptr && best->rank <= entry->rank)) continue;
      best = entry;
      at = i;
    }
    if (best == nullptr) return ids;
    ids[at] = best->joined;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(at) + 1);
  }
}

// Random rules in random order (a later token may have a lower rank than its parts), short and long pieces.
TEST(BpeMerger, EqualsTheDefinition) {
  std::mt19937 random(3);
  for (int table = 0; table < 60; ++table) {
    constexpr int32_t kBytes = 4;
    const int32_t rules = 1 + static_cast<int32_t>(random() % 60);
    std::vector<uint32_t> ranks(rules);
    for (int32_t i = 0; i < rules; ++i) ranks[i] = static_cast<uint32_t>(i);
    if (table % 2 == 1) std::shuffle(ranks.begin(), ranks.end(), random);
    MergeTable merges(rules);
    for (int32_t i = 0; i < rules; ++i) {
      const auto any = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(kBytes + i)); };
      merges.Add(any(), any(), ranks[i], kBytes + i);
    }
    BpeMerger merger(&merges);
    for (int round = 0; round < 60; ++round) {
      std::vector<int32_t> symbols(random() % (round % 2 == 0 ? 41 : 300));
      const uint32_t letters = 1 + random() % kBytes;
      for (int32_t& symbol : symbols) symbol = static_cast<int32_t>(random() % letters);
      std::vector<int32_t> out;
      merger.Merge(symbols, &out);
      ASSERT_EQ(out, MergeByDefinition(merges, symbols)) << "table " << table << " length " << symbols.size();
    }
  }
}

}  // namespace
}  // namespace tandem::tokenizer
