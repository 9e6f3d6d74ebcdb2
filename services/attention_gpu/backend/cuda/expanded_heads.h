// One group of heads after the other of attention to expanded keys and values: the kernels of
// prefill_attention.h in their order, over the memory that prefill_layout.h describes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/prefill_attention.h"
#include "services/attention_gpu/backend/cuda/prefill_layout.h"

namespace tandem::attention::cuda {

// Rows [0, n) of a sequence at positions from `position` on, whose cache entries are written.
struct ExpandedRows {
  SequenceCache cache;
  DeviceMatrix k_b, v_b;        // of a head: [lora, nope] and [v, lora]; the heads' follow each other
  const float* rope = nullptr;  // StepRows::rope of the first row
  float scale = 0;              // of the softmax
  int64_t position = 0, n = 0;
  int32_t heads = 0;  // of the model
  uint8_t* scratch = nullptr;
};

// Before the first group.
cudaError_t LaunchExpandedBegin(const ExpandedRows& r, const PrefillLayout& at, cudaStream_t stream);
// Heads [first_head, first_head + at.heads), whose queries [n, at.heads, nope + rope] lie at at.q: their part
// of at.attended; with head 0 also at.attended_scale. InvalidValue for v_b in float32.
cudaError_t LaunchExpandedHeads(const ExpandedRows& r, const PrefillLayout& at, int64_t first_head,
                                cudaStream_t stream);

}  // namespace tandem::attention::cuda
