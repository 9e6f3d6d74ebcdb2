// Which engine gets a sequence, and names that stand for several.
#include "services/gateway/grpc/engine_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <numeric>

#include "services/gateway/testing/fake_engine.h"

namespace tandem::gateway {
namespace {

using testing::FakeEngine;
using ::testing::HasSubstr;

std::vector<int32_t> Prompt(size_t length, int32_t first = 0) {
  std::vector<int32_t> tokens(length);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST(PrefixHashes, AreOfWholePagesAndAllBefore) {
  const auto tokens = Prompt(3 * kAffinityPageTokens + 5);
  const auto hashes = PrefixHashes(tokens);
  ASSERT_EQ(hashes.size(), 3u);
  auto other = tokens;
  other[kAffinityPageTokens + 1] = -1;
  const auto changed = PrefixHashes(other);
  EXPECT_EQ(changed[0], hashes[0]);
  EXPECT_NE(changed[1], hashes[1]);
  EXPECT_NE(changed[2], hashes[2]) << "its page is the same, but not what stands before it";
  EXPECT_TRUE(PrefixHashes(Prompt(kAffinityPageTokens - 1)).empty());
}

TEST(PrefixMemory, ForgetsTheEndsOfTheOldestFirst) {
  PrefixMemory memory(5);
  const std::vector<uint64_t> a = {1, 2, 3}, b = {1, 4, 5}, c = {6, 7};
  EXPECT_EQ(memory.Match(a), 0u);
  memory.Add(a);
  EXPECT_EQ(memory.Match(a), 3u);
  EXPECT_EQ(memory.Match(b), 1u);
  memory.Add(b);  // 1 4 5 2 3
  memory.Add(c);  // 6 7 1 4 5
  EXPECT_EQ(memory.pages(), 5u);
  EXPECT_EQ(memory.Match(a), 1u);
  EXPECT_EQ(memory.Match(b), 3u);
  EXPECT_EQ(memory.Match(c), 2u);
  memory.Clear();
  EXPECT_EQ(memory.Match(b), 0u);
  EXPECT_EQ(memory.pages(), 0u);
}

template <typename Condition>
bool WaitUntil(const Condition& condition) {
  for (int i = 0; i < 30000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  return condition();
}

// A call that hangs until it is cancelled.
class HangingCall final : public EngineListener {
 public:
  void OnEngineEvent(uint64_t, const v1::GenerateEvent&) override {}
  void OnEngineDone(uint64_t, const absl::Status&) override { done = true; }
  std::atomic<bool> done{false};
};

class EnginePoolTest : public ::testing::Test {
 protected:
  void SetUp() override {
    FakeEngine::Script script;
    script.hang = true;
    for (FakeEngine* engine : {&a_, &b_}) {
      engine->SetScript(script);
      engine->Start();
    }
    options_.engine.poll_serving = absl::Milliseconds(10);
    options_.engine.poll_missing = absl::Milliseconds(10);
    options_.resolve_serving = options_.resolve_missing = absl::Milliseconds(10);
  }
  void TearDown() override {
    for (const auto& [call, listener] : calls_) call->Cancel();
    for (const auto& [call, listener] : calls_) EXPECT_TRUE(WaitUntil([&] { return listener->done.load(); }));
    calls_.clear();
  }
  void Create(const std::vector<std::string>& addresses) {
    auto pool = EnginePool::Create(addresses, options_);
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = std::move(*pool);
  }
  bool WaitServing(size_t count) {
    return WaitUntil([&] {
      size_t serving = 0;
      for (const auto& engine : pool_->engines()) serving += engine->serving() ? 1 : 0;
      return serving == count;
    });
  }
  std::string Pick(const std::vector<int32_t>& prompt,
                   std::span<const std::shared_ptr<Engine>> refused = {}) {
    const auto engine = pool_->Pick({"", prompt, refused});
    return engine.ok() ? (*engine)->address() : std::string(engine.status().message());
  }
  std::shared_ptr<Engine> Find(const FakeEngine& fake) {
    for (const auto& engine : pool_->engines()) {
      if (engine->address() == fake.address()) return engine;
    }
    return nullptr;
  }
  void Occupy(const FakeEngine& fake, int calls) {
    const auto engine = Find(fake);
    ASSERT_NE(engine, nullptr);
    for (int i = 0; i < calls; ++i) {
      auto listener = std::make_shared<HangingCall>();
      calls_.emplace_back(engine->Generate({}, absl::InfiniteFuture(), listener, 0), listener);
    }
  }

  FakeEngine a_, b_;
  EnginePoolOptions options_;
  std::unique_ptr<EnginePool> pool_;
  std::vector<std::pair<std::shared_ptr<EngineCall>, std::shared_ptr<HangingCall>>> calls_;
};

TEST_F(EnginePoolTest, LeastLoadedUnlessAnotherHasThePrefix) {
  Create({a_.address(), b_.address()});
  ASSERT_TRUE(WaitServing(2));
  const auto prompt = Prompt(200), other = Prompt(200, 5000), small = Prompt(10);
  EXPECT_EQ(Pick(prompt), a_.address());
  Occupy(a_, 1);
  EXPECT_EQ(Pick(other), b_.address()) << "nobody knows it, and b is idle";
  EXPECT_EQ(Pick(prompt), a_.address()) << "a has it and is not much busier";
  auto continued = prompt;
  continued.resize(300, 7);
  EXPECT_EQ(Pick(continued), a_.address());
  EXPECT_EQ(Pick(small), b_.address()) << "less than a page is no reason";
  // Clearly busier: b computes it as well, and has it from then on.
  Occupy(a_, 4);
  EXPECT_EQ(Pick(prompt), b_.address());
  Occupy(b_, 5);
  EXPECT_EQ(Pick(continued), a_.address()) << "the longer part";
  EXPECT_EQ(Pick(prompt), a_.address()) << "both have it and are as busy: the first";
}

TEST_F(EnginePoolTest, ARestartedEngineHasNoPrefixes) {
  Create({a_.address(), b_.address()});
  ASSERT_TRUE(WaitServing(2));
  const auto prompt = Prompt(200);
  EXPECT_EQ(Pick(prompt), a_.address());
  const std::string instance = Find(a_)->instance_id();
  a_.Stop();
  ASSERT_TRUE(WaitServing(1));
  EXPECT_EQ(Pick(Prompt(100, 900)), b_.address());
  a_.Start();
  ASSERT_TRUE(WaitUntil([&] { return Find(a_)->serving() && Find(a_)->instance_id() != instance; }));
  Occupy(a_, 1);
  EXPECT_EQ(Pick(prompt), b_.address());
}

TEST_F(EnginePoolTest, RefusedAndDegradedEnginesComeLast) {
  Create({a_.address(), b_.address()});
  ASSERT_TRUE(WaitServing(2));
  const auto prompt = Prompt(200);
  EXPECT_EQ(Pick(prompt), a_.address());
  const std::vector<std::shared_ptr<Engine>> refused = {Find(a_)};
  EXPECT_EQ(Pick(prompt, refused), b_.address());
  b_.SetDegraded("no experts");
  ASSERT_TRUE(WaitUntil([&] { return !Find(b_)->degraded().empty(); }));
  EXPECT_EQ(Pick(prompt, refused), a_.address()) << "better full than without experts";
  EXPECT_TRUE(pool_->Ready().ok());
  b_.Stop();
  ASSERT_TRUE(WaitServing(1));
  EXPECT_EQ(Pick(prompt, refused), a_.address());
  a_.Stop();
  ASSERT_TRUE(WaitServing(0));
  EXPECT_THAT(Pick(prompt), HasSubstr(a_.address()));
  EXPECT_THAT(Pick(prompt), HasSubstr(b_.address()));
  EXPECT_FALSE(pool_->status().ok());
}

TEST_F(EnginePoolTest, ANameStandsForAllItsAddresses) {
  std::mutex mutex;
  absl::StatusOr<std::vector<std::string>> found = absl::NotFoundError("no such name: engines.test");
  options_.resolve = [&](const std::string& address) {
    EXPECT_EQ(address, "engines.test:10010");
    const std::lock_guard lock(mutex);
    return found;
  };
  const auto set = [&](absl::StatusOr<std::vector<std::string>> addresses) {
    const std::lock_guard lock(mutex);
    found = std::move(addresses);
  };
  Create({"engines.test:10010"});
  EXPECT_THAT(std::string(pool_->status().message()), HasSubstr("no such name: engines.test"));
  set(std::vector<std::string>{a_.address()});
  ASSERT_TRUE(WaitServing(1));
  EXPECT_TRUE(pool_->status().ok());
  set(std::vector<std::string>{b_.address(), a_.address(), b_.address()});
  ASSERT_TRUE(WaitServing(2));
  // The name server is away: what was known stays.
  set(absl::UnavailableError("name server away"));
  Occupy(a_, 1);
  ASSERT_TRUE(WaitUntil([&] { return a_.running() == 1; }));
  EXPECT_EQ(pool_->engines().size(), 2u);
  // The address of a is gone; its call goes on, and nothing new comes to it.
  std::weak_ptr<Engine> gone = Find(a_);
  set(std::vector<std::string>{b_.address()});
  ASSERT_TRUE(WaitUntil([&] { return pool_->engines().size() == 1; }));
  EXPECT_EQ(Pick(Prompt(100)), b_.address());
  EXPECT_EQ(a_.running(), 1);
  EXPECT_FALSE(gone.expired());
  calls_.front().first->Cancel();
  EXPECT_TRUE(WaitUntil([&] { return gone.expired(); })) << "let go when its last call has ended";
}

TEST(EnginePoolCreate, AddressesAreChecked) {
  for (const char* bad : {"engine", "engine:x", "::1:10010", "1.2.3.4:99999"}) {
    const auto pool = EnginePool::Create({bad}, {});
    EXPECT_EQ(pool.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(pool.status().message()), HasSubstr(bad));
  }
  EXPECT_FALSE(EnginePool::Create({}, {}).ok());
}

}  // namespace
}  // namespace tandem::gateway
