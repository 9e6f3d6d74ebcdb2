// The way to one expert process: in-band over a gRPC stream, or through shared memory. Internal to experts/.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/call_region.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace grpc {
class Channel;
}
namespace tandem::shm {
class CallClient;
}

namespace tandem::attention {

// How calls are written; the same for all processes of a group, whatever their links.
struct CallFormat {
  int64_t hidden_size = 0;
  int64_t max_tokens = 0;          // of a call
  int64_t experts_per_token = 0;   // k
  uint32_t slots = 1;              // of the shared memory: calls that a device may have in flight
  bool float_activations = false;  // float32, else bfloat16
  bool exact_answers = false;      // F64 partial sums, else float32

  shm::ValueType input_type() const {
    return float_activations ? shm::ValueType::kF32 : shm::ValueType::kBf16;
  }
  shm::ValueType output_type() const { return exact_answers ? shm::ValueType::kF64 : shm::ValueType::kF32; }
  uint64_t ActivationBytes(int64_t tokens) const {
    return static_cast<uint64_t>(tokens * hidden_size) * (float_activations ? 4 : 2);
  }
  uint64_t AnswerBytes(int64_t tokens) const {
    return static_cast<uint64_t>(tokens * hidden_size) * (exact_answers ? 8 : 4);
  }
};

// Writes the call's activations in that format: ActivationBytes(call.n_tokens).
void EncodeActivations(const CallFormat& format, const ExpertCall& call, uint8_t* to);

struct LinkAnswer {
  absl::Status status;              // the process's own error for this call; the link goes on
  std::span<const uint8_t> values;  // AnswerBytes, if status is OK; good until the next Prepare
};

// Prepare, Send and Await are called in turn by one thread. An error of any of them means that the link is
// broken, and only good to be destroyed; DeadlineExceeded: the process took too long.
class ExpertLink {
 public:
  virtual ~ExpertLink() = default;
  // Lays the call out; nothing the call points to is needed afterwards.
  virtual absl::Status Prepare(const ExpertCall& call) = 0;
  virtual absl::Status Send(absl::Time deadline) = 0;
  virtual absl::StatusOr<LinkAnswer> Await(absl::Time deadline) = 0;
  // The shared memory's side of it, if it is one.
  virtual shm::CallClient* client() { return nullptr; }
};

std::unique_ptr<ExpertLink> OpenGrpcLink(const std::shared_ptr<grpc::Channel>& channel,
                                         const CallFormat& format);
// Unavailable: the process is gone or does not serve. Any other error: there is no shared memory between it
// and this process, and why.
absl::StatusOr<std::unique_ptr<ExpertLink>> OpenRingLink(const std::shared_ptr<grpc::Channel>& channel,
                                                         const CallFormat& format, absl::Duration spin);

}  // namespace tandem::attention
