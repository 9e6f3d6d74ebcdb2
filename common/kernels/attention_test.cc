#include "common/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "common/kernels/kernels.h"

namespace tandem::kernels {
namespace {

struct Case {
  int64_t heads, width, values, pages, page_tokens, last;
};

struct State {
  std::vector<float> max, sum, out;
};

class Attention {
 public:
  Attention(const Case& c, uint32_t seed) : c_(c) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> d;
    query_.resize(c.heads * c.width);
    for (float& q : query_) q = d(rng) * 0.3f;
    keys_.resize(c.pages * c.page_tokens * c.width);
    for (float& k : keys_) k = d(rng);
  }
  int64_t tokens(int64_t page) const { return page + 1 < c_.pages ? c_.page_tokens : c_.last; }

  // every > 0: rows see different numbers of keys, some none.
  State Run(int64_t every = 0) const {
    State s{std::vector<float>(c_.heads, -std::numeric_limits<float>::infinity()),
            std::vector<float>(c_.heads, 0.0f), std::vector<float>(c_.heads * c_.values, 0.0f)};
    std::vector<float> scores(c_.heads * c_.page_tokens);
    std::vector<int32_t> seen(c_.heads);
    for (int64_t p = 0; p < c_.pages; ++p) {
      for (int64_t h = 0; h < c_.heads; ++h) {
        seen[h] =
            static_cast<int32_t>(p == 0 ? std::min(tokens(p), 1 + h * every) : h * every % (tokens(p) + 1));
      }
      AttendPage(query_.data(), c_.heads, c_.width, keys_.data() + p * c_.page_tokens * c_.width, tokens(p),
                 every == 0 ? nullptr : seen.data(), c_.values, {s.max.data(), s.sum.data(), s.out.data()},
                 scores.data());
    }
    return s;
  }

  // The softmax itself, in double.
  double Naive(int64_t head, int64_t value) const {
    double sum = 0, out = 0;
    for (int64_t p = 0; p < c_.pages; ++p) {
      for (int64_t t = 0; t < tokens(p); ++t) {
        const float* k = keys_.data() + (p * c_.page_tokens + t) * c_.width;
        double s = 0;
        for (int64_t i = 0; i < c_.width; ++i) s += double{query_[head * c_.width + i]} * k[i];
        sum += std::exp(s);
        out += std::exp(s) * k[value];
      }
    }
    return out / sum;
  }

 private:
  const Case c_;
  std::vector<float> query_, keys_;
};

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const std::vector<Case> kCases = {{1, 7, 5, 1, 4, 1},       {3, 32, 24, 3, 8, 5},
                                  {8, 288, 256, 4, 32, 17}, {5, 576, 512, 2, 32, 32},
                                  {270, 48, 33, 2, 16, 15}, {4, 80, 80, 3, 20, 19}};

TEST(AttendPage, EqualsTheSoftmax) {
  for (const Case& c : kCases) {
    const Attention a(c, 3);
    const State s = a.Run();
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t j = 0; j < c.values; j += 3) {
        ASSERT_NEAR(s.out[h * c.values + j] / s.sum[h], a.Naive(h, j), 2e-5)
            << "head " << h << " value " << j;
      }
    }
  }
}

TEST(AttendPage, EveryInstructionSetGivesTheSameBits) {
  const Isa before = ActiveIsa();
  for (const Case& c : kCases) {
    const Attention a(c, 4);
    for (int64_t every : {0, 1, 3}) {
      SetActiveIsaForTesting(Isa::kScalar);
      const State want = a.Run(every);
      for (Isa isa : AvailableIsas()) {
        SetActiveIsaForTesting(isa);
        const State got = a.Run(every);
        EXPECT_TRUE(SameBits(got.max, want.max)) << IsaName(isa);
        EXPECT_TRUE(SameBits(got.sum, want.sum)) << IsaName(isa);
        EXPECT_TRUE(SameBits(got.out, want.out)) << IsaName(isa);
      }
    }
  }
  SetActiveIsaForTesting(before);
}

}  // namespace
}  // namespace tandem::kernels
