#include "services/attention_gpu/backend/cpu/mla_attention.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include <gtest/gtest.h>

namespace tandem::attention {
namespace {

constexpr int64_t kLayers = 2, kHeads = 3, kLora = 24, kRope = 8, kWidth = kLora + kRope;
constexpr int32_t kPageTokens = 16, kPages = 12;

struct Fixture {
  explicit Fixture(uint32_t seed) : rng(seed) {
    cache = std::move(*LatentCache::Create(kLayers, kPages, kPageTokens, kWidth));
    table = {7, 2, 9, 0, 5};
    query.resize(kHeads * kWidth);
    std::normal_distribution<float> d;
    for (int64_t p = 0; p < kPageTokens * static_cast<int64_t>(table.size()); ++p) {
      for (int64_t i = 0; i < kWidth; ++i) cache.Entry(1, table, p)[i] = d(rng);
    }
    for (float& q : query) q = d(rng);
  }
  std::vector<float> Attend(int64_t position) {
    std::vector<float> out(kHeads * kLora, -1);
    MlaScratch scratch;
    MlaAttend(cache, 1, table, position, kHeads, kLora, query.data(), out.data(), scratch);
    return out;
  }
  std::vector<double> Naive(int64_t position) {
    std::vector<double> out(kHeads * kLora, 0);
    for (int64_t h = 0; h < kHeads; ++h) {
      std::vector<double> p;
      double sum = 0;
      for (int64_t t = 0; t <= position; ++t) {
        double s = 0;
        for (int64_t i = 0; i < kWidth; ++i) s += double{query[h * kWidth + i]} * cache.Entry(1, table, t)[i];
        p.push_back(std::exp(s));
        sum += p.back();
      }
      for (int64_t t = 0; t <= position; ++t) {
        for (int64_t i = 0; i < kLora; ++i) out[h * kLora + i] += p[t] / sum * cache.Entry(1, table, t)[i];
      }
    }
    return out;
  }
  std::mt19937 rng;
  LatentCache cache;
  std::vector<int32_t> table;
  std::vector<float> query;
};

TEST(MlaAttend, EqualsANaiveSoftmaxAtEveryLength) {
  Fixture f(3);
  for (int64_t position = 0; position < kPageTokens * 5; ++position) {
    const auto got = f.Attend(position);
    const auto want = f.Naive(position);
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 2e-5) << "position " << position;
  }
}

TEST(MlaAttend, DoesNotLookBeyondThePosition) {
  Fixture f(4);
  const auto before = f.Attend(20);
  for (int64_t p = 21; p < kPageTokens * 5; ++p) {
    std::fill_n(f.cache.Entry(1, f.table, p), kWidth, 1e9f);
  }
  EXPECT_EQ(before, f.Attend(20));
}

TEST(MlaAttend, TheBitsDoNotDependOnWhichPagesHoldTheTokens) {
  Fixture f(5);
  const auto before = f.Attend(50);
  const std::vector<int32_t> moved = {1, 3, 4, 6, 8};
  for (size_t i = 0; i < moved.size(); ++i) {
    std::memcpy(f.cache.Page(1, moved[i]), f.cache.Page(1, f.table[i]), kPageTokens * kWidth * sizeof(float));
  }
  f.table = moved;
  EXPECT_EQ(before, f.Attend(50));
}

// Chunks of a prompt, wherever they begin and end, heads together or apart: what each token alone gets.
TEST(MlaAttend, TokensTogetherGetWhatEachAloneGets) {
  Fixture f(7);
  for (const auto& [position, tokens] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 1}, {0, 16}, {0, 41}, {5, 3}, {14, 4}, {16, 33}, {31, 1}, {47, 33}}) {
    std::normal_distribution<float> d;
    std::vector<float> query(tokens * kHeads * kWidth), out(tokens * kHeads * kLora, -1);
    for (float& q : query) q = d(f.rng);
    MlaScratch scratch;
    MlaAttend(f.cache, 1, f.table, position, tokens, kHeads, kLora, query.data(), out.data(), scratch);
    for (int64_t row = 0; row < tokens * kHeads; ++row) {
      std::vector<float> alone(kLora, -1);
      MlaAttend(f.cache, 1, f.table, position + row / kHeads, 1, kLora, query.data() + row * kWidth,
                alone.data(), scratch);
      EXPECT_EQ(alone, std::vector<float>(out.begin() + row * kLora, out.begin() + (row + 1) * kLora))
          << position << " + " << row / kHeads << ", head " << row % kHeads;
    }
  }
}

TEST(MlaAttend, LargeScoresDoNotOverflow) {
  Fixture f(6);
  for (float& q : f.query) q *= 1000;
  for (float v : f.Attend(60)) EXPECT_TRUE(std::isfinite(v));
}

}  // namespace
}  // namespace tandem::attention
