// The kernels for AVX-512 with VNNI; compiled with its flags, called only where the machine has it.
#define TANDEM_KERNELS_VNNI 1
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "common/kernels/internal.h"

namespace tandem::kernels::internal {
namespace {
#include "common/kernels/ahead.inc"
// Ahead of the vector layer.
#include "common/kernels/vec512.inc"
// After the vector layer.
#include "common/kernels/decode.inc"
#include "common/kernels/matmul.inc"
#include "common/kernels/vector.inc"
constexpr KTables kTables = MakeTables("avx512-vnni", VectorQuantMatMul);
}  // namespace

const KTables* Avx512VnniTables() { return &kTables; }

}  // namespace tandem::kernels::internal
