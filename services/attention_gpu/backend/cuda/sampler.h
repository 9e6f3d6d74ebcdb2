// Choosing tokens on the GPU: Sample() of sampling/sampling.h for up to kMaxRows rows at a time, of which
// only ids and log-probabilities cross the bus.
//
// The same logits, parameters, position and counts give Sample()'s token, alone or in company. Arithmetic
// that decides is that of Sample() (weights in double, the same draw); only the order of sums differs, and
// weights of whole ranges of tokens are added in integer units of 2^-44 of the best token's, so that a draw
// within about 1e-12 of the border between two tokens may fall to the other side. Results are the same from
// run to run.
//
// A step: Stage() describes the rows, Launch() puts the work on a stream, Read() has the results once the
// stream is synchronized. Launch() may be captured in a CUDA graph; replays use what was staged last.
//
// Not thread-safe. Between a launch and its end neither Stage() nor another launch on another stream may
// happen.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/sampling_kernels.h"
#include "services/attention_gpu/sampling/sampling.h"

namespace tandem::attention::cuda {

class Sampler {
 public:
  static constexpr int64_t kMaxRows = kSamplingRows;

  // What is asked of one row; the pointers are used during Stage() alone.
  struct Request {
    const SamplingParams* params = nullptr;  // null: nothing, the row's logits do not matter
    uint64_t position = 0;                   // of the token to be chosen
    const std::unordered_map<int32_t, int32_t>* counts = nullptr;  // null: nothing generated yet
  };

  // Takes device and page-locked memory on the current device. ResourceExhausted, or InvalidArgument: a
  // vocabulary above kMostSamplingVocab.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(int64_t vocab);
  static uint64_t
  DeviceBytes();  // what Create takes; Stage may take 8 bytes for each edited logit beyond 2^16
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // Row i is requests[i]; rows beyond them are idle. The work launched before must be done. Parameters must
  // have passed Validate(). InvalidArgument: too many rows, a bias outside of the vocabulary. No call to CUDA
  // unless there are more edited logits than ever before.
  absl::Status Stage(std::span<const Request> requests);

  // Whether all that is staged is the best token of unchanged logits: LaunchGreedy() is enough then.
  bool greedy() const { return greedy_; }

  // logits: device memory [rows, vocab], changed by biases and penalties. Kernel launches alone, whose grids
  // depend on `rows` alone. rows may exceed the staged ones (idle rows cost next to nothing).
  absl::Status Launch(float* logits, int64_t rows, cudaStream_t stream);
  // The best token of every row, whatever is staged; one kernel.
  absl::Status LaunchGreedy(const float* logits, int64_t rows, cudaStream_t stream);

  // Of a staged row that was not idle, after the stream was synchronized.
  SampledToken Read(int64_t row) const;

  // [kMaxRows] in device memory: the tokens of the last launch, for work on the same stream.
  const int32_t* device_tokens() const { return state_.tokens; }

 private:
  explicit Sampler(int64_t vocab);
  static void Want(Arena& device, SamplingState* state);
  absl::Status ReserveEdits(int64_t count);

  const int64_t vocab_;
  Arena device_{Arena::Kind::kDevice}, host_{Arena::Kind::kPinnedHost};
  SamplingState state_;
  SamplingInput* input_ = nullptr;
  SamplingEdit* edits_ = nullptr;  // page-locked
  RawLogit* raw_ = nullptr;        // device memory
  int64_t most_edits_ = 0;
  bool greedy_ = true;
};

// The best token of unchanged logits, and nothing else.
bool IsPlainGreedy(const SamplingParams& params);

}  // namespace tandem::attention::cuda
