#include "services/attention_gpu/kv/kv_cache.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"

namespace tandem::attention {

using Node = PrefixTree::Node;

KvCache::KvCache(Backend& backend, bool prefix_cache, HostPages host)
    : backend_(backend),
      prefix_cache_(prefix_cache),
      page_tokens_(backend.page_tokens()),
      allocator_(backend.page_count()),
      host_(std::move(host)) {}

KvCache::Match KvCache::Probe(std::span<const int32_t> tokens) const {
  Match m;
  if (!prefix_cache_) return m;
  const Node* node = tree_.root();
  for (int64_t i = 0; i < MostAdoptable(tokens); ++i) {
    node = tree_.Find(node, PageOf(tokens, i));
    if (node == nullptr) break;
    ++m.pages;
    if (node->refs > 0) ++m.free_of_cost;
  }
  return m;
}

int32_t KvCache::Adopt(std::span<const int32_t> tokens, int32_t computed, SequencePages& s) {
  const size_t before = s.shared.size();
  if (!prefix_cache_ || computed != static_cast<int32_t>(before) * page_tokens_) return 0;
  Node* node = before > 0 ? s.shared.back() : tree_.root();
  for (int64_t i = static_cast<int64_t>(before); i < MostAdoptable(tokens); ++i) {
    node = tree_.Find(node, PageOf(tokens, i));
    if (node == nullptr) break;
    if (s.pages.size() > s.shared.size()) {
      std::vector<int32_t> own(s.pages.begin() + static_cast<int64_t>(s.shared.size()), s.pages.end());
      s.pages.resize(s.shared.size());
      allocator_.Release(own);
    }
    tree_.Ref(node);  // first, or making room for it might drop it
    if (node->page < 0 && !BringBack(node)) break;
    s.shared.push_back(node);
    s.pages.push_back(node->page);
  }
  return static_cast<int32_t>(s.shared.size() - before) * page_tokens_;
}

int32_t KvCache::CopyPart(std::span<const int32_t> tokens, int32_t computed, SequencePages& s) {
  const size_t full = s.shared.size();
  if (!prefix_cache_ || computed != static_cast<int32_t>(full) * page_tokens_) return 0;
  const auto left = static_cast<int32_t>(tokens.size()) - computed - 1;
  if (left < LeastCopied()) return 0;
  const PrefixTree::Nearest nearest = tree_.FindNearest(
      full > 0 ? s.shared.back() : tree_.root(), tokens.subspan(computed, std::min(left, page_tokens_)));
  if (nearest.in_common < LeastCopied()) return 0;
  // A page without a difference in it is Adopt's: it was kept from it by a lack of room.
  if (nearest.in_common == page_tokens_) return 0;
  tree_.Ref(nearest.node);  // or making room might drop it
  const bool copied = Reserve(computed + nearest.in_common, s) && CopyContents(*nearest.node, s.pages[full]);
  tree_.Unref(nearest.node);
  return copied ? nearest.in_common : 0;
}

bool KvCache::Reserve(int32_t tokens, SequencePages& s) {
  const int32_t needed = PagesFor(tokens) - static_cast<int32_t>(s.pages.size());
  return needed <= 0 || Allocate(needed, s.pages);
}

void KvCache::Commit(std::span<const int32_t> tokens, int32_t computed, SequencePages& s) {
  if (!prefix_cache_) return;
  for (size_t i = s.shared.size(); i < static_cast<size_t>(computed / page_tokens_); ++i) {
    Node* parent = i > 0 ? s.shared[i - 1] : tree_.root();
    Node* node = tree_.Find(parent, PageOf(tokens, i));
    if (node == nullptr) {
      node = tree_.Add(parent, PageOf(tokens, i), s.pages[i]);
    } else {
      tree_.Ref(node);
      if (node->page >= 0) {
        std::vector<int32_t> own = {std::exchange(s.pages[i], node->page)};
        allocator_.Release(own);
      } else {
        host_.Give(node->slot);
        tree_.MoveToDevice(node, s.pages[i]);
      }
    }
    s.shared.push_back(node);
  }
}

void KvCache::Release(SequencePages& s) {
  std::vector<int32_t> own(s.pages.begin() + static_cast<int64_t>(s.shared.size()), s.pages.end());
  allocator_.Release(own);
  // From the end: of a chain, what is further from the root is the first to go.
  for (size_t i = s.shared.size(); i-- > 0;) tree_.Unref(s.shared[i]);
  s.pages.clear();
  s.shared.clear();
}

bool KvCache::Allocate(int32_t n, std::vector<int32_t>& out) {
  if (n > available()) return false;
  while (allocator_.free() < n) {
    if (!EvictOne()) return false;
  }
  return allocator_.Allocate(n, out);
}

// Frees one page of the device.
bool KvCache::EvictOne() {
  Node* node = tree_.OldestOnDevice();
  if (node == nullptr) return false;
  const int32_t page = node->page;
  ++counters_.evicted;
  if (host_.total() > 0) {
    int32_t slot = host_.Take();
    while (slot < 0) {
      Node* old = tree_.OldestOnHost();
      if (old == nullptr) break;
      Forget(old);
      ++counters_.host_evicted;
      slot = host_.Take();
    }
    if (slot >= 0) {
      if (backend_.CopyPageOut(page, host_.Data(slot)).ok()) {
        ++counters_.host_stored;
        tree_.MoveToHost(node, slot);
        std::vector<int32_t> freed = {page};
        allocator_.Release(freed);
        return true;
      }
      host_.Give(slot);
    }
  }
  Forget(node);  // a cache may lose what it cannot keep
  return true;
}

// For a referenced node in the host tier. False: it stays there, or is gone if its contents could not be
// read; the reference is given back.
bool KvCache::BringBack(Node* node) {
  std::vector<int32_t> page;
  if (!Allocate(1, page)) {
    tree_.Unref(node);
    return false;
  }
  if (!backend_.CopyPageIn(host_.Data(node->slot), page[0]).ok()) {
    allocator_.Release(page);
    tree_.Unref(node);
    Forget(node);
    return false;
  }
  host_.Give(node->slot);
  tree_.MoveToDevice(node, page[0]);
  ++counters_.host_returned;
  return true;
}

bool KvCache::CopyContents(const Node& node, int32_t page) {
  if (node.page < 0) return backend_.CopyPageIn(host_.Data(node.slot), page).ok();
  page_copy_.resize(backend_.page_bytes());
  return backend_.CopyPageOut(node.page, page_copy_).ok() && backend_.CopyPageIn(page_copy_, page).ok();
}

// Removes an unreferenced node and all below it, none of which is referenced either.
void KvCache::Forget(Node* node) {
  for (bool last = false; !last;) {
    Node* leaf = PrefixTree::LeafBelow(node);
    last = leaf == node;
    const int32_t page = leaf->page, slot = leaf->slot;
    tree_.Remove(leaf);
    if (slot >= 0) host_.Give(slot);
    if (page >= 0) {
      std::vector<int32_t> freed = {page};
      allocator_.Release(freed);
    }
  }
}

KvStatistics KvCache::Statistics() const {
  KvStatistics s = counters_;
  s.pages = allocator_.total();
  s.used = allocator_.total() - available();
  s.cached = tree_.unreferenced_on_device();
  s.host_pages = host_.total();
  s.host_used = host_.used();
  return s;
}

}  // namespace tandem::attention
