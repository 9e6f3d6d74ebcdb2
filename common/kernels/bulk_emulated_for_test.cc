// The products on bf16 tiles with emulated tiles, so that their arithmetic is tested on machines without AMX
// too. Needs AVX512-BF16.
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

#if defined(__x86_64__)
#define TANDEM_KERNELS_VNNI 1
#include <immintrin.h>

namespace tandem::kernels::internal {
namespace {

#include "common/kernels/tiles_emulated.inc"

// Subnormal numbers count as zero.
float Flushed(float f) { return __builtin_fabsf(f) < kSmallestScale ? 0.0f : f; }
float FromBf16(const uint8_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return Flushed(f);
}

void DotTile(int c, int a, int b) {
  CheckDot(c, a, b);
  for (int m = 0; m < registers[c].rows; ++m) {
    for (int n = 0; n < registers[c].bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < registers[a].bytes / 4; ++k) {
        const uint8_t *x = registers[a].data[m] + 4 * k, *y = registers[b].data[k] + 4 * n;
        even = Flushed(__builtin_fmaf(FromBf16(x), FromBf16(y), even));
        odd = Flushed(__builtin_fmaf(FromBf16(x + 2), FromBf16(y + 2), odd));
      }
      __builtin_memcpy(&sum, registers[c].data[m] + 4 * n, 4);
      sum = Flushed(Flushed(sum) + Flushed(even + odd));
      __builtin_memcpy(registers[c].data[m] + 4 * n, &sum, 4);
    }
  }
}

#define TANDEM_TILE_DOT_BF16(c, a, b) DotTile(c, a, b)

#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/bulk.inc"
constexpr BulkTables kTables = {BulkMatMul, BulkPack, BulkPackRows, BulkAdd};

}  // namespace

const BulkTables* EmulatedBulkTables();  // without its header: no inline code of others here
const BulkTables* EmulatedBulkTables() { return &kTables; }

}  // namespace tandem::kernels::internal

#else

namespace tandem::kernels::internal {
const BulkTables* EmulatedBulkTables();
const BulkTables* EmulatedBulkTables() { return nullptr; }
}  // namespace tandem::kernels::internal

#endif
