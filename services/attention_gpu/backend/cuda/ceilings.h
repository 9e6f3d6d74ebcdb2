// What the device can do at most, measured beside the kernels: the rate at which memory can be read, and that
// of the tensor instruction the products use.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tandem::attention::cuda {

// Reads `bytes` (a multiple of 16) once. `sink`: one word of device memory.
cudaError_t LaunchRead(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream);

// Enough m16n8k16 products (float16, float32 sums) on registers to fill the device; *flops: how many
// operations that is.
cudaError_t LaunchTensorWork(float* sink, double* flops, cudaStream_t stream);

}  // namespace tandem::attention::cuda
