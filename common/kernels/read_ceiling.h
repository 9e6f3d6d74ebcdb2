// The ceiling that memory-bound work is measured against: a plain read loop over the same memory, by the same
// threads, in the same run.
#pragma once

#include <cstdint>

#include "common/threading/thread_pool.h"

namespace tandem::kernels {

// Reads every byte of [data, data + bytes) once with the widest loads of the ISA in use; a checksum of them.
uint64_t ReadOnce(const uint8_t* data, int64_t bytes);

// Reads [data, data + bytes) once with all threads of the pool, in chunks of `grain` bytes handed out as they
// come, and returns bytes per second. To be interleaved with what is compared: memory bandwidth varies from
// run to run. `data` should be far larger than the caches, and written before (untouched pages read as one).
double MeasureReadBandwidth(threading::ThreadPool& pool, const uint8_t* data, int64_t bytes,
                            int64_t grain = 1 << 20);

}  // namespace tandem::kernels
