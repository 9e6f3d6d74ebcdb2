// All expert processes of a model, seen as one: a batched MoE call goes to every one of them, and their
// answers are added.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/config.h"
#include "common/rpc/server.h"
#include "services/attention_gpu/experts/shard_weights.h"

namespace tandem::attention {

class DeviceCalls;

// One MoE layer's call: what goes to the experts.
struct ExpertCall {
  int32_t layer = 0;  // block number
  int32_t n_tokens = 0;
  int32_t experts_per_token = 0;          // k
  const int32_t* expert_ids = nullptr;    // [n_tokens, k]
  const float* expert_weights = nullptr;  // [n_tokens, k]
  const float* activations = nullptr;     // [n_tokens, hidden], float32
  // The precision of bfloat16 will do, where that is faster (PRECISION_BULK of experts.proto): other numbers
  // than those of the exact kernels, which are the same on every processor. Processes that cannot do without.
  bool bulk = false;
};

// GPU backends ask for it in steps of more tokens than this, whose products on the GPU are not exact either.
constexpr int64_t kMostExactTokens = 64;

// One call in flight at a time: Start, then Finish. Not thread-safe.
class ExpertGroup {
 public:
  virtual ~ExpertGroup() = default;
  // Sends the call; what it points to must stay until Finish returns. A call without tokens is answered at
  // once.
  virtual absl::Status Start(const ExpertCall& call) = 0;
  // Waits for all answers and writes their sum, rounded to float32 once, to out: [n_tokens, hidden].
  // Unavailable / DeadlineExceeded: a process is gone or too slow; the group needs Recover before the next
  // call.
  virtual absl::Status Finish(float* out) = 0;
  virtual absl::Status Recover(absl::Duration patience) = 0;
  virtual int processes() const = 0;

  // The weights of every process, mapped for reading. Whoever holds them when a process is lost must let go
  // of them before Recover, since the new process has its own: the old ones' memory would be taken beside it.
  // Any error: they cannot be had, and why.
  virtual absl::StatusOr<std::vector<std::shared_ptr<const ShardWeights>>> MapWeights() {
    return absl::UnimplementedError("the weights of these experts cannot be mapped");
  }
  // Another way to the same processes, for calls of up to max_call_tokens that are made beside this group's;
  // a process computes one call after the other. To be made anew after Recover. Any error: it cannot be had.
  virtual absl::StatusOr<std::unique_ptr<ExpertGroup>> Beside(int64_t /*max_call_tokens*/) {
    return absl::UnimplementedError("these experts are called one way only");
  }
  // For a device that calls by itself; null where some process is not called through shared memory. Good
  // until Recover.
  virtual DeviceCalls* device_calls() { return nullptr; }
};

// How calls go to a process.
enum class ExpertTransport {
  kAuto,  // through shared memory if the process is on this host and has it, else in-band
  kRing,  // through shared memory, or not at all
  kGrpc,  // in-band over gRPC (Experts.Forward)
};

struct ExpertOptions {
  std::vector<std::string> addresses;
  rpc::TlsOptions tls;
  bool reference_precision = false;  // what the processes must run with
  absl::Duration call_timeout = absl::Seconds(60);
  absl::Duration attach_patience = absl::Minutes(30);  // loading a large shard takes its time
  ExpertTransport transport = ExpertTransport::kAuto;
  int64_t max_call_tokens = 0;  // of the calls to come: sizes the shared memory; 0: what the processes take
  absl::Duration spin;          // how long a wait for an answer in shared memory looks before it sleeps
  uint32_t slots = 1;           // calls that a device may have in flight; a power of two
};

// Connects, waits until all serve, and checks that they hold the same model and that their shards together
// cover every expert of every MoE layer exactly once (FailedPrecondition says what is missing or doubled).
// Says on the log how each is called. All transports give the same bits.
absl::StatusOr<std::unique_ptr<ExpertGroup>> ConnectExperts(const ExpertOptions& options,
                                                            const model::ModelConfig& config,
                                                            const std::string& model_fingerprint);

}  // namespace tandem::attention
