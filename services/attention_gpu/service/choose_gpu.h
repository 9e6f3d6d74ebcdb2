// Whether the engine computes on a GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/service/options.h"

namespace tandem::attention {

// What the CUDA backend is to be made with, or nothing for the CPU backend. `wanted` has all but the device,
// the limit and the size of streamed steps, which come from --gpu, --vram-gb, --stream-chunk-size and
// --stream-buffer-mb; its pages are the least that will do, and become up to `most_pages` where there is
// room. `context`: tokens of a sequence. With --gpu auto, whatever keeps a GPU from being used
// is said on the log; with --gpu N it is an error. InvalidArgument names a flag.
absl::StatusOr<std::optional<CudaBackendOptions>> ChooseGpu(const Options& options, const gguf::File& file,
                                                            const model::ModelConfig& config,
                                                            CudaBackendOptions wanted, int32_t context,
                                                            int32_t most_pages);

// A streamed step's size to try: its tokens and its memory for weights on their way.
struct StreamStep {
  int32_t tokens = 0;
  uint64_t buffer_bytes = 0;
  friend bool operator==(const StreamStep&, const StreamStep&) = default;
};
// What to try, best first, by --stream-chunk-size, --stream-buffer-mb and --max-batch-size.
std::vector<StreamStep> StreamSteps(const Options& options, int32_t context);

// How many pages, from `least` (of which `plan` is) to `most`, fit with a tenth of what is left to spare.
int32_t PagesThatFit(const CudaPlan& plan, int32_t least, int32_t most);

}  // namespace tandem::attention
