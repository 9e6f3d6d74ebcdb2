// The bell: the GPU calls the expert processes by itself, through the memory it shares with them. Requests
// are written by a kernel straight into the region; what raises the bell and waits for the answer is one of
// three things, the same to the processes. Nothing of it needs the host between the first layer and the last,
// so that all layers of a step can be one graph.
//
// A watchdog looks at the run: where no answer comes within the call timeout, or a process is lost, all waits
// of the GPU end, the step drains, and the next one works again after Recover.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/bell_kernels.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/backend/cuda/stream_memory_ops.h"
#include "services/attention_gpu/experts/device_calls.h"

namespace tandem::attention::cuda {

enum class BellKind {
  kStreamMemory,  // stream memory operations: no kernel waits
  kKernel,        // the kernels that write the request and add the answer
  kHostFunction,  // functions that the driver calls on a thread of its own
};
std::string_view BellName(BellKind kind);  // "stream", "kernel", "host"
std::optional<BellKind> BellOf(std::string_view name);

// What a captured run leaves behind for its launches.
struct BellNodes {
  struct Node {
    CUgraphNode node;
    MemoryOpKind kind;
    uint32_t index;  // of the call
  };
  std::vector<Node> nodes;  // kStreamMemory only
};

// For one thread, the backend's.
class Bell : public RoutedExperts {
 public:
  // Makes the regions of `calls` visible to the current device. Whatever error: the processes can still be
  // called from the host; it says why.
  static absl::StatusOr<std::unique_ptr<Bell>> Open(const model::ModelConfig& config, DeviceCalls* calls,
                                                    BellKind kind, int device);
  ~Bell() override;

  BellKind kind() const { return kind_; }
  int64_t max_tokens() const { return calls_ != nullptr ? calls_->max_tokens() : 0; }
  // Changes when the regions look otherwise than what graphs were captured for.
  uint64_t generation() const { return generation_; }
  // Gives the regions back before the group recovers; then shows the new ones, at the same places as far as
  // captured graphs are concerned.
  void Detach();
  absl::Status Attach(DeviceCalls* calls);

  // Calls of a step of so many MoE layers, RoutedCall::defer being `defer`.
  static uint64_t CallsOf(int64_t layers, int32_t defer);
  // A run: Begin, then for each of its layers, from RoutedCall::index 0 on, Ask and Add on `stream`
  // (directly, or by a graph that was captured from such calls), then, when the stream has come to its end,
  // Finish. Where layers defer, the regions have kDeferralSlots slots.
  absl::Status Begin(uint64_t calls);
  bool TakesFactors() const override { return true; }
  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override;
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override;
  // `made_all`: all calls were put on the stream. Unavailable: a process was lost; any other error is a
  // process's own.
  absl::Status Finish(bool made_all, const absl::Status& why);

  // While a graph is captured: Ask and Add note their nodes in *nodes.
  void Record(BellNodes* nodes) { recording_ = nodes; }
  // Before each launch of such a graph, after Begin.
  absl::Status Renew(cudaGraphExec_t graph, const BellNodes& nodes);

  // Empty calls, one after the other on the stream, in a graph: what a call costs beside the experts' work.
  struct RoundTrip {
    double microseconds = 0;       // of one call; median of the graphs
    double host_microseconds = 0;  // CPU time of this thread for one launch of a graph
  };
  absl::StatusOr<RoundTrip> Measure(uint64_t calls, int graphs, cudaStream_t stream);

 private:
  struct HostCall {
    Bell* bell;
    uint32_t index;
  };
  Bell(const model::ModelConfig& config, BellKind kind, int device);
  absl::Status Allocate();
  static uint32_t IndexOf(const RoutedCall& call);
  absl::Status AskFor(const RoutedCall& call, AskPart part, uint32_t index, cudaStream_t stream);
  absl::Status AddAnswer(const RoutedCall& call, uint32_t index, const NormFormParams* next,
                         cudaStream_t stream);
  std::vector<MemoryOp> OpsOf(MemoryOpKind kind, uint32_t index) const;
  absl::Status Put(MemoryOpKind kind, uint32_t index, cudaStream_t stream);
  HostCall* HostCallOf(uint32_t index);
  void RingFromHost(uint32_t index);
  void WaitFromHost(uint32_t index);
  void Watch();

  const model::ModelConfig c_;
  const BellKind kind_;
  const int device_;
  DeviceCalls* calls_ = nullptr;
  std::optional<StreamMemoryOps> driver_;
  SlotOffsets at_;
  size_t ring_count_ = 0;
  shm::ValueType input_type_ = shm::ValueType::kF32, output_type_ = shm::ValueType::kF32;
  uint64_t generation_ = 0;
  std::vector<DeviceRing> rings_;
  std::vector<uint8_t*> slots_;  // each ring's first, as the device sees it
  std::vector<uint64_t> first_;  // numbers of this run's first calls
  uint64_t run_ = 0;             // runs begun
  uint64_t run_calls_ = 0;
  BellNodes* recording_ = nullptr;
  std::vector<std::unique_ptr<HostCall>> host_calls_;

  Arena device_memory_{Arena::Kind::kDevice}, host_memory_{Arena::Kind::kPinnedHost};
  RingState* states_ = nullptr;       // device
  uint32_t* blocks_done_ = nullptr;   // device
  uint64_t* seen_ = nullptr;          // device
  RingState* host_states_ = nullptr;  // pinned
  // Pinned, the GPU reads and writes them.
  uint32_t* stop_ = nullptr;
  uint32_t* failed_ = nullptr;

  std::mutex mutex_;  // for those below
  std::condition_variable changed_;
  bool ending_ = false;
  bool running_ = false;
  uint64_t watched_run_ = 0;  // run_
  bool asleep_ = false;       // the watchdog, until it is told
  std::thread watchdog_;
};

}  // namespace tandem::attention::cuda
