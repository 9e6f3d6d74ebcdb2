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
void PageScalar(const PageArgs& a) {
  for (int64_t h = 0; h < a.rows; ++h) {
    const int64_t n = a.seen == nullptr ? a.n : a.seen[h];
    if (n == 0) continue;
    float* s = a.scores + h * a.n;
    float top = a.max[h];
    for (int64_t i = 0; i < n; ++i) {
      s[i] = ScalarTables()->dot(a.query + h * a.width, a.keys + i * a.width, a.width);
      top = s[i] > top ? s[i] : top;
    }
    const float keep = Exp(a.max[h] - top);
    float lanes[16] = {};
    for (int64_t i = 0; i < n; ++i) {
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
      for (int64_t p = 0; p < n; ++p) o = std::fma(s[p], a.keys[p * a.width + j], o);
      a.out[h * a.values + j] = o;
    }
  }
}

PageFn PageFor(Isa isa) {
  PageFn f = nullptr;
  if (isa >= Isa::kAvx512) f = Avx512Page();
  if (f == nullptr && isa >= Isa::kAvx2) f = Avx2Page();
  return f != nullptr ? f : ScalarPage();
}

}  // namespace

PageFn ScalarPage() { return PageScalar; }

}  // namespace internal

void AttendPage(const float* query, int64_t rows, int64_t width, const float* keys, int64_t n,
                const int32_t* seen, int64_t values, const SoftmaxState& state, float* scores) {
  internal::PageFor(ActiveIsa())(
      {query, rows, width, keys, n, seen, values, state.max, state.sum, state.out, scores});
}

}  // namespace tandem::kernels
