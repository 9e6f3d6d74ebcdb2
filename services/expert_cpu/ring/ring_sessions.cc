#include "services/expert_cpu/ring/ring_sessions.h"

#include <grpcpp/grpcpp.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/shm/call_host.h"
#include "common/shm/handover.h"
#include "common/telemetry/log.h"
#include "common/threading/thread_pool.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::expert {
namespace {

constexpr size_t kMostSessions = 16;
constexpr uint32_t kMostSlots = 8;
constexpr size_t kMostOffers = 16;  // beside those of sessions

int64_t NowMilliseconds() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

uint64_t RandomEpoch() {
  std::random_device random;
  return (uint64_t{random()} << 32) | random();
}

absl::Status InRange(const char* what, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("Attach: ", what, " ", value, "; from 1 to ", most));
}

// The call as the Moe takes it.
absl::StatusOr<Call> ToCall(const shm::IncomingCall& in) {
  TANDEM_RETURN_IF_ERROR(in.valid);
  Call call;
  call.layer = in.layer;
  call.n_tokens = in.rows;
  call.experts_per_token = in.pairs;
  call.expert_ids = in.ids;
  call.expert_weights = in.weights;
  call.activations = in.input;
  call.activation_type =
      in.input_type == shm::ValueType::kBf16 ? ActivationType::kBf16 : ActivationType::kF32;
  call.answer_type = in.output_type == shm::ValueType::kF64 ? AnswerType::kF64 : AnswerType::kF32;
  call.bulk = in.precision == shm::CallPrecision::kBulk;
  return call;
}

}  // namespace

std::string RingSocketPath(const std::string& address) {
  constexpr size_t kLongest = 107;  // what the system takes
  if (absl::StartsWith(address, "unix:")) {
    std::string path = address.substr(absl::StartsWith(address, "unix:///") ? 7 : 5) + ".ring";
    if (path.front() != '/') {
      char* here = get_current_dir_name();
      if (here != nullptr) path = absl::StrCat(here, "/", path);
      std::free(here);
    }
    if (path.size() <= kLongest) return path;
  }
  std::string name = absl::StrCat("tandem-ring-", geteuid(), "-", address);
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '-') c = '_';
  }
  for (const char* variable : {"XDG_RUNTIME_DIR", "TMPDIR"}) {
    const char* folder = std::getenv(variable);
    if (folder == nullptr || folder[0] != '/' || access(folder, W_OK | X_OK) != 0) continue;
    std::string path = absl::StrCat(folder, "/", name);
    if (path.size() <= kLongest) return path;
  }
  return absl::StrCat("/tmp/", name).substr(0, kLongest);
}

struct RingSessions::Impl {
  RingOptions options;
  Compute compute;
  std::unique_ptr<shm::HandoverServer> handover;
  std::mutex mutex;
  bool stopping = false;
  std::set<Session*> sessions;
  std::deque<std::string> offers;  // tokens, the oldest first
};

// From the first message on. Lives on the handler's stack.
class RingSessions::Session {
 public:
  Session(Impl& rings, grpc::ServerContext* context) : rings_(rings), context_(context) {}
  ~Session() {
    if (worker_.joinable()) {
      host_->Stop();
      worker_.join();
    }
    if (!token_.empty()) rings_.handover->Withdraw(token_);
  }

  // Makes the region and offers it; the worker waits for calls from now on.
  absl::Status Open(const v1::AttachOpen& open, v1::AttachRegion* region) {
    const RingOptions& limits = rings_.options;
    TANDEM_RETURN_IF_ERROR(InRange("max_tokens", open.max_tokens(), limits.max_tokens));
    TANDEM_RETURN_IF_ERROR(InRange("experts_per_token", open.experts_per_token(), limits.max_pairs));
    TANDEM_RETURN_IF_ERROR(InRange("slots", open.slots(), kMostSlots));
    shm::RegionShape shape;
    shape.slots = open.slots();
    shape.max_rows = open.max_tokens();
    shape.max_pairs = open.experts_per_token();
    shape.width = static_cast<uint32_t>(limits.hidden_size);
    TANDEM_ASSIGN_OR_RETURN(const shm::RegionLayout layout, shm::RegionLayout::Of(shape));
    TANDEM_ASSIGN_OR_RETURN(memory_, shm::SharedMemory::Create("tandem-ring", layout.region_bytes()));
    const shm::SessionId session{RandomEpoch(), 1};
    {
      const std::lock_guard lock(rings_.mutex);
      host_ = std::make_unique<shm::CallHost>(memory_.data(), layout, session, limits.wait);
    }
    TANDEM_ASSIGN_OR_RETURN(token_, rings_.handover->Offer(memory_.fd()));
    region->set_socket_path(rings_.handover->path());
    region->set_token(token_);
    region->set_version(shm::kRegionVersion);
    region->set_region_bytes(layout.region_bytes());
    region->set_epoch(session.epoch);
    region->set_first_sequence(session.first_sequence);
    region->set_max_tokens(shape.max_rows);
    region->set_experts_per_token(shape.max_pairs);
    region->set_slots(shape.slots);
    region->set_hidden_size(shape.width);
    region->set_lease_milliseconds(static_cast<uint32_t>(absl::ToInt64Milliseconds(limits.lease)));
    Heard();
    worker_ = std::thread([this] { Work(); });
    return absl::OkStatus();
  }

