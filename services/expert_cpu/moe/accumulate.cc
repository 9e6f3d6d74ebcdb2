#include "services/expert_cpu/moe/accumulate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/model/expert_sum.h"

namespace tandem::expert {
namespace {

void Scalar(float weight, const float* parts, int64_t rows, int64_t leaves, double* sum) {
  const double w = weight;
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = parts + r * leaves;
    double total = 0;
    for (int64_t b = 0; b < leaves; ++b) total += model::ToGrid(w * static_cast<double>(p[b]));
    sum[r] += total;
  }
}

#if defined(__x86_64__)
// Sums of grid multiples are exact, so the lanes may be added in any order.
__attribute__((target("avx2"))) void Avx2(float weight, const float* parts, int64_t rows, int64_t leaves,
                                          double* sum) {
  const __m256d w = _mm256_set1_pd(static_cast<double>(weight));
  const __m256d shift = _mm256_set1_pd(model::kGridShift);
  const double scalar_w = weight;
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = parts + r * leaves;
    __m256d acc = _mm256_setzero_pd();
    int64_t b = 0;
    for (; b + 4 <= leaves; b += 4) {
      const __m256d term = _mm256_mul_pd(w, _mm256_cvtps_pd(_mm_loadu_ps(p + b)));
      acc = _mm256_add_pd(acc, _mm256_sub_pd(_mm256_add_pd(term, shift), shift));
    }
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(acc), _mm256_extractf128_pd(acc, 1));
    double total = _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
    for (; b < leaves; ++b) total += model::ToGrid(scalar_w * static_cast<double>(p[b]));
    sum[r] += total;
  }
}

__attribute__((target("avx512f,avx512vl"))) void Avx512(float weight, const float* parts, int64_t rows,
                                                        int64_t leaves, double* sum) {
  const __m512d w = _mm512_set1_pd(static_cast<double>(weight));
  const __m512d shift = _mm512_set1_pd(model::kGridShift);
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = parts + r * leaves;
    __m512d acc = _mm512_setzero_pd();
    for (int64_t b = 0; b < leaves; b += 8) {
      const int64_t left = leaves - b;
      const auto lanes = static_cast<__mmask8>(left >= 8 ? 0xff : (1 << left) - 1);
      const __m256 part = _mm256_maskz_loadu_ps(lanes, p + b);
      const __m512d term = _mm512_mul_pd(w, _mm512_maskz_cvtps_pd(lanes, part));
      // Lanes beyond the end hold zero, or NaN where the weight is infinite: they stay out of the sum.
      acc = _mm512_mask_add_pd(acc, lanes, acc, _mm512_sub_pd(_mm512_add_pd(term, shift), shift));
    }
    alignas(64) double lane[8];
    _mm512_store_pd(lane, acc);
    sum[r] += ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }
}
#endif

}  // namespace

AccumulateLeavesFn AccumulateLeavesFor([[maybe_unused]] kernels::Isa isa) {
#if defined(__x86_64__)
  if (isa >= kernels::Isa::kAvx512) return &Avx512;
  if (isa >= kernels::Isa::kAvx2) return &Avx2;
#endif
  return &Scalar;
}

}  // namespace tandem::expert
