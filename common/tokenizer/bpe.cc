#include "common/tokenizer/bpe.h"

#include <algorithm>
#include <functional>

namespace tandem::tokenizer {
namespace {

constexpr uint32_t kNoRank = 0xFFFFFFFF;
constexpr uint32_t kNone = 0xFFFFFFFF;
// Up to here looking at every pair for each merge is faster than a heap.
constexpr size_t kShortPiece = 40;

}  // namespace

MergeTable::MergeTable(size_t count) {
  size_t size = 16;
  while (size < count * 2) size *= 2;
  mask_ = size - 1;
  slots_.resize(size);
}

void MergeTable::Add(int32_t left, int32_t right, uint32_t rank, int32_t joined) {
  size_t i = Hash(left, right);
  while (slots_[i].left >= 0) {
    if (slots_[i].left == left && slots_[i].right == right) return;
    i = (i + 1) & mask_;
  }
  slots_[i] = Entry{left, right, rank, joined};
}

void BpeMerger::Merge(std::span<const int32_t> symbols, std::vector<int32_t>* out) {
  if (symbols.size() <= kShortPiece) {
    MergeShort(symbols, out);
  } else {
    MergeLong(symbols, out);
  }
}

void BpeMerger::MergeShort(std::span<const int32_t> symbols, std::vector<int32_t>* out) {
  size_t n = symbols.size();
  int32_t ids[kShortPiece];
  uint32_t ranks[kShortPiece];  // of the pair that begins here
  int32_t joined[kShortPiece];
  std::copy(symbols.begin(), symbols.end(), ids);
  const auto look_up = [&](size_t i) {
    const MergeTable::Entry* entry = merges_->Find(ids[i], ids[i + 1]);
    ranks[i] = entry == nullptr ? kNoRank : entry->rank;
    joined[i] = entry == nullptr ? -1 : entry->joined;
  };
  for (size_t i = 0; i + 1 < n; ++i) look_up(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == kNoRank) break;
    ids[best] = joined[best];
    for (size_t i = best + 1; i + 1 < n; ++i) {
      ids[i] = ids[i + 1];
      ranks[i] = ranks[i + 1];
      joined[i] = joined[i + 1];
    }
    --n;
    if (best + 1 < n) look_up(best);
    if (best > 0) look_up(best - 1);
  }
  out->insert(out->end(), ids, ids + n);
}

void BpeMerger::MergeLong(std::span<const int32_t> symbols, std::vector<int32_t>* out) {
  const auto n = static_cast<uint32_t>(symbols.size());
  ids_.assign(symbols.begin(), symbols.end());
  previous_.resize(n);
  next_.resize(n);
  first_.clear();
  heap_.clear();
  for (uint32_t i = 0; i < n; ++i) {
    previous_[i] = i == 0 ? kNone : i - 1;
    next_[i] = i + 1 == n ? kNone : i + 1;
    if (i + 1 < n) {
      const MergeTable::Entry* entry = merges_->Find(ids_[i], ids_[i + 1]);
      if (entry != nullptr) first_.push_back(static_cast<uint64_t>(entry->rank) << 32 | i);
    }
  }
  // The pairs of the beginning are sorted once, those that merges make go to a heap.
  if (!std::is_sorted(first_.begin(), first_.end())) std::sort(first_.begin(), first_.end());
  size_t first = 0;
  const auto push = [&](uint32_t i) {
    const MergeTable::Entry* entry = merges_->Find(ids_[i], ids_[next_[i]]);
    if (entry == nullptr) return;
    heap_.push_back(static_cast<uint64_t>(entry->rank) << 32 | i);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  };
  while (first < first_.size() || !heap_.empty()) {
    uint64_t top;
    if (heap_.empty() || (first < first_.size() && first_[first] < heap_.front())) {
      top = first_[first++];
    } else {
      top = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      heap_.pop_back();
    }
    const auto i = static_cast<uint32_t>(top);
    // An entry is out of date if its left symbol was swallowed or the pair there has changed.
    if (ids_[i] < 0 || next_[i] == kNone) continue;
    const uint32_t right = next_[i];
    const MergeTable::Entry* entry = merges_->Find(ids_[i], ids_[right]);
    if (entry == nullptr || entry->rank != static_cast<uint32_t>(top >> 32)) continue;
    ids_[i] = entry->joined;
    ids_[right] = -1;
    next_[i] = next_[right];
    if (next_[i] != kNone) {
      previous_[next_[i]] = i;
      push(i);
    }
    if (previous_[i] != kNone) push(previous_[i]);
  }
  for (uint32_t i = 0; i != kNone; i = next_[i]) out->push_back(ids_[i]);
}

}  // namespace tandem::tokenizer
