#include "services/attention_gpu/service/choose_gpu.h"

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

// Of a cache of 100 pages of 1 MB.
CudaPlan Plan(uint64_t available_mb) {
  CudaPlan plan;
  plan.weights = 8'000'000'000;
  plan.workspace = 900'000'000;
  plan.cache = 100'000'000;
  plan.available = available_mb * 1'000'000;
  return plan;
}

TEST(PagesThatFit, AsManyAsAreWantedWhereThereIsRoom) {
  EXPECT_EQ(PagesThatFit(Plan(80'000), 100, 1000), 1000);
  EXPECT_EQ(PagesThatFit(Plan(80'000), 100, 100), 100) << "a number that was asked for";
}

TEST(PagesThatFit, NineTenthsOfWhatIsLeft) {
  EXPECT_EQ(PagesThatFit(Plan(10'000), 100, 5000), 100 + 900);
  EXPECT_EQ(PagesThatFit(Plan(9'000), 100, 5000), 100);
  EXPECT_EQ(PagesThatFit(Plan(9'001), 100, 5000), 100);
}

TEST(PagesThatFit, NeverLessThanTheLeast) {
  EXPECT_EQ(PagesThatFit(Plan(5'000), 100, 5000), 100);
  EXPECT_EQ(PagesThatFit(CudaPlan(), 100, 5000), 100);
}

TEST(StreamBufferBytes, AsAskedForOrByTheStep) {
  EXPECT_EQ(StreamBufferBytes(5, 4096), 5'000'000u);
  EXPECT_EQ(StreamBufferBytes(0, 512), 640'000'000u);
  EXPECT_EQ(StreamBufferBytes(0, 4096), 640'000'000u);
  EXPECT_EQ(StreamBufferBytes(0, 16384), 3'072'000'000u);
  EXPECT_EQ(StreamBufferBytes(0, 1 << 20), 6'144'000'000u);
}

}  // namespace
}  // namespace tandem::attention
