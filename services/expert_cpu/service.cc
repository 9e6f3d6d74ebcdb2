#include "services/expert_cpu/service.h"

#include <grpcpp/grpcpp.h>
#include <chrono>

#include <atomic>
#include <map>
#include <mutex>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "services/expert_cpu/weights_offer.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::expert {
namespace {

std::span<const uint8_t> Bytes(const std::string& s) {
  return {reinterpret_cast<const uint8_t*>(s.data()), s.size()};
}

// New at each start, so that a client can tell a restart from a reconnect.
std::string RandomId() {
  std::random_device random;
  return absl::StrFormat("%08x%08x", random(), random());
}

absl::StatusOr<Call> ToCall(const v1::ForwardRequest& request) {
  Call call;
  call.layer = request.layer();
  call.n_tokens = request.n_tokens();
  call.experts_per_token = request.experts_per_token();
  call.expert_ids = Bytes(request.expert_ids());
  call.expert_weights = Bytes(request.expert_weights());
  call.activations = Bytes(request.activations());
  switch (request.activation_type()) {
    case v1::DATA_TYPE_F32:
      call.activation_type = ActivationType::kF32;
      break;
    case v1::DATA_TYPE_BF16:
      call.activation_type = ActivationType::kBf16;
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "activation_type ", static_cast<int>(request.activation_type()), " is not F32 or BF16"));
  }
  switch (request.answer_type()) {
    case v1::DATA_TYPE_F32:
      call.answer_type = AnswerType::kF32;
      break;
    case v1::DATA_TYPE_F64:
      call.answer_type = AnswerType::kF64;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("answer_type ", static_cast<int>(request.answer_type()), " is not F32 or F64"));
  }
  switch (request.precision()) {
    case v1::PRECISION_UNSPECIFIED:
      break;
    case v1::PRECISION_BULK:
      call.bulk = true;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("precision ", static_cast<int>(request.precision()), " is not UNSPECIFIED or BULK"));
  }
  return call;
}

}  // namespace

class ExpertsService::Impl final : public v1::Experts::Service {
 public:
  Impl(telemetry::Metrics& metrics, const LoadProgress& progress, const Identity& identity)
      : progress_(progress), identity_(identity), metrics_(metrics) {}

  void SetReady(const Shard& shard, Moe& moe, double read_ceiling) {
    metrics_.AddGauge("tandem_expert_resident_bytes", "Bytes of expert weights in memory.", Node())
        .Set(static_cast<double>(shard.resident_bytes()));
    const std::lock_guard lock(mutex_);
    shard_ = &shard;
    moe_ = &moe;
    read_ceiling_ = read_ceiling;
    if (read_ceiling > 0) {
      bandwidth_ratio_ = &metrics_.AddGauge("tandem_expert_bandwidth_ratio",
                                            "Bytes of weights read a second in recent calls, as a share of "
                                            "what a plain read loop reached at start-up.",
                                            Node());
    }
  }

  absl::Status EnableRing(RingOptions options) {
    options.max_tokens = moe_->options().max_tokens;
    options.max_pairs = shard_->plan().n_routed_experts;
    options.hidden_size = shard_->plan().hidden_size;
    TANDEM_ASSIGN_OR_RETURN(
        std::unique_ptr<RingSessions> rings,
        RingSessions::Start(options, [this](const absl::StatusOr<Call>& call, std::span<uint8_t> answer) {
          absl::StatusOr<CallStatistics> done = call.ok() ? Compute(*call, answer) : call.status();
          Count(done);
          return done;
        }));
    const std::lock_guard lock(mutex_);
    rings_ = std::move(rings);
    return absl::OkStatus();
  }

  bool InUse(absl::Duration d) {
    const std::lock_guard lock(mutex_);
    return (attached_ > 0 || !streams_.empty()) &&
           SteadyNanoseconds() - last_call_.load(std::memory_order_relaxed) < absl::ToInt64Nanoseconds(d);
  }

