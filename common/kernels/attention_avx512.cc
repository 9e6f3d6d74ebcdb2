// attention.h for Avx512; compiled with its flags, called only where the machine has it.
#define TANDEM_KERNELS_VNNI 0
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/attention_internal.h"
#include "common/kernels/internal.h"

namespace tandem::kernels::internal {
namespace {
#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/exp.inc"
constexpr int kScoreRows = 4, kScoreKeys = 4;
constexpr int kValueRows = 4, kValueTile = 4;
// The trees of 16 sums together: each step adds halves of all of them, as FTree does of one.
inline void ScoreTile(const F16 (&acc)[kScoreKeys][kScoreRows], float* scores, int64_t n) {
  __m512 v4[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512 v8[2];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512 a = acc[i][2 * k].v, b = acc[i][2 * k + 1].v;
      v8[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    v4[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v8[0], v8[1], 0x88), _mm512_shuffle_f32x4(v8[0], v8[1], 0xdd));
  }
  __m512 v2[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512 a = v4[2 * k], b = v4[2 * k + 1];
    v2[k] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_ps(v2[0], v2[1], 0x88), _mm512_shuffle_ps(v2[0], v2[1], 0xdd));
  _mm_storeu_ps(scores, _mm512_castps512_ps128(all));
  _mm_storeu_ps(scores + n, _mm512_extractf32x4_ps(all, 1));
  _mm_storeu_ps(scores + 2 * n, _mm512_extractf32x4_ps(all, 2));
  _mm_storeu_ps(scores + 3 * n, _mm512_extractf32x4_ps(all, 3));
}
#include "common/kernels/attention.inc"
}  // namespace

PageFn Avx512Page() { return Page; }

}  // namespace tandem::kernels::internal
