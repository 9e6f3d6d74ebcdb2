// The kernels for AMX; compiled with its flags, called only where the machine has it.
#define TANDEM_KERNELS_VNNI 1
#define TANDEM_KERNELS_GFNI 1
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

#define TANDEM_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define TANDEM_TILE_RELEASE() _tile_release()
#define TANDEM_TILE_ZERO(t) _tile_zero(t)
#define TANDEM_TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TANDEM_TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TANDEM_TILE_DOT_SU(c, a, b) _tile_dpbsud(c, a, b)
#define TANDEM_TILE_DOT_SS(c, a, b) _tile_dpbssd(c, a, b)

namespace tandem::kernels::internal {
namespace {
#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/decode.inc"
#include "common/kernels/matmul.inc"
#include "common/kernels/vector.inc"
// After the products.
#include "common/kernels/amx.inc"
constexpr KTables kTables = MakeTables("amx", AmxQuantMatMul);
}  // namespace

const KTables* AmxTables() { return &kTables; }

}  // namespace tandem::kernels::internal
