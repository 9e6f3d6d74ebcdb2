// Sequence numbers in shared memory that one process raises and another waits for.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "absl/time/time.h"

namespace tandem::shm {

// Lies in shared memory, alone in its cache lines (two, since the hardware fetches neighbours). One side
// signals, one thread of the other side waits. `sequence` is what a GPU's 32-bit stream memory operations
// write and wait for: it takes the low half of a 64-bit sequence number. No field is trusted: a peer that
// writes nonsense only harms its own waiting.
struct alignas(128) Flag {
  std::atomic<uint32_t> sequence;
  std::atomic<uint32_t> sleeping;  // not 0: the waiter sleeps, or is about to; signalling takes a system call
  // Not 0: a device signals, which cannot wake a sleeper, so the waiter looks on and on. The signalling side
  // sets it for the time of a run (SetAwake); what it costs if that side dies is bounded by the wait's `most`
  // and by the lease.
  std::atomic<uint32_t> awake;
  // The futex word: changed by all who wake, so that a waiter who has looked at the other fields and is about
  // to sleep does not, whichever of them has changed since.
  std::atomic<uint32_t> wakes;
};
static_assert(sizeof(Flag) == 128 && std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::is_standard_layout_v<Flag>);

// What was written before is visible to who sees the number.
void Signal(Flag& flag, uint32_t sequence);
// Wakes the waiter without a new number, so that it looks at its `stop`.
void Wake(Flag& flag);
// From now on the waiter does not sleep, and a sleeping one is woken; or it may sleep again.
void SetAwake(Flag& flag, bool awake);

// The CPUs that this thread may run on.
int AllowedCpus();

struct WaitPolicy {
  // How long a waiter looks at the flag before it sleeps.
  absl::Duration spin = absl::ZeroDuration();

  // For a process whose own work keeps `busy_threads` busy: on a machine with CPUs to spare a waiter may spin
  // long; where there are none it would take the time that the one it waits for needs.
  static WaitPolicy ForMachine(int busy_threads);
};

enum class WaitResult { kSignalled, kTimeout, kStopped };

// The waiting side's memory of how well spinning went: after each spin that was in vain it sleeps at once for
// the next few waits, for twice as many as the time before, until a spin succeeds. A spin during which the
// system gave the CPU to another thread ends there and counts as vain: two sides that share a CPU soon stop
// spinning against each other. Not thread-safe.
class Waiter {
 public:
  explicit Waiter(WaitPolicy policy) : spin_nanoseconds_(absl::ToInt64Nanoseconds(policy.spin)) {}

  // Until flag.sequence is not `last` any more, or `most` has passed, or stop is true and Wake was
  // called (at the latest a tenth of a second after *stop became true). With a `most` of zero it only looks.
  WaitResult Wait(Flag& flag, uint32_t last, absl::Duration most, const std::atomic<bool>& stop);

  // System calls made to sleep: 0 as long as all waits ended while spinning.
  uint64_t sleeps() const { return sleeps_; }
  // Sleeps that nobody ended although there was a reason to: none as long as the peer keeps to the rules.
  uint64_t overslept() const { return overslept_; }

 private:
  WaitResult Rest(Flag& flag, uint32_t last, int64_t end, const std::atomic<bool>& stop);
  // Both: nullopt when the flag's `awake` asks for the other.
  std::optional<WaitResult> Sleep(Flag& flag, uint32_t last, int64_t end, const std::atomic<bool>& stop);
  std::optional<WaitResult> LookOn(Flag& flag, uint32_t last, int64_t end, const std::atomic<bool>& stop);

  int64_t spin_nanoseconds_;
  int pause_ = 0;  // waits to come that do not spin
  int last_pause_ = 0;
  uint64_t sleeps_ = 0;
  uint64_t overslept_ = 0;
};

}  // namespace tandem::shm
