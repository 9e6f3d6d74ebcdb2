#include "services/attention_gpu/kv/kv_cache.h"

#include <map>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "services/attention_gpu/scheduler/hash_backend.h"

namespace tandem::attention {
namespace {

using Tokens = std::vector<int32_t>;
constexpr int32_t kPage = kHashPageTokens;
constexpr int64_t kPageBytes = kPage * static_cast<int64_t>(sizeof(int32_t));

HostPages Host(int32_t pages) { return std::move(*HostPages::Create(pages * kPageBytes, kPageBytes)); }

Tokens Count(int32_t from, int32_t n) {
  Tokens t;
  for (int32_t i = 0; i < n; ++i) t.push_back(from + i);
  return t;
}

// A sequence as the scheduler drives it: takes what is known, computes the rest.
struct User {
  Tokens tokens;
  int32_t computed = 0;
  SequencePages pages;
};

class KvCacheTest : public testing::Test {
 protected:
  void Make(int32_t pages, int32_t host_pages, bool prefix_cache = true) {
    backend_ = std::make_unique<HashBackend>(pages, script_);
    kv_ = std::make_unique<KvCache>(*backend_, prefix_cache, Host(host_pages));
  }
  int32_t Adopt(User& u) {
    const int32_t gained = kv_->Adopt(u.tokens, u.computed, u.pages);
    u.computed += gained;
    return gained;
  }
  int32_t CopyPart(User& u) {
    const int32_t gained = kv_->CopyPart(u.tokens, u.computed, u.pages);
    u.computed += gained;
    return gained;
  }
  // Writes up to `to` tokens; false if there are no pages.
  bool Compute(User& u, int32_t to) {
    if (!kv_->Reserve(to, u.pages)) return false;
    for (int32_t p = u.computed; p < to; ++p) {
      backend_->At(u.pages.pages[p / kPage], p % kPage) = u.tokens[p];
    }
    u.computed = std::max(u.computed, to);
    kv_->Commit(u.tokens, u.computed, u.pages);
    return true;
  }
  void CheckContents(const User& u) {
    for (int32_t p = 0; p < u.computed; ++p) {
      ASSERT_EQ(backend_->At(u.pages.pages[p / kPage], p % kPage), u.tokens[p]) << "position " << p;
    }
  }
  // One that begins with what is known and computes the rest.
  User Whole(Tokens tokens) {
    User u;
    u.tokens = std::move(tokens);
    Adopt(u);
    EXPECT_TRUE(Compute(u, static_cast<int32_t>(u.tokens.size())));
    CheckContents(u);
    return u;
  }

