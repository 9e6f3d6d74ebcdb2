// One step of decode as one graph: captured once for each number of rows, launched with one call.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/attention_gpu/backend/cuda/bell.h"

namespace tandem::attention::cuda {

class StepGraph {
 public:
  // What `put` puts on the stream; it must not wait for it. `bell` may be null.
  static absl::StatusOr<std::unique_ptr<StepGraph>> Capture(cudaStream_t stream, Bell* bell,
                                                            const std::function<absl::Status()>& put);
  ~StepGraph();
  // After bell->Begin.
  absl::Status Launch(cudaStream_t stream);
  size_t node_count() const { return node_count_; }

 private:
  StepGraph() = default;
  Bell* bell_ = nullptr;
  BellNodes bell_nodes_;
  cudaGraph_t graph_ = nullptr;  // its nodes are named by bell_nodes_
  cudaGraphExec_t exec_ = nullptr;
  size_t node_count_ = 0;
};

}  // namespace tandem::attention::cuda
