// MLA attention against the CPU backend's MlaAttend over the same values, rounded to bfloat16 as the cache
// is.
#include <cmath>
#include <limits>
#include <numeric>

#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cpu/mla_attention.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using testing::Check;
using testing::DeviceArray;

constexpr int32_t kPageTokens = 32;

struct Shape {
  int32_t heads, lora, rope;
  int32_t width() const { return lora + rope; }
};
constexpr Shape kR1{128, 512, 64}, kLite{16, 512, 64}, kDemo{8, 256, 32}, kOdd{40, 512, 64};

// A row of a step: its sequence's page table begins at first_page of the pages.
struct RowAt {
  int32_t position, first_page, splits;
};

class Attention {
 public:
  Attention(const Shape& shape, int32_t pages, uint32_t seed)
      : s_(shape), rng_(seed), host_(std::move(*LatentCache::Create(1, pages, kPageTokens, shape.width()))) {
    std::normal_distribution<float> d;
    cache_.resize(static_cast<size_t>(pages) * kPageTokens * s_.width());
    for (size_t i = 0; i < cache_.size(); ++i) {
      cache_[i] = quant::FloatToBf16(d(rng_));
      host_.Page(0, 0)[i] = quant::Bf16ToFloat(cache_[i]);
    }
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng_);
  }

  // Queries whose scores spread like those of a model.
  std::vector<uint16_t> Queries(size_t rows) {
    std::normal_distribution<float> d(0, 3.0f / std::sqrt(static_cast<float>(s_.width())));
    std::vector<uint16_t> q(rows * s_.heads * s_.width());
    for (uint16_t& v : q) v = quant::FloatToBf16(d(rng_));
    return q;
  }

  std::vector<float> OnGpu(const std::vector<RowAt>& rows, const std::vector<uint16_t>& queries) {
    std::vector<int32_t> position, first_page, splits, part;
    int32_t parts = 0, most = 1;
    for (const RowAt& r : rows) {
      position.push_back(r.position);
      first_page.push_back(r.first_page);
      splits.push_back(r.splits);
      part.push_back(parts);
      if (r.splits > 1) parts += r.splits;
      most = std::max(most, r.splits);
    }
    const DeviceArray<int32_t> d_position(position), d_first(first_page), d_splits(splits), d_part(part),
        d_table(table_);
    const DeviceArray<uint16_t> d_query(queries), d_cache(cache_);
    DeviceArray<float> partial(static_cast<size_t>(parts) * s_.heads * s_.lora),
        out(rows.size() * s_.heads * s_.lora);
    DeviceArray<float2> state(static_cast<size_t>(parts) * s_.heads);
    AttentionParams p;
    p.rows.position = d_position.get();
    p.rows.first_page = d_first.get();
    p.rows.pages = d_table.get();
    p.rows.page_tokens = kPageTokens;
    p.splits = d_splits.get();
    p.first_partial = d_part.get();
    p.query = d_query.get();
    p.cache = d_cache.get();
    p.out = out.get();
    p.partial = partial.get();
    p.partial_state = state.get();
    p.n = static_cast<int64_t>(rows.size());
    p.heads = s_.heads;
    p.lora = s_.lora;
    p.rope = s_.rope;
    p.most_splits = most;
    Check(LaunchAttention(p, nullptr));
    return out.Download();
  }

  std::vector<float> OnCpu(const RowAt& row, const uint16_t* queries) {
    std::vector<float> q(s_.heads * s_.width()), out(s_.heads * s_.lora);
    for (size_t i = 0; i < q.size(); ++i) q[i] = quant::Bf16ToFloat(queries[i]);
    MlaScratch scratch;
    MlaAttend(host_, 0, std::span(table_).subspan(row.first_page), row.position, s_.heads, s_.lora, q.data(),
              out.data(), scratch);
    return out;
  }

  void ExpectRows(const std::vector<RowAt>& rows) {
    const auto queries = Queries(rows.size());
    const auto got = OnGpu(rows, queries);
    const size_t a_row = static_cast<size_t>(s_.heads) * s_.lora;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto want = OnCpu(rows[i], queries.data() + i * s_.heads * s_.width());
      // The weights of the softmax are rounded to 8 bits, the rest to more: 2^-9 of the largest value there
      // is.
      for (size_t k = 0; k < a_row; ++k) {
        ASSERT_NEAR(got[i * a_row + k], want[k], 1e-2) << "row " << i << " at " << rows[i].position << ", "
                                                       << rows[i].splits << " splits, head " << k / s_.lora;
      }
      double error = 0, size = 0;
      for (size_t k = 0; k < a_row; ++k) {
        error += std::pow(got[i * a_row + k] - want[k], 2);
        size += std::pow(want[k], 2);
      }
      EXPECT_LE(std::sqrt(error / size), 4e-3) << "at " << rows[i].position;
    }
  }

  const Shape s_;
  std::mt19937 rng_;
  LatentCache host_;
  std::vector<uint16_t> cache_;
  std::vector<int32_t> table_;
};