  void Heard() { heard_ = NowMilliseconds(); }

  // Under the sessions' mutex.
  void Stop() {
    if (host_ != nullptr) {
      host_->Stop();  // the worker cancels the stream when it has ended
    } else {
      context_->TryCancel();
    }
  }

  // Why the worker ended, once the stream has.
  absl::Status End() {
    if (worker_.joinable()) {
      host_->Stop();
      worker_.join();
    }
    return end_;
  }

 private:
  void Work() {
    pthread_setname_np(pthread_self(), "tandem-ring");
    if (rings_.options.cpu >= 0) threading::PinCurrentThread(rings_.options.cpu);
    const int64_t lease = absl::ToInt64Milliseconds(rings_.options.lease);
    for (;;) {
      shm::IncomingCall in;
      const absl::Status next = host_->Next(std::min(rings_.options.lease / 4, absl::Seconds(1)), &in);
      if (absl::IsDeadlineExceeded(next)) {
        if (NowMilliseconds() - heard_ <= lease) continue;
        end_ = absl::DeadlineExceededError(absl::StrCat("no heartbeat for ", lease, " ms"));
      } else if (!next.ok()) {
        end_ = next;
      }
      if (!end_.ok()) break;
      Heard();
      const absl::StatusOr<CallStatistics> done = rings_.compute(ToCall(in), in.output);
      const CallStatistics s = done.ok() ? *done : CallStatistics{};
      host_->Answer(in, done.status(),
                    {static_cast<uint64_t>(s.nanoseconds), s.weight_bytes_read,
                     static_cast<uint64_t>(s.distinct_experts)});
    }
    context_->TryCancel();  // wakes the handler
  }

  Impl& rings_;
  grpc::ServerContext* const context_;
  shm::SharedMemory memory_;
  std::string token_;
  std::unique_ptr<shm::CallHost> host_;
  std::atomic<int64_t> heard_{0};  // milliseconds
  absl::Status end_;               // of the worker's
  std::thread worker_;
};

RingSessions::RingSessions(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RingSessions::~RingSessions() = default;

absl::StatusOr<std::unique_ptr<RingSessions>> RingSessions::Start(const RingOptions& options,
                                                                  Compute compute) {
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->compute = std::move(compute);
  TANDEM_ASSIGN_OR_RETURN(impl->handover, shm::HandoverServer::Start(options.socket_path, geteuid()));
  return std::unique_ptr<RingSessions>(new RingSessions(std::move(impl)));
}

grpc::Status RingSessions::Serve(grpc::ServerContext* context, Stream* stream) {
  Session session(*impl_, context);
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->stopping) return rpc::ToGrpc(absl::UnavailableError("the expert process is stopping"));
    if (impl_->sessions.size() >= kMostSessions) {
      return rpc::ToGrpc(absl::ResourceExhaustedError(absl::StrCat(kMostSessions, " sessions are open")));
    }
    impl_->sessions.insert(&session);
  }
  v1::AttachRequest request;
  v1::AttachResponse response;
  absl::Status status;
  if (!stream->Read(&request) || !request.has_open()) {
    status = absl::InvalidArgumentError("Attach: the first message must be `open`");
  } else {
    status = session.Open(request.open(), response.mutable_region());
  }
  if (status.ok()) {
    spdlog::info("a client attached: {:.1f} MB of shared memory",
                 static_cast<double>(response.region().region_bytes()) / 1e6);
    bool open = stream->Write(response);
    while (open && stream->Read(&request)) {
      session.Heard();
      if (!request.has_heartbeat()) {
        status = absl::InvalidArgumentError("Attach: another message than a heartbeat");
        break;
      }
      response.mutable_heartbeat()->set_count(request.heartbeat().count());
      open = stream->Write(response);
    }
    const absl::Status end = session.End();
    if (status.ok() && !absl::IsCancelled(end)) status = end;
    spdlog::info("a client's session ended{}", status.ok() ? "" : ": " + std::string(status.message()));
  }
  const std::lock_guard lock(impl_->mutex);
  impl_->sessions.erase(&session);
  if (impl_->stopping) status = absl::UnavailableError("the expert process is stopping");
  return rpc::ToGrpc(status);
}

absl::StatusOr<std::string> RingSessions::Offer(const shm::FileDescriptor& fd) {
  TANDEM_ASSIGN_OR_RETURN(std::string token, impl_->handover->Offer(fd));
  const std::lock_guard lock(impl_->mutex);
  impl_->offers.push_back(token);
  if (impl_->offers.size() > kMostOffers) {
    impl_->handover->Withdraw(impl_->offers.front());
    impl_->offers.pop_front();
  }
  return token;
}

const std::string& RingSessions::socket_path() const { return impl_->handover->path(); }

void RingSessions::Stop() {
  const std::lock_guard lock(impl_->mutex);
  impl_->stopping = true;
  for (Session* session : impl_->sessions) session->Stop();
}

}  // namespace tandem::expert