  void Stop() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    if (rings_ != nullptr) rings_->Stop();
    for (const auto& [context, busy] : streams_) {
      if (!busy) context->TryCancel();
    }
  }

  grpc::Status Describe(grpc::ServerContext*, const v1::DescribeRequest*,
                        v1::ShardDescription* out) override {
    {
      const std::lock_guard lock(mutex_);
      if (moe_ == nullptr || stopping_) return rpc::ToGrpc(NotReady());
    }
    // The pointers do not change any more.
    const ShardPlan& plan = shard_->plan();
    out->set_model_fingerprint(shard_->fingerprint());
    out->set_model_name(shard_->model_name());
    out->set_hidden_size(static_cast<uint32_t>(plan.hidden_size));
    out->set_moe_intermediate_size(static_cast<uint32_t>(plan.moe_intermediate_size));
    out->set_n_routed_experts(static_cast<uint32_t>(plan.n_routed_experts));
    out->set_num_experts_per_tok(static_cast<uint32_t>(plan.num_experts_per_tok));
    for (const int64_t layer : plan.layers) out->add_layers(static_cast<uint32_t>(layer));
    out->set_expert_begin(static_cast<uint32_t>(plan.expert_begin));
    out->set_expert_end(static_cast<uint32_t>(plan.expert_end));
    out->set_row_begin(static_cast<uint32_t>(plan.row_begin));
    out->set_row_end(static_cast<uint32_t>(plan.row_end));
    for (const std::string& type : shard_->WeightTypes()) out->add_weight_types(type);
    out->set_isa(std::string(kernels::IsaName(kernels::ActiveIsa())));
    out->set_numa_node(identity_.numa_node);
    out->set_threads(static_cast<uint32_t>(identity_.threads));
    out->set_max_tokens(static_cast<uint32_t>(moe_->options().max_tokens));
    out->set_precision(moe_->options().precision == kernels::Precision::kReference ? v1::PRECISION_REFERENCE
                                                                                   : v1::PRECISION_FAST);
    out->set_resident_bytes(shard_->resident_bytes());
    out->set_instance_id(instance_id_);
    return grpc::Status::OK;
  }

  grpc::Status Forward(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<v1::ForwardResponse, v1::ForwardRequest>* stream) override {
    if (const absl::Status open = Open(context); !open.ok()) return rpc::ToGrpc(open);
    v1::ForwardRequest request;  // reused: its strings keep their memory
    v1::ForwardResponse response;
    bool stopped = false;
    while (!stopped && stream->Read(&request)) {
      if (!SetBusy(context, true)) break;
      Answer(request, response);
      const bool written = stream->Write(response);
      stopped = !SetBusy(context, false);
      if (!written) break;
    }
    const bool stopping = Close(context);
    return stopping ? rpc::ToGrpc(absl::UnavailableError("the expert process is stopping"))
                    : grpc::Status::OK;
  }

  grpc::Status Attach(grpc::ServerContext* context, RingSessions::Stream* stream) override {
    const absl::StatusOr<RingSessions*> rings = Rings();
    if (!rings.ok()) return rpc::ToGrpc(rings.status());
    ++attached_;
    grpc::Status status = (*rings)->Serve(context, stream);
    --attached_;
    return status;
  }

  grpc::Status Weights(grpc::ServerContext*, const v1::WeightsRequest*, v1::WeightsOffer* out) override {
    return rpc::ToGrpc(OfferWeights(out));
  }

 private:
  telemetry::Labels Node() const { return {{"numa_node", std::to_string(identity_.numa_node)}}; }

  absl::Status NotReady() const {
    if (stopping_) return absl::UnavailableError("the expert process is stopping");
    const uint64_t total = progress_.bytes_total, read = progress_.bytes_read;
    if (total == 0) return absl::UnavailableError("loading: the model file is being opened");
    return absl::UnavailableError(absl::StrFormat(
        "loading: %.0f %% (%.2f of %.2f GB)", 100.0 * static_cast<double>(read) / static_cast<double>(total),
        static_cast<double>(read) / 1e9, static_cast<double>(total) / 1e9));
  }

  absl::StatusOr<RingSessions*> Rings() {
    const std::lock_guard lock(mutex_);
    if (moe_ == nullptr || stopping_) return NotReady();
    if (rings_ == nullptr) return absl::FailedPreconditionError("this process has no shared-memory ring");
    return rings_.get();  // does not change any more
  }

  absl::Status OfferWeights(v1::WeightsOffer* out) {
    TANDEM_ASSIGN_OR_RETURN(RingSessions * rings, Rings());
    TANDEM_ASSIGN_OR_RETURN(const shm::FileDescriptor fd, shard_->arena().OpenReadOnly());
    TANDEM_ASSIGN_OR_RETURN(std::string token, rings->Offer(fd));
    DescribeWeights(*shard_, out);
    out->set_socket_path(rings->socket_path());
    out->set_token(std::move(token));
    return absl::OkStatus();
  }

  absl::Status Open(grpc::ServerContext* context) {
    const std::lock_guard lock(mutex_);
    if (moe_ == nullptr || stopping_) return NotReady();
    streams_[context] = false;
    return absl::OkStatus();
  }
  // False: stopping, the stream is to end.
  bool SetBusy(grpc::ServerContext* context, bool busy) {
    const std::lock_guard lock(mutex_);
    streams_[context] = busy;
    return !stopping_;
  }
  bool Close(grpc::ServerContext* context) {
    const std::lock_guard lock(mutex_);
    streams_.erase(context);
    return stopping_;
  }

  void Answer(const v1::ForwardRequest& request, v1::ForwardResponse& response) {
    const absl::StatusOr<CallStatistics> done = Compute(request, *response.mutable_answer());
    response.set_sequence(request.sequence());
    response.set_status_code(static_cast<uint32_t>(done.status().code()));
    response.set_status_message(std::string(done.status().message()));
    if (!done.ok()) response.clear_answer();
    const CallStatistics s = done.ok() ? *done : CallStatistics{};
    response.set_compute_nanoseconds(static_cast<uint64_t>(s.nanoseconds));
    response.set_weight_bytes_read(s.weight_bytes_read);
    response.set_distinct_experts(static_cast<uint32_t>(s.distinct_experts));
    Count(done);
  }

  void Count(const absl::StatusOr<CallStatistics>& done) {
    if (!done.ok()) {
      errors_.Add();
      return;
    }
    if (done->nanoseconds == 0) return;  // an empty call
    last_call_.store(SteadyNanoseconds(), std::memory_order_relaxed);
    calls_.Add();
    const double seconds = static_cast<double>(done->nanoseconds) * 1e-9;
    seconds_.Observe(seconds);
    bytes_read_.Add(static_cast<double>(done->weight_bytes_read));
    ObserveBandwidth(static_cast<double>(done->weight_bytes_read), seconds);
  }

  // Over about the last hundred calls.
  void ObserveBandwidth(double bytes, double seconds) {
    if (bandwidth_ratio_ == nullptr) return;
    const std::lock_guard lock(mutex_);
    recent_bytes_ = 0.99 * recent_bytes_ + bytes;
    recent_seconds_ = 0.99 * recent_seconds_ + seconds;
    if (recent_seconds_ > 0) bandwidth_ratio_->Set(recent_bytes_ / recent_seconds_ / read_ceiling_);
  }

  absl::StatusOr<CallStatistics> Compute(const v1::ForwardRequest& request, std::string& answer) {
    const absl::StatusOr<Call> call = ToCall(request);
    if (!call.ok()) return call.status();
    if (call->n_tokens > moe_->options().max_tokens) {  // before the answer takes memory
      return absl::InvalidArgumentError(absl::StrCat(call->n_tokens, " tokens; from 1 to ",
                                                     moe_->options().max_tokens, " can be in a call"));
    }
    answer.resize(moe_->AnswerBytes(call->n_tokens, call->answer_type));
    return Compute(*call, {reinterpret_cast<uint8_t*>(answer.data()), answer.size()});
  }

  absl::StatusOr<CallStatistics> Compute(const Call& call, std::span<uint8_t> answer) {
    if (call.n_tokens == 0) return CallStatistics{};
    return moe_->Forward(call, answer);
  }

  static int64_t SteadyNanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  const LoadProgress& progress_;
  const Identity identity_;
  const std::string instance_id_ = RandomId();
  telemetry::Metrics& metrics_;
  telemetry::Histogram& seconds_ = metrics_.AddHistogram(
      "tandem_expert_call_seconds", "Time of one batched call over the experts of a layer.",
      telemetry::MicrosecondBuckets(), Node());
  telemetry::Counter& bytes_read_ = metrics_.AddCounter(
      "tandem_expert_bytes_read_total", "Bytes of the distinct experts that calls have read.", Node());
  telemetry::Counter& calls_ = AddOutcome("ok");
  telemetry::Counter& errors_ = AddOutcome("error");

  telemetry::Counter& AddOutcome(const char* outcome) {
    telemetry::Labels labels = Node();
    labels["outcome"] = outcome;
    return metrics_.AddCounter("tandem_expert_calls_total", "Batched calls by their outcome.", labels);
  }

  std::mutex mutex_;
  const Shard* shard_ = nullptr;  // set once, together with moe_
  Moe* moe_ = nullptr;
  double read_ceiling_ = 0;  // likewise
  telemetry::Gauge* bandwidth_ratio_ = nullptr;
  double recent_bytes_ = 0;
  double recent_seconds_ = 0;
  bool stopping_ = false;
  std::map<grpc::ServerContext*, bool> streams_;   // open ones, and whether they work
  std::unique_ptr<RingSessions> rings_;            // set once
  std::atomic<int> attached_{0};                   // sessions through rings_
  std::atomic<int64_t> last_call_{INT64_MIN / 2};  // SteadyNanoseconds
};

ExpertsService::ExpertsService(telemetry::Metrics& metrics, const LoadProgress& progress,
                               const Identity& identity)
    : impl_(std::make_unique<Impl>(metrics, progress, identity)) {}
ExpertsService::~ExpertsService() = default;
grpc::Service* ExpertsService::service() { return impl_.get(); }
std::string ExpertsService::name() { return v1::Experts::service_full_name(); }
void ExpertsService::SetReady(const Shard& shard, Moe& moe, double read_ceiling) {
  impl_->SetReady(shard, moe, read_ceiling);
}
absl::Status ExpertsService::EnableRing(RingOptions options) { return impl_->EnableRing(std::move(options)); }
bool ExpertsService::InUse(absl::Duration d) const { return impl_->InUse(d); }
void ExpertsService::Stop() { impl_->Stop(); }

}  // namespace tandem::expert