  HashScript script_;
  std::unique_ptr<HashBackend> backend_;
  std::unique_ptr<KvCache> kv_;
};

TEST_F(KvCacheTest, FullPagesAreSharedAndOneTokenIsLeftToCompute) {
  Make(16, 0);
  User a = Whole(Count(0, 10));
  User b;
  b.tokens = Count(0, 8);
  EXPECT_EQ(kv_->Probe(b.tokens).pages, 1);
  EXPECT_EQ(kv_->Probe(b.tokens).free_of_cost, 1);
  EXPECT_EQ(Adopt(b), 4) << "of two full pages the second holds the token that is to be computed";
  EXPECT_EQ(b.pages.pages[0], a.pages.pages[0]);
  EXPECT_TRUE(Compute(b, 8));
  EXPECT_EQ(b.pages.pages[1], a.pages.pages[1]) << "the same page once more is given up";
  EXPECT_EQ(kv_->Statistics().used, 3);
  kv_->Release(a.pages);
  CheckContents(b);
  EXPECT_EQ(kv_->Statistics().used, 2);
  kv_->Release(b.pages);
  EXPECT_EQ(kv_->Statistics().used, 0);
  EXPECT_EQ(kv_->Statistics().cached, 2);
  EXPECT_EQ(kv_->available(), 16);
}

TEST_F(KvCacheTest, WithoutPrefixCacheNothingIsShared) {
  Make(16, 0, /*prefix_cache=*/false);
  User a = Whole(Count(0, 10));
  User b;
  b.tokens = Count(0, 10);
  EXPECT_EQ(Adopt(b), 0);
  kv_->Release(a.pages);
  EXPECT_EQ(kv_->Statistics().cached, 0);
  EXPECT_EQ(kv_->Statistics().used, 0);
}

TEST_F(KvCacheTest, EvictionNeverTouchesWhatIsInUse) {
  Make(4, 0);
  User a = Whole(Count(0, 8));
  User b = Whole(Count(100, 8));
  User c;
  c.tokens = Count(200, 4);
  EXPECT_FALSE(Compute(c, 4));
  kv_->Release(b.pages);
  EXPECT_TRUE(Compute(c, 4));
  EXPECT_EQ(kv_->Statistics().evicted, 1u);
  CheckContents(a);
  User d;
  d.tokens = Count(100, 8);
  EXPECT_EQ(kv_->Probe(Count(100, 9)).pages, 1) << "the end of the chain went first";
}

TEST_F(KvCacheTest, PagesGoToTheHostAndComeBackWithTheirContents) {
  Make(4, 8);
  User a = Whole(Count(0, 13));
  kv_->Release(a.pages);
  User b = Whole(Count(100, 13));
  kv_->Release(b.pages);
  EXPECT_EQ(kv_->Statistics().host_used, 3);
  User again;
  again.tokens = Count(0, 13);
  EXPECT_EQ(kv_->Probe(again.tokens).pages, 3);
  EXPECT_EQ(Adopt(again), 12);
  CheckContents(again);
  EXPECT_EQ(kv_->Statistics().host_returned, 3u);
  EXPECT_EQ(kv_->Statistics().host_evicted, 0u);
}

TEST_F(KvCacheTest, AFullHostTierDropsItsOldest) {
  Make(4, 2);
  for (int32_t i = 0; i < 5; ++i) {
    User u = Whole(Count(100 * i, 13));
    kv_->Release(u.pages);
  }
  const KvStatistics s = kv_->Statistics();
  EXPECT_EQ(s.host_used, 2);
  EXPECT_EQ(s.host_stored - s.host_evicted, 2u);
  EXPECT_EQ(kv_->Probe(Count(0, 13)).pages, 0);
}

// Pages are a cache: one that cannot be copied is lost, nothing else.
TEST_F(KvCacheTest, FailedCopiesLoseThePagesOnly) {
  Make(4, 8);
  User a = Whole(Count(0, 13));
  kv_->Release(a.pages);
  User b = Whole(Count(100, 13));
  kv_->Release(b.pages);
  script_.FailCopies(true);
  User again = Whole(Count(0, 13));
  EXPECT_EQ(kv_->Statistics().host_returned, 0u);
  kv_->Release(again.pages);
  script_.FailCopies(false);
  EXPECT_EQ(kv_->available(), 4);
  const int32_t known = kv_->Probe(Count(0, 13)).pages;
  User once_more = Whole(Count(0, 13));
  EXPECT_EQ(known, 3);
  CheckContents(once_more);
}

TEST_F(KvCacheTest, AReservedPageIsGivenUpForAKnownOne) {
  Make(8, 0);
  User a;
  a.tokens = Count(0, 9);
  EXPECT_TRUE(kv_->Reserve(9, a.pages));  // its step fails
  User b = Whole(Count(0, 9));
  EXPECT_EQ(Adopt(a), 8);
  EXPECT_TRUE(Compute(a, 9));
  CheckContents(a);
  kv_->Release(a.pages);
  kv_->Release(b.pages);
  EXPECT_EQ(kv_->Statistics().used, 0);
}

// Another one is faster with the same page: who is in the middle of it goes on with his own until it is full.
TEST_F(KvCacheTest, NothingIsTakenOverInTheMiddleOfAPage) {
  Make(16, 0);
  User a;
  a.tokens = Count(0, 20);
  EXPECT_TRUE(Compute(a, 6));
  User b = Whole(Count(0, 20));
  EXPECT_EQ(Adopt(a), 0);
  EXPECT_TRUE(Compute(a, 8));
  EXPECT_EQ(a.pages.pages[1], b.pages.pages[1]);
  EXPECT_EQ(Adopt(a), 8);
  CheckContents(a);
}

// The page that holds the last token of a known prompt is copied; only that token is computed again.
TEST_F(KvCacheTest, OfAKnownPromptOneTokenIsLeft) {
  for (const int32_t host : {0, 16}) {
    Make(16, host);
    User a = Whole(Count(0, 8));
    if (host > 0) {  // from the host tier as well
      kv_->Release(a.pages);
      User other = Whole(Count(100, 61));
      EXPECT_EQ(kv_->Statistics().host_used, 2);
      kv_->Release(other.pages);
    }
    User b;
    b.tokens = Count(0, 8);
    EXPECT_EQ(Adopt(b), 4);
    EXPECT_EQ(CopyPart(b), 3);
    CheckContents(b);
    if (host == 0) {
      EXPECT_NE(b.pages.pages[1], a.pages.pages[1]) << "a page that will be written has one owner";
    }
    EXPECT_EQ(Adopt(b) + CopyPart(b), 0) << "in the middle of a page";
    EXPECT_TRUE(Compute(b, 8));
    CheckContents(b);
    if (host == 0) {
      EXPECT_EQ(b.pages.pages[1], a.pages.pages[1]) << "full, it is the known page again";
      kv_->Release(a.pages);
    }
    EXPECT_EQ(kv_->Statistics().used, 2);
    kv_->Release(b.pages);
    EXPECT_EQ(kv_->available(), 16);
  }
}

TEST_F(KvCacheTest, TheBeginningOfANearPageIsCopied) {
  Make(16, 0);
  for (const Tokens& t : {Tokens{1, 2, 3, 4}, Tokens{1, 2, 7, 8}, Tokens{5, 6, 7, 8}}) {
    User u = Whole(t);
    kv_->Release(u.pages);
  }
  const auto gain = [this](const Tokens& t) {
    User u;
    u.tokens = t;
    const int32_t gained = CopyPart(u);
    CheckContents(u);
    kv_->Release(u.pages);
    return gained;
  };
  EXPECT_EQ(gain({1, 2, 7, 9, 9}), 3);
  EXPECT_EQ(gain({1, 2, 9, 9}), 2);
  EXPECT_EQ(gain({1, 2, 0}), 2);
  EXPECT_EQ(gain({5, 6, 7, 8}), 3) << "one token is left to compute";
  EXPECT_EQ(gain({5}), 0);
  EXPECT_EQ(gain({9, 2, 3, 4}), 0);
  EXPECT_EQ(gain({1, 2, 3, 4, 5}), 0) << "a whole page is taken over, not copied";
  EXPECT_EQ(kv_->Statistics().used, 0);
}

TEST_F(KvCacheTest, NothingIsCopiedWithoutRoomOrAfterAFailure) {
  Make(3, 0);
  User a = Whole(Count(0, 8));
  User other = Whole(Count(100, 2));
  User b;
  b.tokens = Count(0, 8);
  EXPECT_EQ(Adopt(b), 4);
  EXPECT_EQ(CopyPart(b), 0) << "no page";
  kv_->Release(other.pages);
  script_.FailCopies(true);
  EXPECT_EQ(CopyPart(b), 0);
  EXPECT_TRUE(Compute(b, 8));
  CheckContents(b);
  kv_->Release(a.pages);
  kv_->Release(b.pages);
  EXPECT_EQ(kv_->Statistics().used, 0);
}

// Random use against what must always hold: contents, no page with two owners, and no page lost.
class RandomUse : public KvCacheTest, public testing::WithParamInterface<int> {};

TEST_P(RandomUse, KeepsEveryPageAndEveryContent) {
  const int32_t host = GetParam();
  constexpr int32_t kPages = 24;
  Make(kPages, host);
  std::mt19937 rng(host + 1);
  auto below = [&rng](int n) { return static_cast<int>(rng() % n); };
  std::vector<std::unique_ptr<User>> users;
  int64_t adopted = 0, copied = 0;
  for (int step = 0; step < 20000; ++step) {
    script_.FailCopies(below(20) == 0);
    const int what = below(10);
    if (what < 3 && users.size() < 6) {
      auto u = std::make_unique<User>();
      // Few alphabets and lengths, so that beginnings are often alike.
      const int family = below(4);
      const int n = 2 + below(40);
      for (int i = 0; i < n; ++i) u->tokens.push_back(family * 100 + (below(30) == 0 ? 50 + below(2) : i));
      adopted += Adopt(*u);
      if (below(2) == 0) copied += CopyPart(*u);
      users.push_back(std::move(u));
    } else if (what < 8 && !users.empty()) {
      User& u = *users[below(static_cast<int>(users.size()))];
      if (below(2) == 0) adopted += Adopt(u);
      if (below(2) == 0) copied += CopyPart(u);
      const int32_t left = static_cast<int32_t>(u.tokens.size()) - u.computed;
      if (left > 0 && below(8) == 0) {
        kv_->Reserve(u.computed + 1 + below(left), u.pages);  // a step that fails
      } else if (left > 0) {
        Compute(u, u.computed + 1 + below(left));
      } else {
        u.tokens.push_back(900 + below(2));  // as if generated
      }
    } else if (!users.empty()) {
      const int i = below(static_cast<int>(users.size()));
      kv_->Release(users[i]->pages);
      users.erase(users.begin() + i);
    }

    std::map<int32_t, const PrefixTree::Node*> owner;  // nullptr: a sequence's own
    for (const auto& u : users) {
      ASSERT_NO_FATAL_FAILURE(CheckContents(*u));
      ASSERT_LE(u->pages.shared.size(), u->pages.pages.size());
      for (size_t i = 0; i < u->pages.pages.size(); ++i) {
        const PrefixTree::Node* node = i < u->pages.shared.size() ? u->pages.shared[i] : nullptr;
        const auto [it, fresh] = owner.emplace(u->pages.pages[i], node);
        ASSERT_TRUE(fresh || (node != nullptr && it->second == node)) << "a page has two owners";
        if (node != nullptr) {
          ASSERT_EQ(node->page, u->pages.pages[i]);
        }
      }
    }
    std::map<const PrefixTree::Node*, int> refs;
    for (const auto& u : users) {
      for (const auto* node : u->pages.shared) ++refs[node];
    }
    for (const auto& [node, n] : refs) ASSERT_EQ(node->refs, n);
    const KvStatistics now = kv_->Statistics();
    ASSERT_EQ(now.used, static_cast<int32_t>(owner.size()));
    ASSERT_EQ(now.used + kv_->available(), kPages);
    ASSERT_LE(now.cached, kv_->available());
    ASSERT_LE(now.host_used, host);
  }
  EXPECT_GT(adopted, 1000);
  EXPECT_GT(copied, 100);
  EXPECT_GT(kv_->Statistics().evicted, 100u);
  if (host > 0) {
    EXPECT_GT(kv_->Statistics().host_returned, 100u);
  }
  for (const auto& u : users) kv_->Release(u->pages);
  EXPECT_EQ(kv_->Statistics().used, 0);
  // Every page can be had by one.
  SequencePages all;
  EXPECT_TRUE(kv_->Reserve(kPages * kPage, all));
  EXPECT_EQ(std::set<int32_t>(all.pages.begin(), all.pages.end()).size(), static_cast<size_t>(kPages));
  kv_->Release(all);
}

INSTANTIATE_TEST_SUITE_P(HostPages, RandomUse, testing::Values(0, 3, 40));

// The tree's answers against a plain list of all chains that were ever committed: with room for all,
// everything is found, and nothing that was not there.
TEST_F(KvCacheTest, FindsExactlyWhatAPlainListFinds) {
  Make(4096, 0);
  std::set<Tokens> known;
  std::mt19937 rng(3);
  for (int i = 0; i < 300; ++i) {
    Tokens t;
    const int n = 1 + static_cast<int>(rng() % 40);
    for (int j = 0; j < n; ++j) t.push_back(static_cast<int32_t>(rng() % 8 == 0));
    int32_t want = 0;
    while ((want + 1) * kPage < n && known.count(Tokens(t.begin(), t.begin() + (want + 1) * kPage)) > 0)
      ++want;
    ASSERT_EQ(kv_->Probe(t).pages, want);
    User u = Whole(t);
    for (int j = kPage; j <= n; j += kPage) known.insert(Tokens(t.begin(), t.begin() + j));
    kv_->Release(u.pages);
  }
}

}  // namespace
}  // namespace tandem::attention
