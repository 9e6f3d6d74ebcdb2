// MLA attention against the CPU backend's MlaAttend over the same values, rounded as the cache is.
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
constexpr Shape kR1{128, 512, 64}, kLite{16, 512, 64}, kDemo{8, 256, 32}, kOdd{40, 512, 64},
    kUneven{96, 512, 64}, kWideDemo{48, 256, 32};

constexpr CacheType kTypes[] = {kCacheBf16, kCacheInt8};

// A row of a step: its sequence's page table begins at first_page of the pages.
struct RowAt {
  int32_t position, first_page, splits;
};

// Of b from a, by a's norm.
double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t k = 0; k < a.size(); ++k) {
    error += std::pow(a[k] - b[k], 2);
    size += std::pow(a[k], 2);
  }
  return std::sqrt(error / size);
}

class Attention {
 public:
  Attention(const Shape& shape, int32_t pages, uint32_t seed, CacheType type = kCacheBf16,
            int32_t page_tokens = kPageTokens)
      : s_(shape),
        page_tokens_(page_tokens),
        type_(type),
        row_bytes_(CacheRowBytes(type, shape.lora, shape.rope)),
        rng_(seed),
        host_(std::move(*LatentCache::Create(1, pages, page_tokens, shape.width()))) {
    std::normal_distribution<float> d;
    cache_.resize(static_cast<size_t>(pages) * page_tokens * row_bytes_);
    std::vector<float> values(s_.width());
    for (int64_t token = 0; token < int64_t{pages} * page_tokens; ++token) {
      const float size = std::exp2(d(rng_));
      for (float& v : values) v = size * d(rng_);
      Store(values.data(), cache_.data() + token * row_bytes_, host_.Page(0, 0) + token * s_.width());
    }
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng_);
  }

  // One token as the cache's type has it, and the values that stand there then.
  void Store(const float* values, uint8_t* entry, float* seen) const {
    const int32_t width = s_.width();
    auto put = [&](size_t byte, uint16_t v) { std::memcpy(entry + byte, &v, sizeof v); };
    if (type_ == kCacheBf16) {
      for (int32_t i = 0; i < width; ++i) {
        put(2 * i, quant::FloatToBf16(values[i]));
        seen[i] = quant::Bf16ToFloat(quant::FloatToBf16(values[i]));
      }
      return;
    }
    float largest = 0;
    for (int32_t i = 0; i < s_.lora; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float scale = largest / 127;
    for (int32_t i = 0; i < s_.lora; ++i) {
      const auto q = static_cast<int>(std::lrint(values[i] / scale));
      entry[i] = static_cast<uint8_t>(q + 128);
      seen[i] = scale * static_cast<float>(q);
    }
    for (int32_t i = 0; i < s_.rope; ++i) {
      const uint16_t h = quant::FloatToHalf(values[s_.lora + i]);
      put(s_.lora + 2 * i, h);
      seen[s_.lora + i] = quant::HalfToFloat(h);
    }
    std::memcpy(entry + s_.lora + 2 * s_.rope, &scale, sizeof scale);
  }

  uint16_t Rounded(float v) const {
    return type_ == kCacheBf16 ? quant::FloatToBf16(v) : quant::FloatToHalf(v);
  }
  float Value(uint16_t bits) const {
    return type_ == kCacheBf16 ? quant::Bf16ToFloat(bits) : quant::HalfToFloat(bits);
  }

  // Queries whose scores spread like those of a model.
  std::vector<uint16_t> Queries(size_t rows, float times = 1) {
    std::normal_distribution<float> d(0, 3.0f / std::sqrt(static_cast<float>(s_.width())));
    std::vector<uint16_t> q(rows * s_.heads * s_.width());
    for (uint16_t& v : q) v = Rounded(d(rng_) * times);
    return q;
  }

  // `most_splits`: of a launch for more than these rows need; 0: what they need.
  std::vector<float> OnGpu(const std::vector<RowAt>& rows, const std::vector<uint16_t>& queries,
                           int32_t most_splits = 0) {
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
    const DeviceArray<uint16_t> d_query(queries);
    const DeviceArray<uint8_t> d_cache(cache_);
    DeviceArray<float> partial(static_cast<size_t>(parts) * s_.heads * s_.lora),
        out(rows.size() * s_.heads * s_.lora);
    DeviceArray<float2> state(static_cast<size_t>(parts) * s_.heads);
    AttentionParams p;
    p.rows.position = d_position.get();
    p.rows.first_page = d_first.get();
    p.rows.pages = d_table.get();
    p.rows.page_tokens = page_tokens_;
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
    p.most_splits = most_splits > 0 ? most_splits : most;
    p.type = type_;
    p.shared_bytes = shared_bytes_;
    Check(LaunchAttention(p, nullptr));
    auto got = out.Download();
    if (*std::min_element(position.begin(), position.end()) >= 0) ExpectForm(p, out);
    return got;
  }

  // The int8 form in place of `out` is that of `out`; here of rows behind another one, which is zeros.
  void ExpectForm(AttentionParams p, const DeviceArray<float>& out) {
    const int64_t a_row = static_cast<int64_t>(s_.heads) * s_.lora, rows = (p.n + 1) * s_.heads;
    std::vector<float> x((p.n + 1) * a_row);
    const DeviceArray<float> zeros(x);
    const auto values = out.Download();
    std::copy(values.begin(), values.end(), x.begin() + a_row);
    const DeviceArray<float> d_x(x);
    const int64_t size = Int8FormRows(rows, s_.heads) * s_.lora;
    const DeviceArray<int8_t> want(size), got(size);
    const DeviceArray<float2> want_meta(size / 32), got_meta(size / 32);
    Check(
        LaunchQuantize({d_x.get(), s_.lora, rows, s_.lora, s_.heads, want.get(), want_meta.get()}, nullptr));
    Check(
        LaunchQuantize({zeros.get(), s_.lora, rows, s_.lora, s_.heads, got.get(), got_meta.get()}, nullptr));
    p.q = got.get();
    p.q_meta = got_meta.get();
    p.form_rows = p.n + 1;
    p.form_first = 1;
    Check(LaunchAttention(p, nullptr));
    EXPECT_EQ(got.Download(), want.Download());
    const auto got_m = got_meta.Download(), want_m = want_meta.Download();
    EXPECT_EQ(std::memcmp(got_m.data(), want_m.data(), got_m.size() * sizeof(float2)), 0);
  }

  std::vector<float> OnCpu(const RowAt& row, const uint16_t* queries) {
    std::vector<float> q(s_.heads * s_.width()), out(s_.heads * s_.lora);
    for (size_t i = 0; i < q.size(); ++i) q[i] = Value(queries[i]);
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
      const float largest = *std::max_element(want.begin(), want.end());
      for (size_t k = 0; k < a_row; ++k) {
        ASSERT_NEAR(got[i * a_row + k], want[k], 1e-2 * largest)
            << "row " << i << " at " << rows[i].position << ", " << rows[i].splits << " splits, head "
            << k / s_.lora;
      }
      const std::vector<float> row(got.begin() + i * a_row, got.begin() + (i + 1) * a_row);
      EXPECT_LE(Distance(want, row), type_ == kCacheBf16 ? 4e-3 : 1e-3) << "at " << rows[i].position;
    }
  }

  const Shape s_;
  const int32_t page_tokens_;
  const CacheType type_;
  const int64_t row_bytes_;
  int32_t shared_bytes_ = 0;
  std::mt19937 rng_;
  LatentCache host_;
  std::vector<uint8_t> cache_;
  std::vector<int32_t> table_;
};

