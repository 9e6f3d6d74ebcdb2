// Who may come in: at most so many sequences at a time, none while no engine is there to be waited for or the
// gateway is draining.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tandem::gateway {

class EnginePool;

// Thread-safe.
class Admission {
 public:
  // Room for `weight` sequences, given back with its destruction.
  class Ticket {
   public:
    Ticket(Ticket&& other) noexcept : admission_(other.admission_), weight_(other.weight_) {
      other.admission_ = nullptr;
    }
    Ticket& operator=(Ticket&&) = delete;
    ~Ticket();
    // For a request that turns out to be of more sequences. ResourceExhausted: no room.
    absl::Status Grow(int more);

   private:
    friend class Admission;
    Ticket(Admission* admission, int weight) : admission_(admission), weight_(weight) {}
    Admission* admission_;
    int weight_;
  };

  // `engines` may be null: then only the bound counts. `patience`: so long after an engine was lost it is
  // expected back, as by the streams that it has broken off.
  Admission(const EnginePool* engines, int max_sequences, absl::Duration patience)
      : engines_(engines), max_sequences_(max_sequences), patience_(patience) {}

  // Unavailable: draining, or no engine serves or is expected back (the message says why). ResourceExhausted:
  // the bound is hit. A request of more sequences than the bound allows is let in when nothing else runs.
  absl::StatusOr<Ticket> Enter(int weight = 1);

  // OK if requests are accepted now and an engine works on them: those that come while an engine has lost its
  // experts are let in and wait, but a load balancer has better places for them.
  absl::Status Ready() const;
  // From now on nobody comes in.
  void Drain();
  // True once everybody has left.
  bool WaitEmpty(absl::Duration patience);
  int in_flight() const;

 private:
  absl::Status CheckDraining() const;
  absl::Status Take(int weight, int already);
  void Leave(int weight);

  const EnginePool* const engines_;
  const int max_sequences_;
  const absl::Duration patience_;
  mutable std::mutex mutex_;
  std::condition_variable empty_;
  int in_flight_ = 0;
  bool draining_ = false;
};

}  // namespace tandem::gateway
