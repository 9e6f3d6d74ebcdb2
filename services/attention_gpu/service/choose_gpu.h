// Whether the engine computes on a GPU.
#pragma once

#include <optional>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/service/options.h"

namespace tandem::attention {

// What the CUDA backend is to be made with, or nothing for the CPU backend. `wanted` has all but the device
// and the limit, which come from --gpu and --vram-gb. With --gpu auto, whatever keeps a GPU from being used
// is said on the log; with --gpu N it is an error. InvalidArgument names a flag.
absl::StatusOr<std::optional<CudaBackendOptions>> ChooseGpu(const Options& options, const gguf::File& file,
                                                            const model::ModelConfig& config,
                                                            CudaBackendOptions wanted);

}  // namespace tandem::attention