TEST(CudaAttention, EqualsTheCpuBackendAtManyLengths) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kLite, kDemo, kOdd, kUneven, kR1, kWideDemo}) {
      Attention a(shape, 80, 1, type);
      std::vector<RowAt> rows;
      for (int32_t position : {0, 1, 30, 31, 32, 33, 63, 64, 100, 255, 256, 700})
        rows.push_back({position, 0, 1});
      rows.push_back({257, 40, 1});  // another sequence
      a.ExpectRows(rows);
    }
  }
}

TEST(CudaAttention, EqualsTheCpuBackendWhenSplit) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kLite, kDemo, kR1}) {
      Attention a(shape, 300, 2, type);
      // 8231 positions in 32 stretches of 288: the last three are empty. In 64 of 160: twelve are.
      a.ExpectRows({{256, 0, 2},
                    {255, 0, 1},
                    {511, 3, 2},
                    {40, 9, 32},
                    {2000, 0, SplitsOf(2001)},
                    {8230, 1, 32},
                    {8230, 1, 64}});
    }
  }
}

TEST(CudaAttention, RowsDoNotSeeWhatIsBehindThem) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kDemo, kOdd}) {
      Attention a(shape, 20, 3, type);
      const auto queries = a.Queries(3);
      const std::vector<RowAt> rows = {{20, 0, 1}, {300, 0, 2}, {300, 0, 1}};
      const auto before = a.OnGpu(rows, queries);
      for (int32_t p = 301; p < 20 * kPageTokens; ++p) {  // NaN in all fields that are not bytes
        const int64_t token = a.table_[p / kPageTokens] * kPageTokens + p % kPageTokens;
        std::fill_n(a.cache_.data() + token * a.row_bytes_, a.row_bytes_, uint8_t{0xff});
      }
      EXPECT_EQ(before, a.OnGpu(rows, queries));
    }
  }
}

TEST(CudaAttention, BrokenEntriesAreSeen) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kDemo, kOdd}) {
      Attention a(shape, 20, 8, type);
      std::fill_n(a.cache_.data() + (a.table_[0] * kPageTokens + 5) * a.row_bytes_, a.row_bytes_,
                  uint8_t{0xff});
      for (int32_t splits : {1, 2}) {
        for (float v : a.OnGpu({{300, 0, splits}}, a.Queries(1))) ASSERT_TRUE(std::isnan(v));
      }
    }
  }
}

