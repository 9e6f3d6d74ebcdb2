// The answering side of a call region.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/call_region.h"
#include "common/shm/flag.h"

namespace tandem::shm {

// A call as it came; the numbers are this process's own copy and in range, the arrays lie in shared memory
// and may change at any moment: copy them once, then check what they hold.
struct IncomingCall {
  absl::Status valid;  // InvalidArgument: the numbers are out of range; the arrays are empty, answer with it
  uint64_t sequence = 0;
  uint32_t layer = 0;
  uint32_t rows = 0;  // 0: the call is empty, a look whether the host is there
  uint32_t pairs = 0;
  ValueType input_type = ValueType::kF32;   // or BF16
  ValueType output_type = ValueType::kF32;  // or F64
  CallPrecision precision = CallPrecision::kServed;
  std::span<const uint8_t> ids;      // int32 [rows, pairs]
  std::span<const uint8_t> weights;  // float32 [rows, pairs]
  std::span<const uint8_t> input;    // [rows, width] of input_type
  std::span<uint8_t> output;         // [rows, width] of output_type
};

// One thread calls Next and Answer in turn; Stop may come from any.
class CallHost {
 public:
  // Writes the header and the flags' first numbers. `region` has layout.region_bytes() and outlives this.
  CallHost(std::span<uint8_t> region, const RegionLayout& layout, const SessionId& session,
           WaitPolicy policy);

  // Waits for the next call. DeadlineExceeded: none came within `most`; Cancelled: Stop; DataLoss: the client
  // broke the protocol (a number out of turn, another session's epoch): serve this region no more.
  absl::Status Next(absl::Duration most, IncomingCall* call);
  // The output is written; or, with an error, is not to be used.
  void Answer(const IncomingCall& call, const absl::Status& status, const CallFigures& figures);
  // Next returns Cancelled, now and ever after.
  void Stop();

  const Waiter& waiter() const { return waiter_; }

 private:
  void ReadCall(SlotControl& control, uint64_t slot, IncomingCall* call);

  const std::span<uint8_t> region_;
  const RegionLayout layout_;
  const SessionId session_;
  Waiter waiter_;
  uint64_t next_;                       // number of the next call
  std::atomic<uint64_t> waits_for_{0};  // the slot whose bell Next listens to
  std::atomic<bool> stop_{false};
};

}  // namespace tandem::shm
