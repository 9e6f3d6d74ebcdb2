#include "services/attention_gpu/kv/prefix_tree.h"

#include <algorithm>
#include <iterator>

#include "common/base/check.h"

namespace tandem::attention {
namespace {

absl::Span<const int32_t> Key(std::span<const int32_t> tokens) { return {tokens.data(), tokens.size()}; }

}  // namespace

PrefixTree::PrefixTree() = default;

// Not recursive: a chain is as deep as a context has pages.
PrefixTree::~PrefixTree() {
  std::vector<Node*> all;
  for (auto& [key, child] : root_.children) all.push_back(child);
  while (!all.empty()) {
    Node* node = all.back();
    all.pop_back();
    for (auto& [key, child] : node->children) all.push_back(child);
    delete node;
  }
}

PrefixTree::Node* PrefixTree::Find(const Node* parent, std::span<const int32_t> tokens) const {
  const auto it = parent->children.find(Key(tokens));
  return it != parent->children.end() ? it->second : nullptr;
}

PrefixTree::Nearest PrefixTree::FindNearest(const Node* parent, std::span<const int32_t> tokens) const {
  Nearest best;
  const auto consider = [&](Node* node) {
    const auto end = std::mismatch(tokens.begin(), tokens.end(), node->tokens.begin(), node->tokens.end());
    const auto in_common = static_cast<int32_t>(end.first - tokens.begin());
    if (in_common > best.in_common) best = {node, in_common};
  };
  // In the order of tokens, the nearest stands beside the place where `tokens` would stand.
  const auto after = parent->children.lower_bound(Key(tokens));
  if (after != parent->children.end()) consider(after->second);
  if (after != parent->children.begin()) consider(std::prev(after)->second);
  return best;
}

PrefixTree::Node* PrefixTree::Add(Node* parent, std::span<const int32_t> tokens, int32_t page) {
  TANDEM_CHECK(page >= 0 && (parent == &root_ || parent->page >= 0));
  Delist(parent);
  Node* node = new Node;
  node->parent = parent;
  node->tokens.assign(tokens.begin(), tokens.end());
  node->page = page;
  node->refs = 1;
  const bool added = parent->children.emplace(Key(node->tokens), node).second;
  TANDEM_CHECK(added);
  ++parent->children_on_device;
  ++on_device_;
  Enlist(parent);
  return node;
}

void PrefixTree::Ref(Node* node) {
  Delist(node);
  node->tick = 0;
  if (node->refs++ == 0 && node->page >= 0) --unreferenced_on_device_;
}

void PrefixTree::Unref(Node* node) {
  TANDEM_CHECK(node->refs > 0);
  if (--node->refs > 0) return;
  if (node->page >= 0) ++unreferenced_on_device_;
  Enlist(node);
}

PrefixTree::Node* PrefixTree::OldestOnDevice() const {
  return device_order_.empty() ? nullptr : device_order_.begin()->second;
}

PrefixTree::Node* PrefixTree::OldestOnHost() const {
  return host_order_.empty() ? nullptr : host_order_.begin()->second;
}

void PrefixTree::MoveToHost(Node* node, int32_t slot) {
  TANDEM_CHECK(node->page >= 0 && node->refs == 0 && node->children_on_device == 0 && slot >= 0);
  Delist(node);
  Delist(node->parent);
  node->page = -1;
  node->slot = slot;
  --unreferenced_on_device_;
  --on_device_;
  ++on_host_;
  --node->parent->children_on_device;
  Enlist(node);
  Enlist(node->parent);
}

void PrefixTree::MoveToDevice(Node* node, int32_t page) {
  TANDEM_CHECK(node->slot >= 0 && page >= 0 && (node->parent == &root_ || node->parent->page >= 0));
  Delist(node);
  Delist(node->parent);
  node->page = page;
  node->slot = -1;
  ++on_device_;
  --on_host_;
  if (node->refs == 0) ++unreferenced_on_device_;
  ++node->parent->children_on_device;
  Enlist(node);
  Enlist(node->parent);
}

PrefixTree::Node* PrefixTree::LeafBelow(Node* node) {
  while (!node->children.empty()) node = node->children.begin()->second;
  return node;
}

void PrefixTree::Remove(Node* node) {
  TANDEM_CHECK(node != &root_ && node->refs == 0 && node->children.empty());
  Node* parent = node->parent;
  Delist(node);
  Delist(parent);
  if (node->page >= 0) {
    --parent->children_on_device;
    --unreferenced_on_device_;
    --on_device_;
  } else {
    --on_host_;
  }
  parent->children.erase(absl::Span<const int32_t>(node->tokens));
  delete node;
  Enlist(parent);
}

// Puts the node where it may be evicted from, if it may. Its age is the time of its last use: neither a move
// nor the loss of its children changes it.
void PrefixTree::Enlist(Node* node) {
  if (node == &root_ || node->refs > 0) return;
  if (node->tick == 0) node->tick = ++tick_;
  if (node->page >= 0) {
    if (node->children_on_device == 0) device_order_.emplace(node->tick, node);
  } else if (node->children.empty()) {
    host_order_.emplace(node->tick, node);
  }
}

void PrefixTree::Delist(Node* node) {
  if (node->tick == 0) return;
  device_order_.erase(node->tick);
  host_order_.erase(node->tick);
}

}  // namespace tandem::attention