TEST(CudaAttention, LargerPages) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kDemo, kOdd}) {
      Attention a(shape, 12, 9, type, 96);
      a.ExpectRows({{700, 0, 1}, {700, 1, 3}, {95, 0, 1}, {96, 3, 2}});
    }
  }
}

// A step of a fixed number of rows: what is left over is marked by its position.
TEST(CudaAttention, RowsOfPaddingAreLeftAlone) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kDemo, kOdd}) {
      Attention a(shape, 20, 6, type);
      const auto queries = a.Queries(4);
      const size_t a_row = static_cast<size_t>(shape.heads) * shape.lora;
      const auto got = a.OnGpu({{-1, 0, 1}, {300, 0, 3}, {-1, 1 << 30, 2}, {50, 2, 1}}, queries, 16);
      const size_t a_query = static_cast<size_t>(shape.heads) * shape.width();
      for (size_t i : {0, 2}) {  // as the buffer was before: NaN
        for (size_t k = 0; k < a_row; ++k) ASSERT_TRUE(std::isnan(got[i * a_row + k]));
      }
      const auto alone = a.OnGpu({{300, 0, 3}}, {queries.begin() + a_query, queries.begin() + 2 * a_query});
      EXPECT_TRUE(testing::SameBits(alone.data(), got.data() + a_row, a_row));
      for (size_t k = 0; k < a_row; ++k) ASSERT_TRUE(std::isfinite(got[3 * a_row + k]));
    }
  }
}

void TheBitsDependOnNothingElse(CacheType type) {
  Attention a(kR1, 170, 4, type);
  const bool by_warpgroups = WarpgroupsAttend(type, kR1.heads, kR1.lora, kR1.rope);
  const auto queries = a.Queries(4);
  const std::vector<RowAt> rows = {
      {900, 0, SplitsOf(901)}, {50, 5, 1}, {1500, 2, SplitsOf(1501)}, {5000, 1, SplitsOf(5001)}};
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
  std::vector<uint8_t> cache(a.cache_.size());
  const size_t page = static_cast<size_t>(kPageTokens) * a.row_bytes_;
  for (size_t i = 0; i < moved.size(); ++i) {
    std::copy_n(a.cache_.begin() + a.table_[i] * page, page, cache.begin() + moved[i] * page);
  }
  a.table_ = moved;
  a.cache_ = cache;
  EXPECT_EQ(together, a.OnGpu(rows, queries));
  a.shared_bytes_ = 99 << 10;  // on a card that has no more
  const auto with_less = a.OnGpu(rows, queries);
  if (!by_warpgroups) {
    EXPECT_EQ(together, with_less);
    return;
  }
  EXPECT_LE(Distance(with_less, together), 6e-3);  // another kernel's
}

TEST(CudaAttention, TheBitsDependOnNothingElse) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) TheBitsDependOnNothingElse(type);
}

TEST(CudaAttention, LargeScoresDoNotOverflow) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : kTypes) {
    for (const Shape& shape : {kLite, kOdd}) {
      Attention a(shape, 30, 5, type);
      const auto queries = a.Queries(1, 1000);
      for (int32_t splits : {1, 3}) {
        for (float v : a.OnGpu({{800, 0, splits}}, queries)) ASSERT_TRUE(std::isfinite(v));
      }
    }
  }
}

// A graph has blocks for as many parts as its longest rows need.
TEST(CudaAttention, LongerRowsAreNotCutIntoFewerParts) {
  int before = 1;
  for (int64_t tokens = 1; tokens < 200000; tokens += tokens / 50 + 1) {
    const int n = SplitsOf(tokens);
    EXPECT_GE(n, before) << tokens;
    EXPECT_LE(n, std::min<int64_t>(kMaxSplits, (tokens + kSplitTokens - 1) / kSplitTokens)) << tokens;
    before = n;
  }
  EXPECT_EQ(before, kMaxSplits);
}

// What the int8 cache costs: the same tokens and queries, in both types.
TEST(CudaAttention, AnInt8CacheIsCloseToBf16) {
  TANDEM_NEEDS_GPU();
  Attention wide(kR1, 40, 7, kCacheBf16), narrow(kR1, 40, 7, kCacheInt8);
  const auto a = wide.OnGpu({{1200, 0, 1}}, wide.Queries(1));
  const auto b = narrow.OnGpu({{1200, 0, 1}}, narrow.Queries(1));
  const double relative = Distance(a, b);
  RecordProperty("relative_error_1e6", static_cast<int>(relative * 1e6));
  std::printf("int8 cache against bfloat16: %.4f of the norm\n", relative);
  EXPECT_LE(relative, 4e-2);  // the sizes of tokens differ widely here, and with them scores
}

}  // namespace
}  // namespace tandem::attention::cuda
