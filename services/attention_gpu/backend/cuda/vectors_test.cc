// The small kernels against their CPU twins.
#include <cmath>
#include <limits>
#include <numeric>

#include "common/model/config.h"
#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cpu/router.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using kernels::testing::Gaussian;
using testing::Check;
using testing::DeviceArray;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEps = 1e-6f;

TEST(CudaVectors, RmsNorm) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(1);
  for (int64_t cols : {32, 256, 1536, 7168, 9216}) {
    const int64_t rows = 5, stride = cols + 64;
    const auto x = Gaussian(rng, 9 * stride, 30), weight = Gaussian(rng, cols);
    const std::vector<int32_t> ids = {8, 0, 3, 3, 5};
    const DeviceArray<float> d_x(x), d_weight(weight), y(rows * cols);
    const DeviceArray<int32_t> d_ids(ids);
    Check(
        LaunchRmsNorm({d_x.get(), stride, d_ids.get(), d_weight.get(), kEps, y.get(), rows, cols}, nullptr));
    const auto got = y.Download();
    std::vector<float> want(cols);
    for (int64_t r = 0; r < rows; ++r) {
      kernels::RmsNorm(x.data() + ids[r] * stride, weight.data(), kEps, want.data(), cols);
      for (int64_t i = 0; i < cols; ++i) {
        ASSERT_NEAR(got[r * cols + i], want[i], 2e-6f * std::fabs(want[i]) + 1e-9f)
            << "row " << r << " of " << cols;
      }
    }
  }
}

// The norm in two halves: values times weights with their int8 form, then the rows' factors.
TEST(CudaVectors, NormFormAndFactors) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(1);
  for (int64_t cols : {32, 96, 256, 1536, 7168, 9216}) {
    const int64_t rows = 5, stride = cols + 64;
    const auto x = Gaussian(rng, 9 * stride, 30), weight = Gaussian(rng, cols);
    const std::vector<int32_t> ids = {8, 0, 3, 3, 5};
    const DeviceArray<float> d_x(x), d_weight(weight), y(rows * cols), scaled(rows * cols);
    const DeviceArray<float> squares(rows * cols / 32);
    const DeviceArray<int32_t> d_ids(ids);
    const DeviceArray<int8_t> q(Int8FormRows(rows, 1) * cols), want_q(q.size());
    const DeviceArray<float2> meta(q.size() / 32), want_meta(q.size() / 32);
    Check(LaunchNormForm({d_x.get(), stride, d_ids.get(), d_weight.get(), y.get(), q.get(), meta.get(),
                          squares.get(), rows, cols},
                         nullptr));
    const RowFactors factors{squares.get(), static_cast<int32_t>(cols / 32), kEps};
    Check(LaunchScaleRows(y.get(), factors, scaled.get(), rows, cols, nullptr));
    Check(LaunchQuantize({y.get(), cols, rows, cols, 1, want_q.get(), want_meta.get()}, nullptr));
    const auto raw = y.Download(), got = scaled.Download();
    std::vector<float> want(cols);
    for (int64_t r = 0; r < rows; ++r) {
      kernels::RmsNorm(x.data() + ids[r] * stride, weight.data(), kEps, want.data(), cols);
      for (int64_t i = 0; i < cols; ++i) {
        ASSERT_EQ(raw[r * cols + i], x[ids[r] * stride + i] * weight[i]);
        ASSERT_NEAR(got[r * cols + i], want[i], 2e-6f * std::fabs(want[i]) + 1e-9f)
            << "row " << r << " of " << cols;
      }
    }
    EXPECT_EQ(q.Download(), want_q.Download());
    EXPECT_EQ(std::memcmp(meta.Download().data(), want_meta.Download().data(), meta.size() * sizeof(float2)),
              0);
  }
}

