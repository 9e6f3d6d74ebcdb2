// Byte pair encoding of one piece: of all neighbouring pairs that a merge rule names, the one of the lowest
// rank (the leftmost of equal ones) is joined, until none is left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tandem::tokenizer {

// The merge rules: a pair of token ids to its rank and the id of the joined token. Built once, then
// read-only.
class MergeTable {
 public:
  struct Entry {
    int32_t left = -1;  // -1: a free slot
    int32_t right = -1;
    uint32_t rank = 0;
    int32_t joined = -1;
  };

  // Room for `count` rules.
  explicit MergeTable(size_t count);
  // Of two rules for one pair the first counts. At most `count` calls.
  void Add(int32_t left, int32_t right, uint32_t rank, int32_t joined);
  // nullptr if there is no rule.
  const Entry* Find(int32_t left, int32_t right) const {
    for (size_t i = Hash(left, right);; i = (i + 1) & mask_) {
      const Entry& e = slots_[i];
      if (e.left == left && e.right == right) return &e;
      if (e.left < 0) return nullptr;
    }
  }

 private:
  size_t Hash(int32_t left, int32_t right) const {
    const uint64_t key =
        static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
    const uint64_t mixed = (key ^ key >> 29) * 0x9E3779B97F4A7C15u;
    return static_cast<size_t>(mixed >> 20) & mask_;
  }

  size_t mask_;
  std::vector<Entry> slots_;
};

// Merges pieces; keeps its buffers between calls. One a thread.
class BpeMerger {
 public:
  explicit BpeMerger(const MergeTable* merges) : merges_(merges) {}

  // `symbols` (fewer than 2^31): the ids of the piece's bytes. Appends the merged ids to `out`.
  // O(n log n) time, O(n) memory.
  void Merge(std::span<const int32_t> symbols, std::vector<int32_t>* out);

 private:
  void MergeShort(std::span<const int32_t> symbols, std::vector<int32_t>* out);
  void MergeLong(std::span<const int32_t> symbols, std::vector<int32_t>* out);

  const MergeTable* merges_;
  std::vector<int32_t> ids_;
  std::vector<uint32_t> previous_;
  std::vector<uint32_t> next_;
  // Pairs that may be merged, rank << 32 | position of the left symbol.
  std::vector<uint64_t> first_;
  std::vector<uint64_t> heap_;
};

}  // namespace tandem::tokenizer
