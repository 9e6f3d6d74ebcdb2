// Attention to expanded keys and values against the absorbed form on the CPU: MlaAttend over the same cache
// values, with the heads' weights before and behind it in double.
#include <cmath>
#include <numeric>

#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cpu/mla_attention.h"
#include "services/attention_gpu/backend/cuda/expanded_heads.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using gguf::TensorType;
using testing::Check;
using testing::DeviceArray;
using testing::DeviceWeight;

constexpr int32_t kPageTokens = 32;

model::ModelConfig ConfigOf(int64_t heads, bool large) {
  model::ModelConfig c;
  c.hidden_size = large ? 7168 : 256;
  c.num_attention_heads = heads;
  c.q_lora_rank = large ? 1536 : 0;
  c.kv_lora_rank = large ? 512 : 256;
  c.qk_rope_head_dim = large ? 64 : 32;
  c.qk_nope_head_dim = c.v_head_dim = large ? 128 : 32;
  return c;
}

struct Case {
  int64_t position, count;
  int32_t first_page = 0;
};

class Prefill {
 public:
  Prefill(const model::ModelConfig& c, CacheType type, TensorType k_type, TensorType v_type, int32_t pages,
          uint32_t seed)
      : c_(c),
        type_(type),
        rng_(seed),
        host_(std::move(*LatentCache::Create(1, pages, kPageTokens, c.latent_dim()))),
        k_(kernels::testing::QuantizedGaussian(rng_, k_type, c.num_attention_heads * c.kv_lora_rank,
                                               c.qk_nope_head_dim)),
        v_(kernels::testing::QuantizedGaussian(rng_, v_type, c.num_attention_heads * c.v_head_dim,
                                               c.kv_lora_rank)),
        k_device_(k_.m, c.num_attention_heads),
        v_device_(v_.m, c.num_attention_heads) {
    std::normal_distribution<float> d;
    cache_.resize(static_cast<size_t>(pages) * kPageTokens * RowBytes());
    std::vector<float> values(c.latent_dim());
    for (int64_t token = 0; token < int64_t{pages} * kPageTokens; ++token) {
      const float size = std::exp2(d(rng_));
      for (float& v : values) v = size * d(rng_);
      Store(values.data(), cache_.data() + token * RowBytes(), host_.Page(0, 0) + token * c.latent_dim());
    }
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng_);
  }

  int64_t RowBytes() const { return CacheRowBytes(type_, c_.kv_lora_rank, c_.qk_rope_head_dim); }

  // One token as the cache's type has it, and the values that stand there then.
  void Store(const float* values, uint8_t* entry, float* seen) const {
    const int64_t lora = c_.kv_lora_rank;
    auto put = [&](int64_t byte, uint16_t v) { std::memcpy(entry + byte, &v, sizeof v); };
    if (type_ == kCacheBf16) {
      for (int64_t i = 0; i < c_.latent_dim(); ++i) {
        put(2 * i, quant::FloatToBf16(values[i]));
        seen[i] = quant::Bf16ToFloat(quant::FloatToBf16(values[i]));
      }
      return;
    }
    float largest = 0;
    for (int64_t i = 0; i < lora; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float scale = largest / 127;
    for (int64_t i = 0; i < lora; ++i) {
      const auto q = scale > 0 ? static_cast<int>(std::lrint(values[i] / scale)) : 0;
      entry[i] = static_cast<uint8_t>(q + 128);
      seen[i] = scale * static_cast<float>(q);
    }
    for (int64_t i = 0; i < c_.qk_rope_head_dim; ++i) {
      const uint16_t h = quant::FloatToHalf(values[lora + i]);
      put(lora + 2 * i, h);
      seen[lora + i] = quant::HalfToFloat(h);
    }
    std::memcpy(entry + lora + 2 * c_.qk_rope_head_dim, &scale, sizeof scale);
  }

  // Scores then spread like those of a model.
  float Scale() const { return 3.0f / std::sqrt(static_cast<float>(c_.kv_lora_rank * c_.qk_nope_head_dim)); }
  void Draw(const Case& at, float times = 1) {
    queries_ = kernels::testing::Gaussian(rng_, at.count * c_.num_attention_heads * c_.qk_head_dim());
    for (float& q : queries_) q *= times;
    angles_.resize(at.count * c_.qk_rope_head_dim);
    for (size_t i = 0; i < angles_.size(); i += 2) {
      angles_[i] = std::cos(0.37f * static_cast<float>(i));
      angles_[i + 1] = std::sin(0.37f * static_cast<float>(i));
    }
  }

  // The least memory in which these rows have a layout.
  uint64_t Tight(const Case& at) const {
    uint64_t bytes = uint64_t{1} << 30;
    while (Layout(at, bytes / 8 * 7).rows == at.count) bytes = bytes / 8 * 7;
    return bytes;
  }
  PrefillLayout Layout(const Case& at, uint64_t bytes) const {
    return LayOutPrefill(c_, at.count, at.position + at.count, bytes);
  }

  // [count, heads, v]
  std::vector<float> OnGpu(const Case& at, uint64_t bytes) {
    const PrefillLayout layout = Layout(at, bytes);
    EXPECT_EQ(layout.rows, at.count);
    const int64_t heads = c_.num_attention_heads, qk = c_.qk_head_dim(), n = at.count;
    const DeviceArray<int32_t> table(table_), first_page(std::vector<int32_t>{at.first_page});
    const DeviceArray<uint8_t> cache(cache_), scratch(bytes);
    const DeviceArray<float> angles(angles_);
    ExpandedRows r;
    r.cache.cache = cache.get();
    r.cache.type = type_;
    r.cache.pages = table.get();
    r.cache.first_page = first_page.get();
    r.cache.page_tokens = kPageTokens;
    r.cache.lora = static_cast<int32_t>(c_.kv_lora_rank);
    r.cache.rope = static_cast<int32_t>(c_.qk_rope_head_dim);
    r.k_b = k_device_.matrix();
    r.v_b = v_device_.matrix();
    r.rope = angles.get();
    r.scale = Scale();
    r.position = at.position;
    r.n = n;
    r.heads = static_cast<int32_t>(heads);
    r.scratch = scratch.get();
    Check(LaunchExpandedBegin(r, layout, nullptr));
    for (int64_t head = 0; head < heads; head += layout.heads) {
      std::vector<float> q;
      for (int64_t t = 0; t < n; ++t) {
        const auto from = queries_.begin() + (t * heads + head) * qk;
        q.insert(q.end(), from, from + layout.heads * qk);
      }
      Check(cudaMemcpy(scratch.get() + layout.q, q.data(), q.size() * sizeof(float), cudaMemcpyHostToDevice));
      Check(LaunchExpandedHeads(r, layout, head, nullptr));
    }
    const std::vector<uint8_t> all = scratch.Download();
    std::vector<float> out(n * heads * c_.v_head_dim), scale(n);
    std::memcpy(scale.data(), all.data() + layout.attended_scale, n * sizeof(float));
    for (size_t i = 0; i < out.size(); ++i) {
      uint16_t h = 0;
      std::memcpy(&h, all.data() + layout.attended + 2 * i, sizeof h);
      out[i] = quant::HalfToFloat(h) * scale[i / (heads * c_.v_head_dim)];
    }
    return out;
  }

  // [heads, v] of row t.
  std::vector<float> OnCpu(const Case& at, int64_t t) {
    const int64_t heads = c_.num_attention_heads, lora = c_.kv_lora_rank, nope = c_.qk_nope_head_dim,
                  v = c_.v_head_dim, width = c_.latent_dim();
    std::vector<float> absorbed(heads * width), latents(heads * lora), row(std::max(nope, lora));
    for (int64_t h = 0; h < heads; ++h) {
      const float* q = queries_.data() + (t * heads + h) * c_.qk_head_dim();
      for (int64_t l = 0; l < lora; ++l) {
        quant::Dequantize(k_.m.type, k_.m.data + (h * lora + l) * k_.m.row_bytes, row.data(), nope);
        double sum = 0;
        for (int64_t d = 0; d < nope; ++d) sum += double{row[d]} * q[d];
        absorbed[h * width + l] = static_cast<float>(sum) * Scale();
      }
      for (int64_t i = 0; i < c_.qk_rope_head_dim; i += 2) {
        const float* cs = angles_.data() + t * c_.qk_rope_head_dim + i;
        const float x = q[nope + i], y = q[nope + i + 1];
        absorbed[h * width + lora + i] = (x * cs[0] - y * cs[1]) * Scale();
        absorbed[h * width + lora + i + 1] = (x * cs[1] + y * cs[0]) * Scale();
      }
    }
    MlaScratch scratch;
    MlaAttend(host_, 0, std::span(table_).subspan(at.first_page), at.position + t, heads, lora,
              absorbed.data(), latents.data(), scratch);
    std::vector<float> out(heads * v);
    for (int64_t i = 0; i < heads * v; ++i) {
      quant::Dequantize(v_.m.type, v_.m.data + i * v_.m.row_bytes, row.data(), lora);
      double sum = 0;
      for (int64_t l = 0; l < lora; ++l) sum += double{row[l]} * latents[i / v * lora + l];
      out[i] = static_cast<float>(sum);
    }
    return out;
  }

  // The largest error of a row, of its norm.
  double Error(const Case& at, const std::vector<float>& got) {
    const int64_t a_row = c_.num_attention_heads * c_.v_head_dim;
    double worst = 0;
    for (int64_t t = 0; t < at.count; t = t + 1 == at.count ? at.count : std::min(t + 29, at.count - 1)) {
      const auto want = OnCpu(at, t);
      double error = 0, size = 0;
      for (int64_t k = 0; k < a_row; ++k) {
        error += std::pow(double{got[t * a_row + k]} - want[k], 2);
        size += std::pow(double{want[k]}, 2);
      }
      const double relative = std::sqrt(error / size);
      // Queries and keys are rounded to 11 bits, and the largest of these scores are about 100.
      EXPECT_LE(relative, 1e-2) << "row " << t << " of " << at.count << " from " << at.position << " on";
      worst = std::max(worst, relative);
    }
    return worst;
  }

  const model::ModelConfig c_;
  const CacheType type_;
  std::mt19937 rng_;
  LatentCache host_;
  kernels::testing::Weights k_, v_;
  DeviceWeight k_device_, v_device_;
  std::vector<uint8_t> cache_;
  std::vector<int32_t> table_;
  std::vector<float> queries_, angles_;
};

