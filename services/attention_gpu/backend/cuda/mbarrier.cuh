// Barriers in shared memory whose two sides are different threads: some arrive, others wait for a phase to
// end (PTX's mbarrier); and the copy engine, which arrives at them. For code with warpgroups. Phases are 0,
// 1, 2, ...; a wait names the lowest bit of the phase that must have ended, and is at most one phase late.
#pragma once

#include <cstdint>

#include "services/attention_gpu/backend/cuda/warpgroup_mma.cuh"

namespace tandem::attention::cuda {

#ifdef TANDEM_WARPGROUP_CODE

// By one thread, before a barrier of the block.
__device__ __forceinline__ void InitBarrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Release: what this thread wrote before is seen by those who have waited.
__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(barrier) : "memory");
}
// Arrives, and the phase does not end before so many bytes have come by CopyBox either.
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}\n" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}
// What was written to global memory and is seen by this thread is seen by its CopyBox behind this.
__device__ __forceinline__ void ShowToCopyEngine() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// The box of a tensor in global memory (its CUtensorMap at `map`) whose first value is at (column, row), to
// shared memory, by the copy engine; `barrier` counts its bytes.
__device__ __forceinline__ void CopyBox(uint32_t shared, const void* map, int column, int row,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void AwaitPhase(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(phase & 1)
      : "memory");
}

#endif  // TANDEM_WARPGROUP_CODE

}  // namespace tandem::attention::cuda
