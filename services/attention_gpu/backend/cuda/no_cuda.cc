// What stands for the CUDA backend in builds without it.
#include "services/attention_gpu/backend/cuda/cuda_backend.h"

namespace tandem::attention {
namespace {

absl::Status Absent() { return absl::UnimplementedError("this build has no CUDA backend"); }

}  // namespace

absl::StatusOr<CudaPlan> PlanCuda(const gguf::File&, const model::ModelConfig&, const CudaBackendOptions&) {
  return Absent();
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const gguf::File&, const model::ModelConfig&,
                                                           const CudaBackendOptions&,
                                                           std::unique_ptr<ExpertGroup>) {
  return Absent();
}

}  // namespace tandem::attention