constexpr uint64_t kPlenty = uint64_t{1} << 25;

TEST(CudaPrefillAttention, EqualsTheAbsorbedForm) {
  TANDEM_NEEDS_GPU();
  double worst = 0;
  for (const CacheType type : {kCacheBf16, kCacheInt8}) {
    for (const bool large : {true, false}) {
      Prefill p(ConfigOf(large ? 3 : 8, large), type, large ? TensorType::kF16 : TensorType::kQ8_0,
                large ? TensorType::kQ4_K : TensorType::kF16, 80, 1);
      // From the beginning; behind a prefix that ends within a page and a tile; of another sequence.
      for (const Case& at :
           {Case{0, 128}, {0, 129}, {0, 191}, {64, 130}, {37, 200}, {1000, 300}, {500, 257, 40}}) {
        p.Draw(at);
        worst = std::max(worst, p.Error(at, p.OnGpu(at, kPlenty)));
      }
    }
  }
  std::printf("largest error of a row: %.5f of its norm\n", worst);
}

// Positions in several parts, heads in several groups, as little memory asks for.
TEST(CudaPrefillAttention, InPartsWhereMemoryIsScarce) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : {kCacheBf16, kCacheInt8}) {
    for (const bool large : {true, false}) {
      Prefill p(ConfigOf(4, large), type, TensorType::kBF16, TensorType::kQ8_0, 100, 2);
      for (const Case& at : {Case{2400, 150}, {1900, 1200}}) {
        p.Draw(at);
        const uint64_t tight = p.Tight(at);
        const PrefillLayout layout = p.Layout(at, tight);
        ASSERT_LT(layout.positions, at.position + at.count);
        const auto got = p.OnGpu(at, tight);
        p.Error(at, got);
        // Nothing but the order of sums is another.
        const auto together = p.OnGpu(at, kPlenty);
        double error = 0, size = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          error += std::pow(double{got[i]} - together[i], 2);
          size += std::pow(double{together[i]}, 2);
        }
        EXPECT_LE(std::sqrt(error / size), 1e-3);
      }
    }
  }
}

