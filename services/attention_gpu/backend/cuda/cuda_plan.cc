// What builds with and without CUDA have in common.
#include "absl/strings/str_format.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"

namespace tandem::attention {

std::string CudaPlan::ToString() const {
  return absl::StrFormat(
      "%s: weights %d MB, KV cache %d MB, workspace %d MB, streaming %d MB, "
      "together %d of %d MB",
      gpu, weights / 1000000, cache / 1000000, workspace / 1000000, stream / 1000000, total() / 1000000,
      available / 1000000);
}

}  // namespace tandem::attention
