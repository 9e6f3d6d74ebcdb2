#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/shm/call_client.h"
#include "common/shm/handover.h"
#include "common/shm/memory.h"
#include "services/attention_gpu/experts/expert_link.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

constexpr absl::Duration kOpenPatience = absl::Seconds(10);
constexpr absl::Duration kHeartbeat = absl::Seconds(1);

// The session's stream. One thread reads it, another sends heartbeats and watches over the peer's; whichever
// finds the peer gone tells `lost`, once.
class Lease {
 public:
  explicit Lease(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(channel), stream_(stub_.Attach(&context_)), heard_(absl::Now()), beater_([this] { Beat(); }) {}
  ~Lease() {
    {
      absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    context_.TryCancel();
    beater_.join();
    if (reader_.joinable()) reader_.join();
    if (!finished_) stream_->Finish();
  }

  absl::StatusOr<v1::AttachRegion> Open(const v1::AttachOpen& open) {
    v1::AttachRequest request;
    *request.mutable_open() = open;
    v1::AttachResponse response;
    if (!stream_->Write(request) || !stream_->Read(&response)) {
      const grpc::Status status = stream_->Finish();
      finished_ = true;
      if (status.ok()) return absl::UnavailableError("Attach ended without a region");
      if (status.error_code() == grpc::StatusCode::CANCELLED) {
        return absl::UnavailableError("no answer to Attach");
      }
      return rpc::FromGrpc(status);
    }
    if (!response.has_region()) return absl::InternalError("Attach was answered without a region");
    return response.region();
  }

  // From now on the peer is watched.
  void Start(absl::Duration lease, std::function<void(const absl::Status&)> lost) {
    {
      absl::MutexLock lock(&mutex_);
      heard_ = absl::Now();
      patience_ = lease;
      beating_ = true;
      lost_ = std::move(lost);
    }
    reader_ = std::thread([this] { Read(); });
  }

 private:
  void Read() {
    v1::AttachResponse response;
    while (stream_->Read(&response)) {
      absl::MutexLock lock(&mutex_);
      heard_ = absl::Now();
    }
    grpc::Status status;
    {
      absl::MutexLock lock(&mutex_);
      beating_ = false;  // no write any more
    }
    {
      absl::MutexLock writing(&write_mutex_);
      status = stream_->Finish();
      finished_ = true;
    }
    const bool says = !status.error_message().empty() && status.error_code() != grpc::StatusCode::CANCELLED;
    Lost(absl::UnavailableError(says ? absl::StrCat("the session ended (", status.error_message(), ")")
                                     : "the session ended"));
  }

  void Beat() {
    v1::AttachRequest request;
    uint64_t count = 0;
    mutex_.Lock();
    while (!closing_) {
      mutex_.AwaitWithTimeout(absl::Condition(&closing_), std::min(kHeartbeat, patience_ / 4));
      if (closing_) break;
      if (absl::Now() - heard_ > patience_) {
        mutex_.Unlock();
        Lost(absl::UnavailableError("no sign of life from it"));
        context_.TryCancel();
        mutex_.Lock();
        break;
      }
      if (!beating_) continue;
      mutex_.Unlock();
      request.mutable_heartbeat()->set_count(++count);
      {
        absl::MutexLock writing(&write_mutex_);
        if (!finished_) stream_->Write(request);
      }
      mutex_.Lock();
    }
    mutex_.Unlock();
  }

  void Lost(const absl::Status& why) {
    std::function<void(const absl::Status&)> lost;
    {
      absl::MutexLock lock(&mutex_);
      std::swap(lost, lost_);
    }
    if (lost) lost(why);
  }

  v1::Experts::Stub stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>> stream_;
  absl::Mutex write_mutex_;  // a write and the end of the stream exclude each other
  bool finished_ = false;    // under write_mutex_ as long as there are threads
  absl::Mutex mutex_;
  absl::Time heard_;
  absl::Duration patience_ = kOpenPatience;
  bool beating_ = false;
  bool closing_ = false;
  std::function<void(const absl::Status&)> lost_;
  std::thread reader_;
  std::thread beater_;  // last: uses all of the above
};

class RingLink final : public ExpertLink {
 public:
  RingLink(const std::shared_ptr<grpc::Channel>& channel, const CallFormat& format, absl::Duration spin)
      : format_(format), spin_(spin), lease_(std::make_unique<Lease>(channel)) {}
  ~RingLink() override { lease_.reset(); }  // its threads use the client

  absl::Status Open() {
    v1::AttachOpen open;
    open.set_max_tokens(static_cast<uint32_t>(format_.max_tokens));
    open.set_experts_per_token(static_cast<uint32_t>(format_.experts_per_token));
    open.set_slots(format_.slots);
    TANDEM_ASSIGN_OR_RETURN(const v1::AttachRegion region, lease_->Open(open));
    shm::RegionShape shape;
    shape.slots = open.slots();
    shape.max_rows = open.max_tokens();
    shape.max_pairs = open.experts_per_token();
    shape.width = static_cast<uint32_t>(format_.hidden_size);
    TANDEM_ASSIGN_OR_RETURN(const shm::RegionLayout layout, shm::RegionLayout::Of(shape));
    if (region.version() != shm::kRegionVersion || region.region_bytes() != layout.region_bytes() ||
        region.slots() != shape.slots || region.max_tokens() != shape.max_rows ||
        region.experts_per_token() != shape.max_pairs || region.hidden_size() != shape.width ||
        region.lease_milliseconds() < 100 || region.lease_milliseconds() > 3'600'000) {
      return absl::FailedPreconditionError("it offers another kind of region than was asked for");
    }
    auto fd = shm::ReceiveDescriptor(region.socket_path(), region.token(), absl::Seconds(5));
    if (!fd.ok()) return absl::FailedPreconditionError(fd.status().message());
    TANDEM_ASSIGN_OR_RETURN(memory_, shm::SharedMemory::Adopt(std::move(*fd), layout.region_bytes()));
    const shm::SessionId session{region.epoch(), region.first_sequence()};
    TANDEM_RETURN_IF_ERROR(shm::CallClient::CheckHeader(memory_.data(), layout, session));
    client_ = std::make_unique<shm::CallClient>(memory_.data(), layout, session, shm::WaitPolicy{spin_});
    lease_->Start(absl::Milliseconds(region.lease_milliseconds()),
                  [client = client_.get()](const absl::Status& why) { client->Abort(why); });
    return absl::OkStatus();
  }

  absl::Status Prepare(const ExpertCall& call) override {
    TANDEM_ASSIGN_OR_RETURN(
        const shm::OutgoingCall to,
        client_->Prepare(static_cast<uint32_t>(call.layer), static_cast<uint32_t>(call.n_tokens),
                         static_cast<uint32_t>(call.experts_per_token), format_.input_type(),
                         format_.output_type(),
                         call.bulk ? shm::CallPrecision::kBulk : shm::CallPrecision::kServed));
    if (call.n_tokens == 0) return absl::OkStatus();
    std::memcpy(to.ids.data(), call.expert_ids, to.ids.size());
    std::memcpy(to.weights.data(), call.expert_weights, to.weights.size());
    EncodeActivations(format_, call, to.input.data());
    return absl::OkStatus();
  }

  absl::Status Send(absl::Time) override { return client_->Ring(); }

  absl::StatusOr<LinkAnswer> Await(absl::Time deadline) override {
    TANDEM_ASSIGN_OR_RETURN(const shm::CallAnswer answer, client_->Await(deadline));
    return LinkAnswer{answer.status, answer.output};
  }

  shm::CallClient* client() override { return client_.get(); }

 private:
  const CallFormat format_;
  const absl::Duration spin_;
  shm::SharedMemory memory_;
  std::unique_ptr<shm::CallClient> client_;
  std::unique_ptr<Lease> lease_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertLink>> OpenRingLink(const std::shared_ptr<grpc::Channel>& channel,
                                                         const CallFormat& format, absl::Duration spin) {
  auto link = std::make_unique<RingLink>(channel, format, spin);
  TANDEM_RETURN_IF_ERROR(link->Open());
  return link;
}

}  // namespace tandem::attention
