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
constexpr int kValueTile = 1;  // vectors of 16 in the register tile, beside kHeadTile heads
#include "common/kernels/attention.inc"
}  // namespace

FoldFn Avx2Fold() { return Fold; }

}  // namespace tandem::kernels::internal
