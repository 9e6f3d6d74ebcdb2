// The kernels by which the GPU calls expert processes through shared memory: requests are written straight
// into the region (common/shm/call_region.h), answers are read from there. Read by the host compiler and
// nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

constexpr int kMostRings = 16;
constexpr int kSeen = 3;  // words of AnswerParams::seen

// One process's slots as the GPU sees them, new for every run of calls: the host writes them into page-locked
// memory, the run's first request takes them to the device.
struct RingState {
  uint8_t* slot = nullptr;  // the first; mapped host memory
  uint64_t epoch = 0;
  uint64_t first = 0;  // number of the run's first call
  uint64_t run = 0;    // another for each run, not 0
};

// Where things are in a slot, bytes from its beginning. Call number s uses slot s % slots.
struct SlotOffsets {
  uint32_t slots = 1;  // a power of two
  uint64_t slot_bytes = 0;
  uint32_t bell = 0, answered = 0;   // the flags' 32-bit numbers
  uint32_t request = 0, answer = 0;  // WireRequest, WireAnswer
  uint64_t ids = 0, weights = 0, input = 0, output = 0;
};

// shm::RequestHeader and the part of shm::AnswerHeader that counts; bell.cc checks that they are the same.
struct WireRequest {
  uint64_t sequence, epoch;
  uint32_t layer, rows, pairs, input_type, output_type, precision;
};
struct WireAnswer {
  uint64_t sequence, epoch;
  uint32_t status;
};

// Which of the tokens' experts a call asks for: of those that defer, all but the deferred ones, or these.
enum class AskPart : int32_t { kAll, kDue, kDeferred };

struct AskParams {
  const RingState* rings = nullptr;  // [count]
  // For the first call of a run: `rings` is page-locked host memory and is copied here, for all that follow.
  RingState* keep = nullptr;
  int32_t count = 0;
  SlotOffsets at;
  uint32_t index = 0;  // of the call in the run
  uint32_t layer = 0;
  uint32_t input_type = 0, output_type = 0;  // shm::ValueType
  uint32_t precision = 0;                    // shm::CallPrecision
  bool float_input = false;                  // else bfloat16
  const float* normed = nullptr;             // [n, hidden]; hidden a multiple of 4
  RowFactors factors;                        // of `normed`
  const int32_t* ids = nullptr;              // [n, k]
  const float* weights = nullptr;            // [n, k]
  int32_t n = 0, k = 1, hidden = 0;          // n 0: an empty call
  AskPart part = AskPart::kAll;
  int32_t defer = 0;                // experts of a token that defers
  const int32_t* defers = nullptr;  // [n] not 0: the token defers; unless kAll
  // With experts > 0: the routing is made on the way, into `ids` and `weights`; kAll only, and n and top_k
  // are those above.
  RouteParams route;
  // With `ring` the last block raises the bells; else whoever comes next on the stream.
  bool ring = true;
  uint32_t* blocks_done = nullptr;  // 0 before and after
};
cudaError_t LaunchAsk(const AskParams& p, cudaStream_t stream);

struct AnswerParams {
  const RingState* rings = nullptr;  // AskParams::keep of the run's first call
  int32_t count = 0;
  SlotOffsets at;
  uint32_t index = 0;
  bool double_output = false;  // F64 answers, whose sum is rounded once; else float32
  float* x = nullptr;          // [n, hidden] += the answers' sum
  int32_t n = 0, hidden = 0;
  // With `wait` the answers' flags are waited for, until *stop (mapped host memory) is not 0.
  bool wait = true;
  const uint32_t* stop = nullptr;
  // Mapped host memory: the run's first call without an answer that is one, plus 1. Nothing is added then.
  uint32_t* failed = nullptr;
  // [kSeen] What the blocks know of the call that was last waited for; 0 before the first run.
  uint64_t* seen = nullptr;
  // With a `weight`: the norm's form of the sums, of which x and the row's widths are those above.
  NormFormParams next;
};
cudaError_t LaunchAddAnswers(const AnswerParams& p, cudaStream_t stream);

}  // namespace tandem::attention::cuda
