// The kernels for AVX2; compiled with its flags, called only where the machine has it.
#define TANDEM_KERNELS_VNNI 0
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

namespace tandem::kernels::internal {
namespace {
#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec256.inc"
// After the vector layer.
#include "common/kernels/decode.inc"
#include "common/kernels/matmul.inc"
#include "common/kernels/vector.inc"
constexpr KTables kTables = MakeTables("avx2", VectorQuantMatMul);
}  // namespace

const KTables* Avx2Tables() { return &kTables; }

}  // namespace tandem::kernels::internal
