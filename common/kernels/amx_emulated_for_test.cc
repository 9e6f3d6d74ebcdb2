// The AMX kernels on emulated tiles, so that their arithmetic is tested on machines without AMX too. Needs
// VNNI.
#define TANDEM_KERNELS_VNNI 1
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

namespace tandem::kernels::internal {
namespace {

#include "common/kernels/tiles_emulated.inc"

void DotTile(int c, int a, int b, bool b_signed) {
  CheckDot(c, a, b);
  for (int m = 0; m < registers[c].rows; ++m) {
    for (int n = 0; n < registers[c].bytes / 4; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, registers[c].data[m] + 4 * n, 4);
      for (int k = 0; k < registers[a].bytes; ++k) {
        const uint8_t w = registers[b].data[k / 4][4 * n + k % 4];
        sum += static_cast<int8_t>(registers[a].data[m][k]) *
               (b_signed ? static_cast<int8_t>(w) : static_cast<int>(w));
      }
      __builtin_memcpy(registers[c].data[m] + 4 * n, &sum, 4);
    }
  }
}

#define TANDEM_TILE_DOT_SU(c, a, b) DotTile(c, a, b, false)
#define TANDEM_TILE_DOT_SS(c, a, b) DotTile(c, a, b, true)

#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/decode.inc"
#include "common/kernels/matmul.inc"
#include "common/kernels/vector.inc"
// After the products.
#include "common/kernels/amx.inc"
constexpr KTables kTables = MakeTables("amx-emulated", AmxQuantMatMul);

}  // namespace

const KTables* EmulatedAmxTables();
const KTables* EmulatedAmxTables() { return &kTables; }

}  // namespace tandem::kernels::internal
