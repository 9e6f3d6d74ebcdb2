// Kernels that begin before the one in front of them on the stream has ended (programmatic dependent launch).
//
// A step is a chain of some twenty short kernels a layer: what costs time between them is the end of one, the
// launch of the next and the way to its first weights. A kernel launched by LaunchEarly is brought onto the
// device when all blocks of the one in front have called LetNextBegin or ended. Until AwaitEarlier it may
// read what no kernel writes, and weights are that (LaunchDown says what else), and the step's description:
// what brings it (LaunchFetch) and the embedding behind it are launched the ordinary way, so that the first
// kernel launched early begins when it is there. Behind AwaitEarlier everything earlier on the stream is done
// and seen.
//
// Every kernel launched so calls AwaitEarlier in some thread of each grid, also where it has no work: then
// the end of a kernel means the end of all before it. What a kernel in front writes must not be read through
// the read-only path (__ldg), which may be moved or kept from before the wait.
//
// Devices below compute capability 9.0 launch the same kernels one after the other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tandem::attention::cuda {

__device__ __forceinline__ void AwaitEarlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void LetNextBegin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Memory that no kernel of the step writes. Reads that stand before AwaitEarlier stay there: the compiler may
// move those of __ldg behind it.
__device__ __forceinline__ uint4 Constant16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ float4 FloatsOf(const uint4& v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
__device__ __forceinline__ uint2 Constant8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t Constant4(const void* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t Constant2(const void* p) {
  uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// `bytes` of memory, a multiple of 16 and aligned so, to the L2 cache, which every kernel sees alike.
__device__ __forceinline__ void PrefetchToL2(const void* p, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(static_cast<uint32_t>(bytes)));
#endif
}

// Whether the current device does it, and with code that waits (vectors.cu).
bool CanLaunchEarly();

template <typename... Params, typename... Args>
cudaError_t LaunchEarly(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes,
                        cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = CanLaunchEarly() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace tandem::attention::cuda
