// The table of functions in use.
#pragma once

#include "common/kernels/internal.h"
#include "common/kernels/kernels.h"

namespace tandem::kernels::internal {

const KTables& TablesFor(Isa isa);
const KTables& ActiveTables();
// Takes the place of the active ISA's table until called with nullptr. Not thread-safe.
void SetTablesForTesting(const KTables* tables);

// How products of `tokens`, a few, read weights of `cols` columns, which is best depends on the processor.
struct Reading {
  Requests requests = kRequests;
  bool by_rows = true;
  int64_t run_ahead = 6144;
};
Reading ReadingOf(int64_t cols, int64_t tokens);
void SetReadingForTesting(const Reading* reading);  // nullptr: as the processor wants it. Not thread-safe

// Whether the processor has AMX-BF16 and AVX512-BF16, and this build the unit that uses them; beside
// Isa::kAmx, which it does not imply.
bool HasBf16Tiles();

// Makes sure that this thread's scratch exists; valid until the thread ends.
uint8_t* ThreadScratch();

}  // namespace tandem::kernels::internal