TEST(CudaPrefillAttention, RowsDoNotSeeWhatIsBehindThem) {
  TANDEM_NEEDS_GPU();
  for (const CacheType type : {kCacheBf16, kCacheInt8}) {
    Prefill p(ConfigOf(2, false), type, TensorType::kF16, TensorType::kF16, 20, 3);
    const Case at{100, 170};
    p.Draw(at);
    const auto before = p.OnGpu(at, kPlenty);
    for (int32_t t = 270; t < 20 * kPageTokens; ++t) {  // NaN in all fields that are not bytes
      const int64_t token = p.table_[t / kPageTokens] * kPageTokens + t % kPageTokens;
      std::fill_n(p.cache_.data() + token * p.RowBytes(), p.RowBytes(), uint8_t{0xff});
    }
    EXPECT_EQ(before, p.OnGpu(at, kPlenty));
  }
}

// Entries and queries of any size: nothing overflows, and what is zero is no division by it.
TEST(CudaPrefillAttention, SizesOutsideOfFloat16) {
  TANDEM_NEEDS_GPU();
  for (const float size : {0.0f, 1e-12f, 1e9f}) {
    Prefill p(ConfigOf(2, false), kCacheBf16, TensorType::kF16, TensorType::kF16, 20, 4);
    std::vector<float> values(p.c_.latent_dim());
    std::normal_distribution<float> d;
    for (int64_t token = 0; token < 20 * kPageTokens; ++token) {
      for (float& v : values) v = size * d(p.rng_);
      p.Store(values.data(), p.cache_.data() + token * p.RowBytes(),
              p.host_.Page(0, 0) + token * p.c_.latent_dim());
    }
    const Case at{100, 170};
    p.Draw(at, size > 1 ? 1e-9f : 1e6f);
    const auto got = p.OnGpu(at, kPlenty);
    for (float v : got) ASSERT_TRUE(std::isfinite(v));
    if (size > 0) p.Error(at, got);
  }
}

