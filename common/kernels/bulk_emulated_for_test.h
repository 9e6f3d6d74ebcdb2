// Bulk products on emulated tiles, for tests on machines without AMX.
#pragma once

#include "common/kernels/bulk.h"

namespace tandem::kernels {

namespace internal {
const BulkTables* EmulatedBulkTables();  // nullptr: not on this architecture
}

// From Use to its own end every bulk product takes the emulation. Not thread-safe.
class EmulatedBulk {
 public:
  ~EmulatedBulk() { internal::SetBulkTablesForTesting(nullptr); }
  static bool usable() {
#if defined(__x86_64__)
    return DetectIsa() >= Isa::kAvx512Vnni && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
  }
  static void Use() { internal::SetBulkTablesForTesting(internal::EmulatedBulkTables()); }
};

}  // namespace tandem::kernels
