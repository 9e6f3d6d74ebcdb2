// The calling side of a call region. One call is in flight at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/call_region.h"
#include "common/shm/flag.h"

namespace tandem::shm {

// Where the next call's arrays go; the sizes are those of the call.
struct OutgoingCall {
  std::span<uint8_t> ids;      // int32 [rows, pairs]
  std::span<uint8_t> weights;  // float32 [rows, pairs]
  std::span<uint8_t> input;    // [rows, width] of the input type
};

struct CallAnswer {
  absl::Status status;  // what the host says of the call; never kAborted's reasons
  std::span<const uint8_t>
      output;  // [rows, width], in shared memory: good until the next Prepare; empty on error
  CallFigures figures;
};

// Prepare, Ring and Await are called in turn, by one thread; Abort by any.
class CallClient {
 public:
  // FailedPrecondition: the region's header does not say what was agreed on. `region` has
  // layout.region_bytes() and outlives this.
  static absl::Status CheckHeader(std::span<uint8_t> region, const RegionLayout& layout,
                                  const SessionId& session);
  CallClient(std::span<uint8_t> region, const RegionLayout& layout, const SessionId& session,
             WaitPolicy policy);

  // Announces a call; with no rows it is an empty one, answered at once. InvalidArgument: larger than the
  // region's shape; or the reason of Abort.
  absl::StatusOr<OutgoingCall> Prepare(uint32_t layer, uint32_t rows, uint32_t pairs, ValueType input,
                                       ValueType output);
  // Sends it. The reason of Abort, if that was before.
  absl::Status Ring();
  // Waits for its answer. DeadlineExceeded: none by `deadline`, and the session is aborted; the reason of
  // Abort; DataLoss: the host broke the protocol. After an error of Await the client is of no use any more.
  absl::StatusOr<CallAnswer> Await(absl::Time deadline);

  // The host is gone, or too slow: a call in flight that has no answer yet ends with `reason` (which is not
  // OK), and so does every later one. An answer that is there is not lost. The first reason stays.
  void Abort(const absl::Status& reason);

  const Waiter& waiter() const { return waiter_; }

 private:
  SlotControl& Control(uint64_t sequence) const {
    return layout_.Control(region_, sequence % layout_.shape().slots);
  }
  absl::StatusOr<CallAnswer> ReadAnswer(SlotControl& control);

  const std::span<uint8_t> region_;
  const RegionLayout layout_;
  const SessionId session_;
  Waiter waiter_;
  const std::atomic<bool> never_{false};
  uint64_t sequence_;  // of the last call that was rung; written under mutex_, read by Abort
  uint32_t rows_ = 0;
  ValueType output_ = ValueType::kF32;

  std::mutex mutex_;  // for the three below
  absl::Status aborted_;
  bool in_flight_ = false;     // between Ring and the end of Await
  bool call_aborted_ = false;  // Abort ended the call, not its answer
};

}  // namespace tandem::shm