TEST(CudaAttention, EqualsTheCpuBackendAtManyLengths) {
  TANDEM_NEEDS_GPU();
  for (const Shape& shape : {kLite, kDemo, kOdd, kR1}) {
    Attention a(shape, 80, 1);
    std::vector<RowAt> rows;
    for (int32_t position : {0, 1, 30, 31, 32, 33, 63, 64, 100, 255, 256, 700})
      rows.push_back({position, 0, 1});
    rows.push_back({257, 40, 1});  // another sequence
    a.ExpectRows(rows);
  }
}

TEST(CudaAttention, EqualsTheCpuBackendWhenSplit) {
  TANDEM_NEEDS_GPU();
  for (const Shape& shape : {kLite, kDemo, kR1}) {
    Attention a(shape, 300, 2);
    // 8231 positions in 32 stretches of 288: the last three are empty.
    a.ExpectRows(
        {{256, 0, 2}, {255, 0, 1}, {511, 3, 2}, {40, 9, 32}, {2000, 0, SplitsOf(2001)}, {8230, 1, 32}});
  }
}

TEST(CudaAttention, RowsDoNotSeeWhatIsBehindThem) {
  TANDEM_NEEDS_GPU();
  Attention a(kDemo, 20, 3);
  const auto queries = a.Queries(2);
  const std::vector<RowAt> rows = {{20, 0, 1}, {300, 0, 2}};
  const auto before = a.OnGpu(rows, queries);
  const uint16_t nan = quant::FloatToBf16(std::numeric_limits<float>::quiet_NaN());
  for (int32_t p = 301; p < 20 * kPageTokens; ++p) {
    uint16_t* entry =
        a.cache_.data() + (a.table_[p / kPageTokens] * kPageTokens + p % kPageTokens) * a.s_.width();
    std::fill_n(entry, a.s_.width(), nan);
  }
  EXPECT_EQ(before, a.OnGpu(rows, queries));
}

TEST(CudaAttention, TheBitsDependOnNothingElse) {
  TANDEM_NEEDS_GPU();
  Attention a(kR1, 64, 4);
  const auto queries = a.Queries(3);
  const std::vector<RowAt> rows = {{900, 0, SplitsOf(901)}, {50, 5, 1}, {1500, 2, SplitsOf(1501)}};
  const auto together = a.OnGpu(rows, queries);
  const size_t a_row = 128 * 512, a_query = 128 * 576;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto alone =
        a.OnGpu({rows[i]}, {queries.begin() + i * a_query, queries.begin() + (i + 1) * a_query});
    EXPECT_TRUE(testing::SameBits(alone.data(), together.data() + i * a_row, a_row)) << "row " << i;
  }
  // The same entries in other pages.
  std::vector<int32_t> moved = a.table_;
  std::shuffle(moved.begin(), moved.end(), a.rng_);
  std::vector<uint16_t> cache(a.cache_.size());
  const size_t page = static_cast<size_t>(kPageTokens) * a.s_.width();
  for (size_t i = 0; i < moved.size(); ++i) {
    std::copy_n(a.cache_.begin() + a.table_[i] * page, page, cache.begin() + moved[i] * page);
  }
  a.table_ = moved;
  a.cache_ = cache;
  EXPECT_EQ(together, a.OnGpu(rows, queries));
}

TEST(CudaAttention, LargeScoresDoNotOverflow) {
  TANDEM_NEEDS_GPU();
  Attention a(kLite, 30, 5);
  auto queries = a.Queries(1);
  for (uint16_t& q : queries) q = quant::FloatToBf16(quant::Bf16ToFloat(q) * 1000);
  for (int32_t splits : {1, 3}) {
    for (float v : a.OnGpu({{800, 0, splits}}, queries)) ASSERT_TRUE(std::isfinite(v));
  }
}

}  // namespace
}  // namespace tandem::attention::cuda
