// Which full pages of tokens the KV cache holds, and where. An edge is one page of tokens, a node is that
// page after all pages above it, so that equal beginnings of sequences share their nodes. Children are kept
// in the order of their tokens, so that the nearest one to any tokens is found as well as the equal one.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/types/span.h"

namespace tandem::attention {

// The structure alone: who moves the pages' contents is KvCache. Not thread-safe.
//
// A node's page is on the device or in the host tier, never in both. What is kept true: a node that is
// referenced or on the device has a parent on the device. So what lies in the host tier is whole subtrees,
// and pages leave the device from the leaves up.
class PrefixTree {
 public:
  struct Node {
    int32_t page = -1;  // on the device, or -1
    int32_t slot = -1;  // in the host tier, or -1
    int32_t refs = 0;   // sequences that use it
    bool has_children() const { return !children.empty(); }

   private:
    friend class PrefixTree;
    Node* parent = nullptr;
    std::vector<int32_t> tokens;  // [page_tokens]; the key in the parent's map points here
    absl::btree_map<absl::Span<const int32_t>, Node*> children;
    int32_t children_on_device = 0;
    uint64_t tick = 0;  // when its last reference went; 0 while it has one
  };

  PrefixTree();
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  // Before the first page. It cannot be referenced or evicted.
  Node* root() { return &root_; }
  const Node* root() const { return &root_; }

  // The page `tokens` after `parent`, or nullptr.
  Node* Find(const Node* parent, std::span<const int32_t> tokens) const;
  struct Nearest {
    Node* node = nullptr;   // nullptr: nothing in common with any
    int32_t in_common = 0;  // tokens at the beginning
  };
  // The page after `parent` that begins most like `tokens`, which may be less than a page.
  Nearest FindNearest(const Node* parent, std::span<const int32_t> tokens) const;
  // A new page on the device, referenced once. `parent` is on the device and does not have it yet.
  Node* Add(Node* parent, std::span<const int32_t> tokens, int32_t page);

  // A parent is to be referenced for as long as its child is.
  void Ref(Node* node);
  // The page that loses its last reference becomes the most recently used one.
  void Unref(Node* node);

  // The least recently used page that may leave the device (no references, nothing on the device below it),
  // or that may leave the host tier (no references, nothing below it); nullptr if there is none.
  Node* OldestOnDevice() const;
  Node* OldestOnHost() const;

  void MoveToHost(Node* node, int32_t slot);    // `node` is evictable
  void MoveToDevice(Node* node, int32_t page);  // its parent is on the device
  // Any leaf below `node`, or itself.
  static Node* LeafBelow(Node* node);
  // An unreferenced node without children; its page or slot is the caller's again.
  void Remove(Node* node);

  int32_t unreferenced_on_device() const { return unreferenced_on_device_; }
  int32_t on_device() const { return on_device_; }
  int32_t on_host() const { return on_host_; }

 private:
  void Enlist(Node* node);
  void Delist(Node* node);

  Node root_;
  uint64_t tick_ = 0;
  std::map<uint64_t, Node*> device_order_, host_order_;  // evictable, oldest first
  int32_t unreferenced_on_device_ = 0;
  int32_t on_device_ = 0, on_host_ = 0;
};

}  // namespace tandem::attention