// Of a model like R1: everything within the memory, and nothing over what is in use.
TEST(PrefillLayout, LiesWithinItsMemory) {
  const model::ModelConfig c = ConfigOf(128, true);
  const uint64_t bytes = uint64_t{369} << 20;
  for (const int64_t count : {128, 256, 500, 512, 4096, 4100, 16384}) {
    for (const int64_t before : {0, 100, 16384, 131072, 500000}) {
      const int64_t tokens = before + count;
      const PrefillLayout l = LayOutPrefill(c, count, tokens, bytes);
      ASSERT_GT(l.rows, 0) << count << " rows, " << tokens << " tokens";
      EXPECT_LE(l.rows, 4096);
      EXPECT_EQ(128 % l.heads, 0);
      EXPECT_TRUE(l.positions == tokens || l.positions % kPrefillTile == 0);
      struct Piece {
        uint64_t begin, size;
      };
      std::vector<Piece> fixed = {{l.low, l.rows * uint64_t{1536 * 2}},
                                  {l.low_scale, l.rows * uint64_t{4}},
                                  {l.attended, l.rows * uint64_t{16384 * 2}},
                                  {l.attended_scale, l.rows * uint64_t{4}},
                                  {l.unit, 4},
                                  {l.query, static_cast<uint64_t>(l.rows * l.heads * 192 * 2)},
                                  {l.query_scale, static_cast<uint64_t>(l.rows * l.heads * 4)},
                                  {l.key_weights, static_cast<uint64_t>(l.heads * 128 * 512 * 2)}};
      if (l.positions < tokens) {
        fixed.push_back({l.carry, static_cast<uint64_t>(l.rows * l.heads * 128 * 4)});
        fixed.push_back({l.carry_state, static_cast<uint64_t>(l.rows * l.heads * 8)});
      }
      const std::vector<Piece> projections = {{l.q_a, static_cast<uint64_t>(l.wide * 1536 * 4)},
                                              {l.kv, static_cast<uint64_t>(l.wide * 576 * 4)}};
      const std::vector<Piece> queries = {{l.q, static_cast<uint64_t>(l.rows * l.heads * 192 * 4)}};
      const std::vector<Piece> keys = {{l.latents, static_cast<uint64_t>(l.positions * 512 * 2)},
                                       {l.rotated, static_cast<uint64_t>(l.positions * 64 * 2)},
                                       {l.expanded, static_cast<uint64_t>(l.positions * l.heads * 512)}};
      for (const std::vector<Piece>* last : {&projections, &queries, &keys}) {
        std::vector<Piece> all = fixed;
        all.insert(all.end(), last->begin(), last->end());
        std::sort(all.begin(), all.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
        for (size_t i = 0; i < all.size(); ++i) {
          EXPECT_EQ(all[i].begin % 256, 0u);
          EXPECT_LE(all[i].begin + all[i].size, i + 1 < all.size() ? all[i + 1].begin : bytes)
              << count << " rows, " << tokens << " tokens, piece " << i;
        }
      }
    }
  }
  EXPECT_EQ(LayOutPrefill(c, 512, 4096, 1 << 20).rows, 0);
}

TEST(PrefillLayout, IsChosenForManyRows) {
  const model::ModelConfig c = ConfigOf(128, true);
  EXPECT_FALSE(WorthExpanding(c, 64, 0));
  EXPECT_FALSE(WorthExpanding(c, 100, 100000));
  EXPECT_FALSE(WorthExpanding(c, 150, 16384));
  EXPECT_TRUE(WorthExpanding(c, 256, 16384));
  EXPECT_FALSE(WorthExpanding(c, 256, 0));
  EXPECT_TRUE(WorthExpanding(c, 512, 0));
  EXPECT_TRUE(WorthExpanding(c, 4096, 0));
  model::ModelConfig other = c;
  other.qk_nope_head_dim = 192;  // no kernel
  EXPECT_FALSE(WorthExpanding(other, 4096, 0));
}

}  // namespace
}  // namespace tandem::attention::cuda
