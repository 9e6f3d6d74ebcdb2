// The pages of the KV cache as sequences use them: pages of their own while they are being filled, and full
// pages, which belong to the prefix tree and are shared. Pages without a user stay in the tree until somebody
// needs the room; then the least recently used goes, to the host tier if there is one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/kv/host_pages.h"
#include "services/attention_gpu/kv/page_allocator.h"
#include "services/attention_gpu/kv/prefix_tree.h"

namespace tandem::attention {

// What one sequence holds. Changed by KvCache only; to be given back with KvCache::Release.
struct SequencePages {
  std::vector<int32_t> pages;             // page i holds positions [i * page_tokens, (i + 1) * page_tokens)
  std::vector<PrefixTree::Node*> shared;  // of the first pages, all full; the others are the sequence's own
};

struct KvStatistics {
  int32_t pages = 0;
  int32_t used = 0;    // held by sequences
  int32_t cached = 0;  // held by the prefix tree alone
  int32_t host_pages = 0;
  int32_t host_used = 0;
  // Pages, since start.
  uint64_t evicted = 0;        // left the device
  uint64_t host_stored = 0;    // of these, went to the host tier
  uint64_t host_returned = 0;  // came back from there
  uint64_t host_evicted = 0;   // were dropped from there
};

// Not thread-safe: the scheduler's thread owns it.
class KvCache {
 public:
  // Without `prefix_cache` nothing is shared or kept. `backend` must outlive the cache.
  KvCache(Backend& backend, bool prefix_cache, HostPages host);

  // What Adopt would find for a sequence that holds nothing.
  struct Match {
    int32_t pages = 0;         // full pages known
    int32_t free_of_cost = 0;  // of these, in use by others now: taking them leaves as much room as before
  };
  Match Probe(std::span<const int32_t> tokens) const;

  // Adds the known pages that follow the first `computed` tokens, at most so many that one token is left to
  // compute, and returns the tokens gained: none in the middle of a page. Pages of its own that were reserved
  // and not yet written are given up for them.
  int32_t Adopt(std::span<const int32_t> tokens, int32_t computed, SequencePages& s);

  // Where Adopt can go no further: copies what a known page has in common with the tokens that come next into
  // a page of the sequence's own, and returns the tokens gained: less than a page, and one token at least is
  // left to compute. So even the page that holds the last token of a known prompt is not computed again.
  // Nothing is copied for the sake of a few tokens (less than a quarter of a page) or where there is no room.
  int32_t CopyPart(std::span<const int32_t> tokens, int32_t computed, SequencePages& s);

  // Makes sure of pages for the first `tokens` tokens; false, and nothing changed, if there is no room.
  bool Reserve(int32_t tokens, SequencePages& s);

  // The first `computed` of `tokens` are written: makes the full pages known. A page that has become known
  // meanwhile through another sequence is taken in place of the sequence's own, whose contents are the same.
  void Commit(std::span<const int32_t> tokens, int32_t computed, SequencePages& s);

  void Release(SequencePages& s);

  bool prefix_cache() const { return prefix_cache_; }
  int32_t page_tokens() const { return page_tokens_; }
  int32_t PagesFor(int64_t tokens) const {
    return static_cast<int32_t>((tokens + page_tokens_ - 1) / page_tokens_);
  }
  // Pages that Reserve can give: free ones and cached ones without a user.
  int32_t available() const { return allocator_.free() + tree_.unreferenced_on_device(); }
  KvStatistics Statistics() const;

 private:
  bool EvictOne();
  bool Allocate(int32_t n, std::vector<int32_t>& out);
  bool BringBack(PrefixTree::Node* node);
  bool CopyContents(const PrefixTree::Node& node, int32_t page);
  void Forget(PrefixTree::Node* node);
  // Full pages that a sequence may take over: one token at least is left to compute.
  int64_t MostAdoptable(std::span<const int32_t> tokens) const {
    return (static_cast<int64_t>(tokens.size()) - 1) / page_tokens_;
  }
  int32_t LeastCopied() const { return (page_tokens_ + 3) / 4; }
  std::span<const int32_t> PageOf(std::span<const int32_t> tokens, size_t page) const {
    return tokens.subspan(page * page_tokens_, page_tokens_);
  }

  Backend& backend_;
  const bool prefix_cache_;
  const int32_t page_tokens_;
  PageAllocator allocator_;
  PrefixTree tree_;
  HostPages host_;
  std::vector<std::byte> page_copy_;  // on its way from one page to another; empty until then
  KvStatistics counters_;             // the four counts since start
};

}  // namespace tandem::attention
