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

std::vector<int32_t> Tokens(const std::vector<StreamStep>& steps) {
  std::vector<int32_t> out;
  for (const StreamStep& s : steps) out.push_back(s.tokens);
  return out;
}

TEST(StreamSteps, AsAskedForWithLessMemoryIfThereIsNoMore) {
  Options o;
  o.stream_chunk_size = 6000;
  EXPECT_EQ(StreamSteps(o, 8192),
            (std::vector<StreamStep>{{6000, 1'470'000'000}, {6000, 750'000'000}, {6000, 640'000'000}}));
  o.stream_buffer_mb = 900;
  EXPECT_EQ(StreamSteps(o, 8192), (std::vector<StreamStep>{{6000, 900'000'000}}));
  o.stream_chunk_size = 512;
  o.stream_buffer_mb = 0;
  EXPECT_EQ(StreamSteps(o, 8192), (std::vector<StreamStep>{{512, 640'000'000}}));
  o.stream_chunk_size = 65536;
  EXPECT_EQ(StreamSteps(o, 8192)[0], (StreamStep{65536, 6'144'000'000}));
}

TEST(StreamSteps, ByTheContext) {
  Options o;
  const StreamStep least{4096, 640'000'000}, last{4096, 384'000'000};
  EXPECT_EQ(StreamSteps(o, 4096), (std::vector<StreamStep>{least, last}));
  EXPECT_EQ(StreamSteps(o, 8192), (std::vector<StreamStep>{{8192, 384'000'000}, least, last}));
  const StreamStep ample{8192, 2'007'040'000}, some{8192, 1'024'000'000}, tight{8192, 640'000'000};
  EXPECT_EQ(StreamSteps(o, 10000), (std::vector<StreamStep>{{10000, 2'450'000'000},
                                                            {10000, 1'250'000'000},
                                                            {10000, 640'000'000},
                                                            ample,
                                                            some,
                                                            tight,
                                                            least,
                                                            last}));
  const StreamStep large{16384, 2'048'000'000}, large_tight{16384, 640'000'000};
  for (const int32_t context : {16384, 32768}) {
    EXPECT_EQ(StreamSteps(o, context),
              (std::vector<StreamStep>{
                  {16384, 4'014'080'000}, large, large_tight, ample, some, tight, least, last}));
  }
  // The KV cache of long contexts needs the memory more.
  EXPECT_EQ(StreamSteps(o, 131072), (std::vector<StreamStep>{large, large_tight, some, tight, least, last}));
  o.stream_buffer_mb = 1000;
  EXPECT_EQ(Tokens(StreamSteps(o, 131072)), std::vector<int32_t>({16384, 8192, 4096}));
}

TEST(StreamSteps, NoLargerThanAllSequencesTogether) {
  Options o;
  o.max_batch_size = 3;
  EXPECT_EQ(Tokens(StreamSteps(o, 1000)), std::vector<int32_t>({3000, 3000}));
}

}  // namespace
}  // namespace tandem::attention
