// A build for a machine that none of the vector units is written for: the scalar twins do the work.
#include "common/kernels/attention_internal.h"
#include "common/kernels/internal.h"

namespace tandem::kernels::internal {

const KTables* Avx2Tables() { return nullptr; }
const KTables* Avx512Tables() { return nullptr; }
const KTables* Avx512VnniTables() { return nullptr; }
const KTables* AmxTables() { return nullptr; }
const BulkTables* BulkAmxTables() { return nullptr; }

PageFn Avx2Page() { return nullptr; }
PageFn Avx512Page() { return nullptr; }

}  // namespace tandem::kernels::internal
