#include "services/attention_gpu/kv/prefix_tree.h"

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

using Tokens = std::vector<int32_t>;

TEST(PrefixTree, FindsWhatWasAddedWhereItWasAdded) {
  PrefixTree tree;
  auto* a = tree.Add(tree.root(), Tokens{1, 2}, 0);
  auto* b = tree.Add(a, Tokens{1, 2}, 1);
  EXPECT_EQ(tree.Find(tree.root(), Tokens{1, 2}), a);
  EXPECT_EQ(tree.Find(a, Tokens{1, 2}), b);
  EXPECT_EQ(tree.Find(b, Tokens{1, 2}), nullptr);
  EXPECT_EQ(tree.Find(tree.root(), Tokens{2, 1}), nullptr);
}

TEST(PrefixTree, FindsTheNearest) {
  PrefixTree tree;
  EXPECT_EQ(tree.FindNearest(tree.root(), Tokens{1}).node, nullptr);
  std::vector<Tokens> pages;
  std::vector<PrefixTree::Node*> nodes;
  for (int32_t i = 0; i < 200; ++i) {
    const int32_t bits = i * 7919 % 729;  // distinct numbers of six digits to base 3
    pages.push_back({bits / 243, bits / 81 % 3, bits / 27 % 3, bits / 9 % 3, bits / 3 % 3, bits % 3});
    nodes.push_back(tree.Add(tree.root(), pages.back(), i));
  }
  const auto in_common = [](const Tokens& a, const Tokens& b) {
    int32_t n = 0;
    while (n < static_cast<int32_t>(std::min(a.size(), b.size())) && a[n] == b[n]) ++n;
    return n;
  };
  for (int32_t i = 0; i < 729; ++i) {
    Tokens asked = {i / 243, i / 81 % 3, i / 27 % 3, i / 9 % 3, i / 3 % 3, i % 3};
    asked.resize(1 + i % 6);
    int32_t want = 0;
    for (const Tokens& p : pages) want = std::max(want, in_common(p, asked));
    const PrefixTree::Nearest got = tree.FindNearest(tree.root(), asked);
    ASSERT_EQ(got.in_common, want) << i;
    if (want == 0) continue;
    const auto at = std::find(nodes.begin(), nodes.end(), got.node) - nodes.begin();
    ASSERT_EQ(in_common(pages[at], asked), want) << i;
  }
}

TEST(PrefixTree, TheLeastRecentlyUsedGoesFirstAndLeavesBeforeParents) {
  PrefixTree tree;
  auto* a = tree.Add(tree.root(), Tokens{1}, 0);
  auto* a2 = tree.Add(a, Tokens{2}, 1);
  auto* b = tree.Add(tree.root(), Tokens{3}, 2);
  EXPECT_EQ(tree.OldestOnDevice(), nullptr) << "all are in use";
  tree.Unref(a2);
  tree.Unref(a);
  tree.Unref(b);
  EXPECT_EQ(tree.unreferenced_on_device(), 3);
  EXPECT_EQ(tree.OldestOnDevice(), a2);
  tree.Ref(a);  // used again: its child stays the oldest
  tree.Unref(a);
  EXPECT_EQ(tree.OldestOnDevice(), a2);
  tree.Remove(a2);
  EXPECT_EQ(tree.OldestOnDevice(), b) << "a was used after b";
  tree.Remove(b);
  EXPECT_EQ(tree.OldestOnDevice(), a);
  EXPECT_EQ(tree.on_device(), 1);
}

TEST(PrefixTree, WhatIsInUseIsNotEvicted) {
  PrefixTree tree;
  auto* a = tree.Add(tree.root(), Tokens{1}, 0);
  tree.Ref(a);
  tree.Unref(a);
  EXPECT_EQ(tree.OldestOnDevice(), nullptr);
  EXPECT_EQ(tree.unreferenced_on_device(), 0);
  tree.Unref(a);
  EXPECT_EQ(tree.OldestOnDevice(), a);
}

TEST(PrefixTree, PagesMoveToTheHostFromTheLeavesUpAndReturnFromTheRootDown) {
  PrefixTree tree;
  auto* a = tree.Add(tree.root(), Tokens{1}, 0);
  auto* b = tree.Add(a, Tokens{2}, 1);
  tree.Unref(b);
  tree.Unref(a);
  tree.MoveToHost(b, 0);
  EXPECT_EQ(tree.OldestOnDevice(), a);
  EXPECT_EQ(tree.OldestOnHost(), b);
  tree.MoveToHost(a, 1);
  EXPECT_EQ(tree.OldestOnDevice(), nullptr);
  EXPECT_EQ(tree.OldestOnHost(), b) << "a has b below it";
  EXPECT_EQ(tree.on_host(), 2);
  tree.Ref(a);
  tree.MoveToDevice(a, 7);
  tree.Ref(b);
  EXPECT_EQ(tree.OldestOnHost(), nullptr) << "what is to come back is not dropped";
  tree.MoveToDevice(b, 8);
  EXPECT_EQ(tree.on_host(), 0);
  EXPECT_EQ(tree.unreferenced_on_device(), 0);
  EXPECT_EQ(b->page, 8);
}

TEST(PrefixTree, LongChainsEndWithoutRecursion) {
  PrefixTree tree;
  auto* node = tree.root();
  for (int32_t i = 0; i < 300'000; ++i) node = tree.Add(node, Tokens{i}, i);
}

TEST(PrefixTreeDeathTest, MisuseIsOurBug) {
  PrefixTree tree;
  auto* a = tree.Add(tree.root(), Tokens{1}, 0);
  EXPECT_DEATH(tree.Add(tree.root(), Tokens{1}, 1), "invariant broken");
  EXPECT_DEATH(tree.Remove(a), "invariant broken");
  EXPECT_DEATH(tree.MoveToHost(a, 0), "invariant broken");
  tree.Unref(a);
  EXPECT_DEATH(tree.Unref(a), "invariant broken");
}

}  // namespace
}  // namespace tandem::attention
