#include "services/attention_gpu/experts/shard_cover.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

using testing::HasSubstr;

model::ModelConfig Config() {
  model::ModelConfig c;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 8;
  c.moe_intermediate_size = 512;
  return c;
}
ShardExtent Shard(const char* name, int e0, int e1, int r0, int r1, std::vector<int64_t> layers = {1, 2}) {
  return {name, std::move(layers), e0, e1, r0, r1};
}
std::string Message(const std::vector<ShardExtent>& s) {
  return std::string(CheckShardCover(s, Config()).message());
}

TEST(ShardCover, WholeModelsAreAccepted) {
  EXPECT_EQ(Message({Shard("a", 0, 8, 0, 512)}), "");
  EXPECT_EQ(Message({Shard("a", 0, 8, 0, 256), Shard("b", 0, 8, 256, 512)}), "");
  EXPECT_EQ(Message({Shard("a", 0, 3, 0, 512), Shard("b", 3, 8, 0, 256), Shard("c", 3, 8, 256, 512)}), "");
  EXPECT_EQ(Message({Shard("a", 0, 8, 0, 512, {1}), Shard("b", 0, 8, 0, 512, {2})}), "");
}

TEST(ShardCover, MissingPartsAreToldWithTheirShare) {
  EXPECT_THAT(Message({Shard("a", 0, 8, 0, 256)}), HasSubstr("hold 50 % of the experts of layer 1"));
  EXPECT_THAT(Message({Shard("a", 0, 8, 0, 512, {1})}), HasSubstr("hold 0 % of the experts of layer 2"));
}

TEST(ShardCover, DoubledPartsAreToldWithTheirHolders) {
  EXPECT_THAT(Message({Shard("a", 0, 5, 0, 512), Shard("b", 4, 8, 0, 512)}),
              HasSubstr("a and b both hold experts [4, 5)"));
}

TEST(ShardCover, NonsenseIsRefused) {
  EXPECT_THAT(Message({Shard("a", 0, 9, 0, 512)}), HasSubstr("outside 8 x 512"));
  EXPECT_THAT(Message({Shard("a", 5, 5, 0, 512)}), HasSubstr("outside"));
}

TEST(NeedsFloatActivations, OnlyForFloatWeights) {
  EXPECT_FALSE(NeedsFloatActivations({"Q4_K", "Q6_K"}));
  EXPECT_TRUE(NeedsFloatActivations({"Q4_K", "BF16"}));
  EXPECT_TRUE(NeedsFloatActivations({"F32"}));
}

}  // namespace
}  // namespace tandem::attention