TEST(CudaVectors, SiluMulInPlace) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(2);
  const int64_t rows = 3, cols = 1056;
  const auto gate = Gaussian(rng, rows * cols, 6), up = Gaussian(rng, rows * cols);
  const DeviceArray<float> y(gate), d_up(up);
  const DeviceArray<int8_t> q(Int8FormRows(rows, 1) * cols), want_q(q.size());
  const DeviceArray<float2> meta(q.size() / 32), want_meta(q.size() / 32);
  Check(LaunchSiluMul({y.get(), d_up.get(), y.get(), q.get(), meta.get(), rows, cols}, nullptr));
  Check(LaunchQuantize({y.get(), cols, rows, cols, 1, want_q.get(), want_meta.get()}, nullptr));
  const auto got = y.Download();
  std::vector<float> want(rows * cols);
  kernels::SiluMul(gate.data(), up.data(), want.data(), rows * cols);
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], 2e-6f * std::fabs(want[i]) + 1e-9f) << gate[i];
  }
  EXPECT_EQ(q.Download(), want_q.Download());
}

// What is written down for a step: a part that is always there, the count of the rest, the rest.
TEST(CudaVectors, FetchBringsWhatTheHostHasWritten) {
  TANDEM_NEEDS_GPU();
  constexpr int64_t kWords = 73, kRoom = 40000;
  uint32_t* from = nullptr;
  Check(cudaMallocHost(reinterpret_cast<void**>(&from), kRoom * 4));
  const DeviceArray<uint32_t> to(kRoom);
  uint32_t value = 0;
  for (const uint32_t more : {0, 1, 2, 3, 4, 1000, 4022, 4023, 4024, 8119, 30000, 39927}) {
    for (int64_t i = 0; i < kRoom; ++i) from[i] = ++value;
    from[kWords - 1] = more;
    Check(LaunchFetch({from, to.get(), kWords, kWords - 1, kRoom}, nullptr));
    const std::vector<uint32_t> got = to.Download();
    EXPECT_TRUE(std::equal(from, from + kWords + more, got.begin())) << more;
  }
  EXPECT_EQ(LaunchFetch({from, to.get(), kWords, kRoom, kRoom}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(LaunchFetch({from, to.get(), kRoom + 4, 0, kRoom}, nullptr), cudaErrorInvalidValue);
  Check(cudaFreeHost(from));
}

TEST(CudaVectors, EmbeddingDecodesEveryType) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(3);
  const int64_t rows = 11, cols = 768;
  for (gguf::TensorType type : testing::DeviceTypes()) {
    const auto w = kernels::testing::RandomBlocks(rng, type, rows, cols);
    const testing::DeviceWeight device(w.m);
    const std::vector<int32_t> ids = {10, 0, 7, 7};
    const DeviceArray<int32_t> d_ids(ids);
    const DeviceArray<float> out(ids.size() * cols);
    Check(LaunchEmbed({device.matrix(), d_ids.get(), out.get(), static_cast<int64_t>(ids.size())}, nullptr));
    const auto got = out.Download();
    std::vector<float> want(cols);
    for (size_t i = 0; i < ids.size(); ++i) {
      quant::Dequantize(type, w.m.data + ids[i] * w.m.row_bytes, want.data(), cols);
      for (int64_t k = 0; k < cols; ++k) {
        // One rounding instead of two: the difference is that of scale * q, at most 2 * 63 * 31 in size.
        ASSERT_NEAR(got[i * cols + k], want[k], std::max(std::fabs(want[k]) * 1e-6f, 5e-4f))
            << gguf::TypeName(type) << ", value " << k;
      }
    }
  }
}

void ExpectCacheEntriesAndQueries(CacheType type) {
  std::mt19937 rng(4);
  const int32_t lora = 512, rope = 64, width = lora + rope, heads = 3, nope = 128, page_tokens = 32;
  // The last row is padding.
  const std::vector<int32_t> position = {0, 31, 32, 70, -1}, first_page = {2, 2, 2, 0, 1 << 30},
                             pages = {6, 1, 4, 0, 5};
  const int64_t n = 5, row_bytes = CacheRowBytes(type, lora, rope);
  const auto kv = Gaussian(rng, n * width), weight = Gaussian(rng, lora),
             absorbed = Gaussian(rng, n * heads * lora), q = Gaussian(rng, n * heads * (nope + rope)),
             angle = Gaussian(rng, n * rope / 2);
  std::vector<float> turns;
  for (float a : angle) turns.insert(turns.end(), {std::cos(a), std::sin(a)});
  const DeviceArray<int32_t> d_position(position), d_first(first_page), d_pages(pages);
  const DeviceArray<float> d_kv(kv), d_weight(weight), d_absorbed(absorbed), d_q(q), d_turns(turns);
  const DeviceArray<uint8_t> cache(7 * page_tokens * row_bytes);
  const DeviceArray<uint16_t> query(n * heads * width);
  const StepRows rows{d_position.get(), d_first.get(), d_pages.get(), page_tokens, d_turns.get()};
  Check(
      LaunchCacheWrite({rows, d_kv.get(), d_weight.get(), kEps, cache.get(), n, lora, rope, type}, nullptr));
  const float scale = 0.125f;
  QueryParams ask{rows, d_absorbed.get(), d_q.get(), scale, query.get(), n, heads, lora, nope, rope, type};
  Check(LaunchQuery(ask, nullptr));
  {  // both at once: the same
    const DeviceArray<uint8_t> cache2(cache.size());
    const DeviceArray<uint16_t> query2(query.size());
    ask.out = query2.get();
    Check(LaunchQueryAndCacheWrite(
        ask, {rows, d_kv.get(), d_weight.get(), kEps, cache2.get(), n, lora, rope, type}, nullptr));
    EXPECT_EQ(cache2.Download(), cache.Download());
    EXPECT_EQ(query2.Download(), query.Download());
  }

  auto rotated = [&](const float* v, int64_t t, int i) {
    const float c = turns[(t * rope / 2 + i / 2) * 2], s = turns[(t * rope / 2 + i / 2) * 2 + 1];
    return i % 2 == 0 ? v[i] * c - v[i + 1] * s : v[i - 1] * s + v[i] * c;
  };
  const bool wide = type == kCacheBf16;
  auto close = [&](uint16_t got, float want) {
    return wide ? std::fabs(quant::Bf16ToFloat(got) - want) <= std::fabs(want) * 0.0040f + 1e-6f
                : std::fabs(quant::HalfToFloat(got) - want) <= std::fabs(want) * 0.0005f + 1e-6f;
  };
  const auto got_cache = cache.Download();
  const auto got_query = query.Download();
  std::vector<bool> own(7 * page_tokens);
  for (int64_t t = 0; t < n; ++t) {
    if (position[t] >= 0) {
      own[pages[first_page[t] + position[t] / page_tokens] * page_tokens + position[t] % page_tokens] = true;
    }
  }
  for (size_t i = 0; i < got_cache.size(); ++i) {
    if (own[i / row_bytes]) continue;
    ASSERT_EQ(got_cache[i], 0xff) << "only the rows' own entries are written";
  }
  for (size_t i = (n - 1) * heads * width; i < got_query.size(); ++i) ASSERT_EQ(got_query[i], 0xffff);
  std::vector<float> normed(lora);
  for (int64_t t = 0; t + 1 < n; ++t) {
    kernels::RmsNorm(kv.data() + t * width, weight.data(), kEps, normed.data(), lora);
    const int32_t page = pages[first_page[t] + position[t] / page_tokens];
    const uint8_t* entry = got_cache.data() + (page * page_tokens + position[t] % page_tokens) * row_bytes;
    auto value = [&](size_t byte) {
      uint16_t v;
      std::memcpy(&v, entry + byte, sizeof v);
      return v;
    };
    float scale8 = 0, largest = 0;
    if (!wide) {
      std::memcpy(&scale8, entry + lora + 2 * rope, sizeof scale8);
      for (float v : normed) largest = std::max(largest, std::fabs(v));
      ASSERT_NEAR(scale8, largest / 127, largest * 1e-7);
    }
    for (int i = 0; i < width; ++i) {
      const float want = i < lora ? normed[i] : rotated(kv.data() + t * width + lora, t, i - lora);
      if (!wide && i < lora) {
        ASSERT_LE(std::fabs((entry[i] - 128) * scale8 - want), scale8 * 0.501f) << "row " << t << ", " << i;
      } else {
        const size_t byte = wide ? 2 * i : lora + 2 * (i - lora);
        ASSERT_TRUE(close(value(byte), want)) << "cache, row " << t << ", " << i;
      }
    }
    for (int h = 0; h < heads; ++h) {
      const float* rest = q.data() + (t * heads + h) * (nope + rope) + nope;
      for (int i = 0; i < width; ++i) {
        const float want =
            scale * (i < lora ? absorbed[(t * heads + h) * lora + i] : rotated(rest, t, i - lora));
        ASSERT_TRUE(close(got_query[(t * heads + h) * width + i], want)) << "query, row " << t << ", " << i;
      }
    }
  }
}

TEST(CudaVectors, CacheEntriesAndQueries) {
  TANDEM_NEEDS_GPU();
  EXPECT_EQ(CacheRowBytes(kCacheBf16, 512, 64), 1152);
  EXPECT_EQ(CacheRowBytes(kCacheInt8, 512, 64), 656);
  for (const CacheType type : {kCacheBf16, kCacheInt8}) ExpectCacheEntriesAndQueries(type);
}

// A latent that is not finite must not look like one that is.
TEST(CudaVectors, BrokenLatentsStayVisibleInAnInt8Cache) {
  TANDEM_NEEDS_GPU();
  const int32_t lora = 256, rope = 32;
  const std::vector<int32_t> position = {0, 1}, first_page = {0, 0}, pages = {0};
  std::vector<float> kv(2 * (lora + rope), 1.0f);
  kv[7] = kNan;
  std::fill_n(kv.begin() + lora + rope, lora, 0.0f);
  const DeviceArray<float> d_kv(kv), weight(std::vector<float>(lora, 1.0f)),
      turns(std::vector<float>(2 * rope, 1.0f));
  const DeviceArray<int32_t> d_position(position), d_first(first_page), d_pages(pages);
  const int64_t row_bytes = CacheRowBytes(kCacheInt8, lora, rope);
  const DeviceArray<uint8_t> cache(32 * row_bytes);
  Check(LaunchCacheWrite({{d_position.get(), d_first.get(), d_pages.get(), 32, turns.get()},
                          d_kv.get(),
                          weight.get(),
                          kEps,
                          cache.get(),
                          2,
                          lora,
                          rope,
                          kCacheInt8},
                         nullptr));
  const auto got = cache.Download();
  float scale[2];
  for (int t : {0, 1}) std::memcpy(&scale[t], got.data() + t * row_bytes + lora + 2 * rope, sizeof(float));
  EXPECT_TRUE(std::isnan(scale[0]));
  EXPECT_EQ(scale[1], 0.0f);
}

model::ModelConfig RouterConfig(int experts, int groups, int kept, int k, bool sigmoid) {
  model::ModelConfig c;
  c.n_routed_experts = experts;
  c.n_group = groups;
  c.topk_group = kept;
  c.num_experts_per_tok = k;
  c.scoring_func = sigmoid ? model::ScoringFunc::kSigmoid : model::ScoringFunc::kSoftmax;
  c.norm_topk_prob = sigmoid;
  c.routed_scaling_factor = sigmoid ? 2.5 : 16;
  return c;
}

void ExpectRoutes(const model::ModelConfig& c, const std::vector<float>& logits,
                  const std::vector<float>& bias) {
  const int64_t experts = c.n_routed_experts, k = c.num_experts_per_tok;
  const auto n = static_cast<int64_t>(logits.size()) / experts;
  const DeviceArray<float> d_logits(logits), d_bias(bias), weights(n * k);
  const DeviceArray<int32_t> ids(n * k);
  RouteParams p;
  p.logits = d_logits.get();
  p.bias = bias.empty() ? nullptr : d_bias.get();
  p.ids = ids.get();
  p.weights = weights.get();
  p.n = n;
  p.experts = static_cast<int32_t>(experts);
  p.top_k = static_cast<int32_t>(k);
  p.groups = static_cast<int32_t>(c.n_group);
  p.top_groups = static_cast<int32_t>(c.topk_group);
  p.sigmoid = c.scoring_func == model::ScoringFunc::kSigmoid;
  p.normalize = c.norm_topk_prob;
  p.scale = static_cast<float>(c.routed_scaling_factor);
  Check(LaunchRoute(p, nullptr));
  const auto got_ids = ids.Download();
  const auto got_weights = weights.Download();
  std::vector<int32_t> want_ids(k);
  std::vector<float> want_weights(k), scratch(2 * experts);
  for (int64_t t = 0; t < n; ++t) {
    Route(c, logits.data() + t * experts, bias.empty() ? nullptr : bias.data(), want_ids.data(),
          want_weights.data(), scratch.data());
    for (int64_t i = 0; i < k; ++i) {
      ASSERT_EQ(got_ids[t * k + i], want_ids[i]) << "token " << t << ", place " << i;
      if (std::isnan(want_weights[i])) {
        ASSERT_TRUE(std::isnan(got_weights[t * k + i]));
      } else {
        ASSERT_NEAR(got_weights[t * k + i], want_weights[i], 1e-5f * want_weights[i]) << "token " << t;
      }
    }
  }
}

TEST(CudaVectors, RoutesAsTheCpuDoes) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(5);
  for (const auto& c : {RouterConfig(256, 8, 4, 8, true), RouterConfig(16, 4, 2, 4, true),
                        RouterConfig(64, 1, 1, 6, false), RouterConfig(160, 8, 3, 6, false),
                        RouterConfig(384, 1, 1, 8, true), RouterConfig(256, 32, 5, 8, false),
                        RouterConfig(256, 2, 1, 40, true), RouterConfig(256, 16, 3, 8, true)}) {
    const auto bias = c.norm_topk_prob ? Gaussian(rng, c.n_routed_experts, 0.1f) : std::vector<float>();
    ExpectRoutes(c, Gaussian(rng, 200 * c.n_routed_experts, 2), bias);
  }
}

