// The table of functions in use.
#pragma once

#include "common/kernels/internal.h"
#include "common/kernels/kernels.h"

namespace tandem::kernels::internal {

const KTables& TablesFor(Isa isa);
const KTables& ActiveTables();
// Takes the place of the active ISA's table until called with nullptr. Not thread-safe.
void SetTablesForTesting(const KTables* tables);

// Whether the processor drops requests for memory (prefetches) that come fast: AMD's do.
bool DropsRequests();

// Whether the processor has AMX-BF16 and AVX512-BF16, and this build the unit that uses them; beside Isa::kAmx,
// which it does not imply.
bool HasBf16Tiles();

// Makes sure that this thread's scratch exists; valid until the thread ends.
uint8_t* ThreadScratch();

}  // namespace tandem::kernels::internal
