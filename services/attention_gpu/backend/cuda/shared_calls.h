// Some of a streamed layer's experts computed by the expert processes: the GPU calls them through a ring of
// its own (ExpertGroup::Beside), so that the steps of others keep theirs, and goes on with the experts whose
// weights come to it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/bell.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention::cuda {

// One call at a time: Ask, Add, and when the device has come past them Finish. From one thread at a time, on
// one stream. After an error it is only good to be destroyed.
class SharedCalls {
 public:
  // For calls of up to max_tokens of the current device, `device`, or of as many as the processes take.
  // Any error: there can be none, and why.
  static absl::StatusOr<std::unique_ptr<SharedCalls>> Open(const model::ModelConfig& config,
                                                           ExpertGroup& group, BellKind kind, int device,
                                                           int64_t max_tokens);
  static uint64_t DeviceBytes(const model::ModelConfig& config, int64_t max_tokens);
  // The device has come to an end with what was put on it.
  ~SharedCalls();
  SharedCalls(const SharedCalls&) = delete;
  SharedCalls& operator=(const SharedCalls&) = delete;

  int64_t max_tokens() const { return max_tokens_; }
  // Calls the processes for the experts with shared[e], all tokens, behind what is on the stream.
  absl::Status Ask(const RoutedCall& call, const std::vector<bool>& shared, cudaStream_t stream);
  // x += their sum, rounded to float32 once; the device waits for it.
  absl::Status Add(const RoutedCall& call, cudaStream_t stream);
  bool open() const { return open_; }  // between Ask and Finish
  // How it went: seconds that the slowest process took. Unavailable: a process was lost; nothing was added
  // then.
  absl::StatusOr<double> Finish();

 private:
  explicit SharedCalls(const model::ModelConfig& config) : c_(config) {}

  const model::ModelConfig c_;
  int64_t max_tokens_ = 0;
  std::unique_ptr<ExpertGroup> group_;
  std::unique_ptr<Bell> bell_;  // of group_
  std::vector<DeviceRing> rings_;
  Arena device_{Arena::Kind::kDevice};
  int32_t* ids_ = nullptr;  // [max_tokens, k]
  bool open_ = false;
  bool added_ = false;
};

}  // namespace tandem::attention::cuda
