// The products on bf16 tiles; compiled for AMX-BF16, called only where the machine has it.
#define TANDEM_KERNELS_VNNI 1
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

#define TANDEM_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define TANDEM_TILE_RELEASE() _tile_release()
#define TANDEM_TILE_ZERO(t) _tile_zero(t)
#define TANDEM_TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TANDEM_TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TANDEM_TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)

namespace tandem::kernels::internal {
namespace {
#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/bulk.inc"
constexpr BulkTables kTables = {BulkMatMul, BulkPack, BulkPackRows, BulkAdd};
}  // namespace

const BulkTables* BulkAmxTables() { return &kTables; }

}  // namespace tandem::kernels::internal
