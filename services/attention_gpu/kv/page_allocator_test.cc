#include "services/attention_gpu/kv/page_allocator.h"

#include <random>
#include <set>

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

TEST(PageAllocator, GivesEachPageOnce) {
  PageAllocator a(4);
  std::vector<int32_t> p;
  ASSERT_TRUE(a.Allocate(4, p));
  EXPECT_EQ(std::set<int32_t>(p.begin(), p.end()).size(), 4u);
  EXPECT_EQ(a.free(), 0);
  std::vector<int32_t> q;
  EXPECT_FALSE(a.Allocate(1, q));
  EXPECT_TRUE(q.empty());
}

TEST(PageAllocator, AFailedAllocationTakesNothing) {
  PageAllocator a(3);
  std::vector<int32_t> p;
  EXPECT_FALSE(a.Allocate(4, p));
  EXPECT_TRUE(p.empty());
  EXPECT_EQ(a.free(), 3);
}

TEST(PageAllocator, PagesAreConservedOverRandomUse) {
  std::mt19937 rng(7);
  PageAllocator a(64);
  std::vector<std::vector<int32_t>> held(8);
  for (int i = 0; i < 20000; ++i) {
    auto& h = held[rng() % held.size()];
    if (rng() % 3 == 0) {
      a.Release(h);
      EXPECT_TRUE(h.empty());
    } else {
      a.Allocate(static_cast<int32_t>(rng() % 5), h);
    }
    std::set<int32_t> all;
    size_t n = 0;
    for (const auto& v : held) {
      all.insert(v.begin(), v.end());
      n += v.size();
    }
    ASSERT_EQ(all.size(), n) << "a page was given out twice";
    ASSERT_EQ(static_cast<int32_t>(n) + a.free(), a.total());
  }
}

TEST(PageAllocatorDeathTest, ADoubleReleaseIsOurBug) {
  PageAllocator a(2);
  std::vector<int32_t> p;
  ASSERT_TRUE(a.Allocate(1, p));
  std::vector<int32_t> copy = p;
  a.Release(p);
  EXPECT_DEATH(a.Release(copy), "invariant broken");
}

}  // namespace
}  // namespace tandem::attention
