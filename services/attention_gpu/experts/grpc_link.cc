#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/quant/quant.h"
#include "services/attention_gpu/experts/expert_link.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

// Cancels a call's stream when its deadline passes: a synchronous gRPC read has no timeout of its own.
class Watchdog {
 public:
  explicit Watchdog(grpc::ClientContext* context) : context_(context), thread_([this] { Run(); }) {}
  ~Watchdog() {
    {
      absl::MutexLock lock(&mutex_);
      stop_ = true;
    }
    thread_.join();
  }
  void Arm(absl::Time deadline) {
    absl::MutexLock lock(&mutex_);
    deadline_ = deadline;
  }
  // True if the deadline had passed.
  bool Disarm() {
    absl::MutexLock lock(&mutex_);
    deadline_ = absl::InfiniteFuture();
    return std::exchange(fired_, false);
  }

 private:
  void Run() {
    absl::MutexLock lock(&mutex_);
    while (!stop_) {
      // Arming while the wait is already for a later time needs a wake-up only if the new deadline is nearer;
      // deadlines only move forward, so looking again when the old one has passed is enough.
      const absl::Time until = std::min(deadline_, absl::Now() + absl::Milliseconds(500));
      mutex_.AwaitWithDeadline(absl::Condition(&stop_), until);
      if (absl::Now() >= deadline_) {
        context_->TryCancel();
        deadline_ = absl::InfiniteFuture();
        fired_ = true;
      }
    }
  }
  grpc::ClientContext* const context_;
  absl::Mutex mutex_;
  absl::Time deadline_ = absl::InfiniteFuture();
  bool fired_ = false;
  bool stop_ = false;
  std::thread thread_;
};

class GrpcLink final : public ExpertLink {
 public:
  GrpcLink(const std::shared_ptr<grpc::Channel>& channel, const CallFormat& format)
      : format_(format), stub_(channel), stream_(stub_.Forward(&context_)), watchdog_(&context_) {}
  ~GrpcLink() override {
    context_.TryCancel();
    if (!finished_) stream_->Finish();
  }

  absl::Status Prepare(const ExpertCall& call) override {
    const size_t pairs = static_cast<size_t>(call.n_tokens) * static_cast<size_t>(call.experts_per_token);
    request_.set_sequence(++sequence_);
    request_.set_layer(static_cast<uint32_t>(call.layer));
    request_.set_n_tokens(static_cast<uint32_t>(call.n_tokens));
    request_.set_experts_per_token(static_cast<uint32_t>(call.experts_per_token));
    request_.mutable_expert_ids()->assign(reinterpret_cast<const char*>(call.expert_ids),
                                          pairs * sizeof(int32_t));
    request_.mutable_expert_weights()->assign(reinterpret_cast<const char*>(call.expert_weights),
                                              pairs * sizeof(float));
    std::string& bytes = *request_.mutable_activations();
    bytes.resize(format_.ActivationBytes(call.n_tokens));
    EncodeActivations(format_, call, reinterpret_cast<uint8_t*>(bytes.data()));
    request_.set_activation_type(format_.float_activations ? v1::DATA_TYPE_F32 : v1::DATA_TYPE_BF16);
    request_.set_answer_type(format_.exact_answers ? v1::DATA_TYPE_F64 : v1::DATA_TYPE_F32);
    request_.set_precision(call.bulk ? v1::PRECISION_BULK : v1::PRECISION_UNSPECIFIED);
    return absl::OkStatus();
  }

  absl::Status Send(absl::Time deadline) override {
    watchdog_.Arm(deadline);
    if (!stream_->Write(request_)) return Broken("the connection broke while sending");
    return absl::OkStatus();
  }

  absl::StatusOr<LinkAnswer> Await(absl::Time) override {
    if (!stream_->Read(&response_)) return Broken("the connection broke while waiting for its answer");
    watchdog_.Disarm();
    if (response_.sequence() != request_.sequence()) return absl::DataLossError("it answered out of order");
    LinkAnswer out;
    if (response_.status_code() != 0) {
      out.status =
          absl::Status(static_cast<absl::StatusCode>(response_.status_code()), response_.status_message());
      return out;
    }
    const std::string& answer = response_.answer();
    if (answer.size() != format_.AnswerBytes(request_.n_tokens())) {
      return absl::DataLossError(absl::StrCat("it answered ", answer.size(), " bytes"));
    }
    out.values = {reinterpret_cast<const uint8_t*>(answer.data()), answer.size()};
    return out;
  }

 private:
  absl::Status Broken(const std::string& what) {
    if (watchdog_.Disarm()) return absl::DeadlineExceededError(what);
    context_.TryCancel();
    const grpc::Status status = stream_->Finish();
    finished_ = true;
    if (status.error_message().empty() || status.error_code() == grpc::StatusCode::CANCELLED) {
      return absl::UnavailableError(what);
    }
    return absl::UnavailableError(absl::StrCat(what, " (", status.error_message(), ")"));
  }

  const CallFormat format_;
  v1::Experts::Stub stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ForwardRequest, v1::ForwardResponse>> stream_;
  v1::ForwardRequest request_;
  v1::ForwardResponse response_;
  uint64_t sequence_ = 0;
  bool finished_ = false;
  Watchdog watchdog_;  // last: stops before the context goes
};

}  // namespace

void EncodeActivations(const CallFormat& format, const ExpertCall& call, uint8_t* to) {
  if (format.float_activations) {
    std::memcpy(to, call.activations, format.ActivationBytes(call.n_tokens));
    return;
  }
  const int64_t values = call.n_tokens * format.hidden_size;
  for (int64_t i = 0; i < values; ++i) {
    const uint16_t h = quant::FloatToBf16(call.activations[i]);
    std::memcpy(to + 2 * i, &h, sizeof h);
  }
}

std::unique_ptr<ExpertLink> OpenGrpcLink(const std::shared_ptr<grpc::Channel>& channel,
                                         const CallFormat& format) {
  return std::make_unique<GrpcLink>(channel, format);
}

}  // namespace tandem::attention
