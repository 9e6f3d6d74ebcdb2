#include "common/model/cache_sizes.h"

#include <gtest/gtest.h>

namespace tandem::model {
namespace {

ModelConfig R1() {
  ModelConfig c;
  c.max_position_embeddings = 163840;
  c.num_hidden_layers = 61;
  c.kv_lora_rank = 512;
  c.qk_rope_head_dim = 64;
  return c;
}

TEST(CacheSizes, R1InHostMemory) {
  EXPECT_EQ(DefaultContext(R1()), 8192);
  EXPECT_EQ(CacheBytesPerToken(R1(), 4), 140544);
  EXPECT_EQ(CacheBytesPerToken(R1(), 2), 70272);
  EXPECT_EQ(DefaultCacheTokens(R1(), 8192, 1), 8192);
  EXPECT_EQ(DefaultCacheTokens(R1(), 8192, 16), 15279) << "2 GiB";
  EXPECT_EQ(DefaultCacheTokens(R1(), 163840, 16), 163840) << "one context at least";
}

TEST(CacheSizes, ASmallModelHasAContextForEachOfTheBatch) {
  ModelConfig c = R1();
  c.max_position_embeddings = 4096;
  c.num_hidden_layers = 6;
  EXPECT_EQ(DefaultContext(c), 4096);
  EXPECT_EQ(DefaultCacheTokens(c, 4096, 16), 65536);
}

TEST(CacheSizes, TheHostTierIsAPartOfWhatIsLeft) {
  EXPECT_EQ(DefaultHostTierBytes(0), 0u);
  EXPECT_EQ(DefaultHostTierBytes(1'999'999'999), 0u);
  EXPECT_EQ(DefaultHostTierBytes(2'000'000'000), 500'000'000u);
  EXPECT_EQ(DefaultHostTierBytes(16'000'000'000), 4'000'000'000u);
  EXPECT_EQ(DefaultHostTierBytes(500'000'000'000), 8'000'000'000u);
}

}  // namespace
}  // namespace tandem::model
