// The AMX kernels on emulated tiles, so that their arithmetic is tested on machines without AMX too. Needs
// VNNI.
#define TANDEM_KERNELS_VNNI 1
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

namespace tandem::kernels::internal {
namespace {

// The tile registers of the instruction set reference: up to 16 rows of up to 64 bytes, sizes by
// configuration.
struct Tile {
  int rows;
  int bytes;
  uint8_t data[16][64];
};
thread_local Tile registers[8];

void Configure(const void* config) {
  const uint8_t* c = static_cast<const uint8_t*>(config);
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    __builtin_memcpy(&bytes, c + 16 + 2 * t, 2);
    registers[t].bytes = bytes;
    registers[t].rows = c[48 + t];
  }
}
void LoadTile(int t, const void* base, int64_t stride) {
  __builtin_memset(registers[t].data, 0, sizeof registers[t].data);
  for (int r = 0; r < registers[t].rows; ++r) {
    __builtin_memcpy(registers[t].data[r], static_cast<const uint8_t*>(base) + r * stride,
                     static_cast<size_t>(registers[t].bytes));
  }
}
void StoreTile(int t, void* base, int64_t stride) {
  for (int r = 0; r < registers[t].rows; ++r) {
    __builtin_memcpy(static_cast<uint8_t*>(base) + r * stride, registers[t].data[r],
                     static_cast<size_t>(registers[t].bytes));
  }
}
void DotTile(int c, int a, int b, bool b_signed) {
  if (registers[a].bytes != 4 * registers[b].rows || registers[c].rows != registers[a].rows ||
      registers[c].bytes != registers[b].bytes) {
    __builtin_trap();  // the processor would fault
  }
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

#define TANDEM_TILE_CONFIGURE(config) Configure(config)
#define TANDEM_TILE_RELEASE() __builtin_memset(registers, 0, sizeof registers)
#define TANDEM_TILE_ZERO(t) __builtin_memset(registers[t].data, 0, sizeof registers[t].data)
#define TANDEM_TILE_LOAD(t, base, stride) LoadTile(t, base, stride)
#define TANDEM_TILE_STORE(t, base, stride) StoreTile(t, base, stride)
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
