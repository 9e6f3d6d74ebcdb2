#include "services/gateway/admission/admission.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "services/gateway/grpc/engine_pool.h"

namespace tandem::gateway {

Admission::Ticket::~Ticket() {
  if (admission_ != nullptr) admission_->Leave(weight_);
}

absl::Status Admission::CheckDraining() const {
  std::lock_guard lock(mutex_);
  return draining_ ? absl::UnavailableError("the server is shutting down") : absl::OkStatus();
}

absl::Status Admission::Ready() const {
  if (absl::Status draining = CheckDraining(); !draining.ok()) return draining;
  return engines_ == nullptr ? absl::OkStatus() : engines_->Ready();
}

absl::Status Admission::Ticket::Grow(int more) {
  absl::Status taken = admission_->Take(more, weight_);
  if (taken.ok()) weight_ += more;
  return taken;
}

absl::StatusOr<Admission::Ticket> Admission::Enter(int weight) {
  if (absl::Status draining = CheckDraining(); !draining.ok()) return draining;
  if (engines_ != nullptr) {
    if (absl::Status admits = engines_->Admits(patience_); !admits.ok()) return admits;
  }
  if (absl::Status taken = Take(weight, 0); !taken.ok()) return taken;
  return Ticket(this, weight);
}

absl::Status Admission::Take(int weight, int already) {
  std::lock_guard lock(mutex_);
  if (draining_ && already == 0) return absl::UnavailableError("the server is shutting down");
  if (in_flight_ > already && in_flight_ + weight > max_sequences_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("too many requests: ", in_flight_, " of ", max_sequences_, " sequences are under way"));
  }
  in_flight_ += weight;
  return absl::OkStatus();
}

void Admission::Leave(int weight) {
  std::lock_guard lock(mutex_);
  in_flight_ -= weight;
  if (in_flight_ == 0) empty_.notify_all();
}

void Admission::Drain() {
  std::lock_guard lock(mutex_);
  draining_ = true;
}

bool Admission::WaitEmpty(absl::Duration patience) {
  std::unique_lock lock(mutex_);
  return empty_.wait_for(lock, absl::ToChronoMilliseconds(std::max(patience, absl::ZeroDuration())),
                         [this] { return in_flight_ == 0; });
}

int Admission::in_flight() const {
  std::lock_guard lock(mutex_);
  return in_flight_;
}

}  // namespace tandem::gateway
