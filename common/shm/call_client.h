// The calling side of a call region. One call is in flight at a time, but for those that a device makes.
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
                                       ValueType output, CallPrecision precision = CallPrecision::kServed);
  // Sends it. The reason of Abort, if that was before.
  absl::Status Ring();
  // Waits for its answer. DeadlineExceeded: none by `deadline`, and the session is aborted; the reason of
  // Abort; DataLoss: the host broke the protocol. After an error of Await the client is of no use any more.
  absl::StatusOr<CallAnswer> Await(absl::Time deadline);

  // A device makes the next `calls` calls by itself, in the region: numbers first (returned), first + 1, ...,
  // each rung after the answer to the one that had its slot before. Until EndRun the host does not sleep
  // between them, and Abort ends all that are left. The reason of Abort, if that was before.
  absl::StatusOr<uint64_t> BeginRun(uint64_t calls);
  // The device makes no more of them: all were answered, or it has given up. `made_all` false aborts the
  // session with `why`, since nobody knows which number is next. The reason of Abort, if there was one.
  absl::Status EndRun(bool made_all, const absl::Status& why);
  // Another number after every answer; any thread, while there is a run.
  uint32_t Answers() const;
  // What the host said of call `sequence` of the run that is under way or was the last one.
  absl::Status AnswerStatus(uint64_t sequence);

  // The host is gone, or too slow: a call in flight that has no answer yet ends with `reason` (which is not
  // OK), and so does every later one. An answer that is there is not lost. The first reason stays.
  void Abort(const absl::Status& reason);

  const Waiter& waiter() const { return waiter_; }
  const RegionLayout& layout() const { return layout_; }
  const SessionId& session() const { return session_; }
  std::span<uint8_t> region() const { return region_; }

 private:
  SlotControl& Control(uint64_t sequence) const {
    return layout_.Control(region_, sequence % layout_.shape().slots);
  }
  absl::StatusOr<CallAnswer> ReadAnswer(SlotControl& control);
  void SetAwake(bool awake);

  const std::span<uint8_t> region_;
  const RegionLayout layout_;
  const SessionId session_;
  Waiter waiter_;
  const std::atomic<bool> never_{false};
  uint64_t sequence_;  // of the last call that was rung, or of a run's; written under mutex_, read by Abort
  uint32_t rows_ = 0;
  ValueType output_ = ValueType::kF32;

  std::mutex mutex_;  // for those below
  absl::Status aborted_;
  bool run_ = false;           // between BeginRun and EndRun
  bool in_flight_ = false;     // between Ring and the end of Await
  bool call_aborted_ = false;  // Abort ended the call, not its answer
};

}  // namespace tandem::shm