TEST(CudaVectors, RowsOfPaddingAreRoutedNowhere) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(9);
  const DeviceArray<float> logits(Gaussian(rng, 3 * 16)), weights(3 * 4);
  const DeviceArray<int32_t> ids(3 * 4), position(std::vector<int32_t>{5, -1, 0});
  RouteParams p;
  p.logits = logits.get();
  p.ids = ids.get();
  p.weights = weights.get();
  p.n = 3;
  p.experts = 16;
  p.top_k = 4;
  p.position = position.get();
  Check(LaunchRoute(p, nullptr));
  const auto got = ids.Download();
  const auto shares = weights.Download();
  for (int i = 0; i < 12; ++i) {
    EXPECT_EQ(got[i] == -1, i / 4 == 1);
    EXPECT_EQ(shares[i] == 0, i / 4 == 1);
  }
}

TEST(CudaVectors, RoutesTiesToTheLowerIdAndBrokenLogitsInRange) {
  TANDEM_NEEDS_GPU();
  const auto c = RouterConfig(16, 4, 2, 4, true);
  ExpectRoutes(c, std::vector<float>(32, 0.5f), {});
  ExpectRoutes(c, std::vector<float>(16, kNan), {});
  std::vector<float> some(16, 1.0f);
  some[0] = kNan;
  some[6] = 2;
  ExpectRoutes(c, some, {});
}

