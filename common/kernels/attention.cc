#include "common/kernels/attention.h"

#include <algorithm>
#include <cmath>

#include "common/kernels/attention_internal.h"
#include "common/kernels/dispatch.h"
#include "common/kernels/internal.h"
#include "common/kernels/kernels.h"

namespace tandem::kernels {
namespace internal {
namespace {

float Exp(float x) {
  x = std::min(std::max(x, kExpLow), kExpHigh);
  const float n = std::nearbyint(x * kLog2e);
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float p = kExpC4;
  for (float c : {kExpC3, kExpC2, kExpC1, kExpC0, 1.0f, 1.0f}) p = std::fma(p, r, c);
  return p * std::ldexp(1.0f, static_cast<int>(n));
}

// The twin: attention.h as it reads.
void FoldScalar(const FoldArgs& a) {
  for (int64_t h = 0; h < a.heads; ++h) {
    float* s = a.scores + h * a.n;
    float top = a.max[h];
    for (int64_t i = 0; i < a.n; ++i) top = s[i] > top ? s[i] : top;
    const float keep = Exp(a.max[h] - top);
    float lanes[16] = {};
    for (int64_t i = 0; i < a.n; ++i) {
      s[i] = Exp(s[i] - top);
      lanes[i % 16] += s[i];
    }
    for (int half = 8; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    a.sum[h] = std::fma(a.sum[h], keep, lanes[0]);
    a.max[h] = top;
    for (int64_t j = 0; j < a.values; ++j) {
      float o = keep * a.out[h * a.values + j];
      for (int64_t p = 0; p < a.n; ++p) o = std::fma(s[p], a.keys[p * a.width + j], o);
      a.out[h * a.values + j] = o;
    }
  }
}

FoldFn FoldFor(Isa isa) {
  FoldFn f = nullptr;
  if (isa >= Isa::kAvx512) f = Avx512Fold();
  if (f == nullptr && isa >= Isa::kAvx2) f = Avx2Fold();
  return f != nullptr ? f : ScalarFold();
}

}  // namespace

FoldFn ScalarFold() { return FoldScalar; }

}  // namespace internal

void AttendPage(const float* query, int64_t heads, int64_t width, const float* keys, int64_t n,
                int64_t values, const SoftmaxState& state, float* scores) {
  internal::FloatArgs dot = {};
  dot.type = internal::kTypeF32;
  dot.w = reinterpret_cast<const uint8_t*>(keys);
  dot.row_bytes = width * static_cast<int64_t>(sizeof(float));
  dot.rows = n;
  dot.cols = width;
  dot.x = query;
  dot.x_stride = width;
  dot.n = heads;
  dot.y = scores;
  dot.ldy = n;
  dot.row_step = 1;
  internal::ActiveTables().float_matmul(dot);
  internal::FoldArgs fold = {scores, heads, n, keys, width, values, state.max, state.sum, state.out};
  internal::FoldFor(ActiveIsa())(fold);
}

}  // namespace tandem::kernels
