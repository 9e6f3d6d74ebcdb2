// Absorbed MLA attention by warpgroups: what LaunchAttention does where WarpgroupsAttend (kernels.h), but for
// combining parts.
#pragma once

#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

cudaError_t PrepareWarpgroupAttention();  // once for the current device
cudaError_t LaunchWarpgroupAttention(const AttentionParams& p, cudaStream_t stream);

}  // namespace tandem::attention::cuda
