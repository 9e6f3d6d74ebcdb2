// attention.h for Avx2; compiled with its flags, called only where the machine has it.
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
#include "common/kernels/vec256.inc"
// After the vector layer.
#include "common/kernels/exp.inc"
constexpr int kScoreRows = 3, kScoreKeys = 2;
constexpr int kValueRows = 4, kValueTile = 1;
inline void ScoreTile(const F16 (&acc)[kScoreKeys][kScoreRows], float* scores, int64_t n) {
  for (int i = 0; i < kScoreKeys; ++i) {
    for (int r = 0; r < kScoreRows; ++r) scores[r * n + i] = FTree(acc[i][r]);
  }
}
#include "common/kernels/attention.inc"
}  // namespace

PageFn Avx2Page() { return Page; }

}  // namespace tandem::kernels::internal
