// Calls to expert processes that a device makes by itself, through the memory it shares with them: it writes
// requests into the region (common/shm/call_region.h), rings, and waits for the answer, for a whole run of
// calls without the host in between.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/call_region.h"

namespace tandem::attention {

struct DeviceRing {
  std::span<uint8_t> region;  // this process's mapping
  shm::RegionLayout layout;
  uint64_t epoch = 0;
};

// BeginRun and EndRun are called in turn, by one thread, with no other call in flight; the rest by any while
// there is a run.
class DeviceCalls {
 public:
  virtual ~DeviceCalls() = default;

  // One for each process; the mappings stay until the group recovers or ends.
  virtual std::vector<DeviceRing> rings() const = 0;
  virtual int64_t max_tokens() const = 0;          // of a call
  virtual shm::ValueType input_type() const = 0;   // of activations: F32 or BF16
  virtual shm::ValueType output_type() const = 0;  // of answers: F32, or F64 where several are added
  virtual absl::Duration call_timeout() const = 0;

  // The device will make `calls` calls to every process, as many of them in flight as the rings have slots: a
  // slot is used again after its answer was read. Returns the number of the first for each ring; the numbers
  // go up by one. Unavailable: a process is gone.
  virtual absl::StatusOr<std::vector<uint64_t>> BeginRun(uint64_t calls) = 0;
  // All have been answered, or the device has given up (made_all false), which breaks the group. Unavailable:
  // a process was lost on the way.
  virtual absl::Status EndRun(bool made_all, const absl::Status& why) = 0;

  // Changes with every answer.
  virtual uint64_t Progress() const = 0;
  // What the processes said of call `index` of the run; the first error.
  virtual absl::Status AnswerStatus(uint64_t index) = 0;
  // Ends the calls that are left: their answers' flags are raised, the status says aborted. To be repeated as
  // long as the device has not come to its end, since a process that lives may lower them again.
  virtual void Abort(const absl::Status& why) = 0;
};

}  // namespace tandem::attention