TEST(CudaVectors, ArgmaxTakesTheFirstOfTheBest) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(6);
  const int64_t vocab = 129280;
  auto logits = Gaussian(rng, 4 * vocab);
  logits[vocab - 1] = 50;
  logits[vocab + 777] = logits[vocab + 70000] = 60;
  for (int64_t i = 0; i < vocab; ++i) logits[2 * vocab + i] = kNan;
  logits[3 * vocab] = kNan;
  logits[3 * vocab + 9] = 70;
  const DeviceArray<float> d_logits(logits);
  const DeviceArray<int32_t> token(4);
  Check(LaunchArgmax({d_logits.get(), token.get(), 4, vocab}, nullptr));
  EXPECT_EQ(token.Download(), (std::vector<int32_t>{static_cast<int32_t>(vocab - 1), 777, 0, 9}));
}

TEST(CudaVectors, Add) {
  TANDEM_NEEDS_GPU();
  std::mt19937 rng(7);
  auto a = Gaussian(rng, 1000);
  const auto b = Gaussian(rng, 1000);
  const DeviceArray<float> x(a), delta(b);
  Check(LaunchAdd(x.get(), delta.get(), 1000, nullptr));
  for (int i = 0; i < 1000; ++i) a[i] += b[i];
  EXPECT_EQ(x.Download(), a);
}

}  // namespace
}  // namespace tandem::attention::cuda
