// The driver's stream memory operations: the GPU's own front end writes a number, or waits for one, without a
// kernel. Resolved at run time, since there may be no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::attention::cuda {

struct StreamMemoryOps {
  decltype(&cuStreamBatchMemOp) batch = nullptr;
  decltype(&cuGraphAddBatchMemOpNode) add_node = nullptr;
  decltype(&cuGraphExecBatchMemOpNodeSetParams) set_params = nullptr;
  CUcontext context = nullptr;

  // Unimplemented: the driver or the device has none.
  static absl::StatusOr<StreamMemoryOps> Find(int device);
};

// A number to write to, or to wait for (at least, cyclically) at, an address of mapped host memory.
struct MemoryOp {
  CUdeviceptr address = 0;
  uint32_t value = 0;
};
enum class MemoryOpKind { kWrite, kWait };

// Puts the operations on the stream; while it is being captured, as one node, which is returned (else null).
absl::StatusOr<CUgraphNode> PutMemoryOps(const StreamMemoryOps& driver, MemoryOpKind kind,
                                         std::span<const MemoryOp> ops, cudaStream_t stream);
// Gives a node of an instantiated graph other operations, as many as before.
absl::Status SetMemoryOps(const StreamMemoryOps& driver, cudaGraphExec_t graph, CUgraphNode node,
                          MemoryOpKind kind, std::span<const MemoryOp> ops);

}  // namespace tandem::attention::cuda
