// The scheduler under random load: arrivals, lengths, common beginnings, cancellations, deadlines, too few
// pages, lost experts. Whatever happens, each sequence's text is the text it has alone, nobody starves and no
// page is lost.
#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "services/attention_gpu/scheduler/hash_backend.h"
#include "services/attention_gpu/scheduler/sink.h"

namespace tandem::attention {
namespace {

struct Case {
  const char* name;
  int32_t pages;
  int32_t host_pages;
  bool prefix_cache;
  int lose_every;
  int batch;
  bool crowded;  // so that sequences have to make way
};

class Simulation : public testing::TestWithParam<Case> {};

struct Asked {
  std::vector<int32_t> prompt;
  int count = 0;
  bool cancelled = false;
  bool deadline = false;
  uint64_t number = 0;
  Sink sink;
};

TEST_P(Simulation, EveryTextIsTheTextAloneAndNothingLeaks) {
  const Case& c = GetParam();
  HashScript script;
  script.LoseEvery(c.lose_every);
  SchedulerOptions o;
  o.context_length = 128;
  o.max_batch_size = c.batch;
  o.max_waiting = 500;
  o.chunk_size = 24;
  o.mixed_chunk_size = 10;
  o.vocab_size = kHashVocab;
  o.prefix_cache = c.prefix_cache;
  o.kv_host_bytes = c.host_pages * int64_t{kHashPageTokens} * 4;
  auto made = Scheduler::Create(o, std::make_unique<HashBackend>(c.pages, script));
  ASSERT_TRUE(made.ok()) << made.status();
  Scheduler& s = **made;

  std::mt19937 rng(c.pages + c.batch);
  auto below = [&rng](int n) { return static_cast<int>(rng() % n); };
  std::vector<std::vector<int32_t>> beginnings(5);
  for (auto& b : beginnings) {
    for (int i = below(60); i >= 0; --i) b.push_back(below(kHashVocab));
  }
  std::vector<std::unique_ptr<Asked>> all;
  constexpr int kSequences = 400;
  while (static_cast<int>(all.size()) < kSequences) {
    auto a = std::make_unique<Asked>();
    if (below(4) > 0) a->prompt = beginnings[below(5)];
    for (int i = below(50); i >= 0; --i) a->prompt.push_back(below(kHashVocab));
    // A further turn of a conversation that has ended.
    if (!all.empty() && below(4) == 0) {
      const Asked& old = *all[below(static_cast<int>(all.size()))];
      const auto text = old.sink.tokens();
      if (old.sink.ended() && old.prompt.size() + text.size() < 100) {
        a->prompt = old.prompt;
        a->prompt.insert(a->prompt.end(), text.begin(), text.end());
        a->prompt.push_back(below(kHashVocab));
      }
    }
    a->count = 1 + below(std::min(60, 128 - static_cast<int>(a->prompt.size())));
    SequenceRequest r;
    r.prompt = a->prompt;
    r.max_new_tokens = a->count;
    if (below(20) == 0) {
      a->deadline = true;
      r.deadline = absl::Now() + absl::Microseconds(200 + below(3000));
    }
    const auto number = s.Submit(r, a->sink.callback());
    if (absl::IsDeadlineExceeded(number.status())) continue;
    ASSERT_TRUE(number.ok()) << number.status();
    a->number = *number;
    all.push_back(std::move(a));
    if (below(6) == 0) {
      Asked& victim = *all[below(static_cast<int>(all.size()))];
      victim.cancelled = true;
      s.Cancel(victim.number);
    }
    if (below(3) == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(500)));
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Asked& a = *all[i];
    const auto want = HashAnswer(a.prompt, a.count);
    if (!a.cancelled) a.sink.Wait();
    const auto got = a.sink.tokens();
    if (a.cancelled || (a.deadline && !a.sink.status().ok())) {
      // What came until then is the beginning of the right text.
      ASSERT_LE(got.size(), want.size());
      EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin())) << "sequence " << i;
      continue;
    }
    EXPECT_TRUE(a.sink.status().ok()) << a.sink.status();
    EXPECT_EQ(got, want) << "sequence " << i;
  }
  EXPECT_TRUE(s.Drain(absl::Seconds(30)));
  const SchedulerSnapshot now = s.Snapshot();
  EXPECT_EQ(now.running, 0);
  EXPECT_EQ(now.waiting, 0);
  EXPECT_EQ(now.kv.used, 0) << "a page is held by nobody";
  EXPECT_EQ(now.preemptions > 0, c.crowded);
  EXPECT_EQ(now.hit_tokens > 0, c.prefix_cache);
  EXPECT_EQ(now.expert_recoveries > 0, c.lose_every > 0);
  if (c.host_pages > 0) {
    EXPECT_GT(now.kv.host_returned, 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Load, Simulation,
                         testing::Values(Case{"AmpleRoom", 400, 0, true, 0, 8, false},
                                         Case{"NoPrefixCache", 60, 0, false, 0, 8, true},
                                         Case{"FewPages", 40, 0, true, 0, 8, true},
                                         Case{"FewPagesAndAHost", 40, 100, true, 0, 8, true},
                                         Case{"OneContextOnly", 32, 20, true, 0, 16, true},
                                         Case{"Losses", 60, 40, true, 7, 8, true},
                                         Case{"LossesWithoutCache", 40, 0, false, 5, 3, true},
                                         Case{"OneAtATime", 40, 0, true, 0, 1, false}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace tandem::attention
