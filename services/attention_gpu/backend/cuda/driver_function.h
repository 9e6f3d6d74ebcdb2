// Functions of the driver by name: the runtime is linked, the driver is whatever the machine has.
#pragma once

#include <cuda_runtime_api.h>

namespace tandem::attention::cuda {

// As CUDA 12.0 defined it; null where the driver has none.
inline void* DriverFunction(const char* name) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t e = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return e == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
#elif CUDART_VERSION >= 12000
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t e = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
  return e == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
#else
  return cudaGetDriverEntryPoint(name, &found, cudaEnableDefault) == cudaSuccess ? found : nullptr;
#endif
}

}  // namespace tandem::attention::cuda
