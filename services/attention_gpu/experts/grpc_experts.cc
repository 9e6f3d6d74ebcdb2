#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/quant/quant.h"
#include "common/rpc/channel.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/shard_cover.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

using Stream = grpc::ClientReaderWriter<v1::ForwardRequest, v1::ForwardResponse>;

// Cancels a call's streams when its deadline passes: a synchronous gRPC read has no timeout of its own.
class Watchdog {
 public:
  Watchdog() : thread_([this] { Run(); }) {}
  ~Watchdog() {
    {
      absl::MutexLock lock(&mutex_);
      stop_ = true;
    }
    thread_.join();
  }
  void Arm(absl::Time deadline, std::vector<grpc::ClientContext*> contexts) {
    absl::MutexLock lock(&mutex_);
    deadline_ = deadline;
    contexts_ = std::move(contexts);
  }
  // True if the deadline had passed. After it no context is touched any more.
  bool Disarm() {
    absl::MutexLock lock(&mutex_);
    deadline_ = absl::InfiniteFuture();
    contexts_.clear();
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
        for (grpc::ClientContext* c : contexts_) c->TryCancel();
        contexts_.clear();
        deadline_ = absl::InfiniteFuture();
        fired_ = true;
      }
    }
  }
  absl::Mutex mutex_;
  absl::Time deadline_ = absl::InfiniteFuture();
  std::vector<grpc::ClientContext*> contexts_;
  bool fired_ = false;
  bool stop_ = false;
  std::thread thread_;
};

struct Process {
  std::string address;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Experts::Stub> stub;
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<Stream> stream;
  v1::ShardDescription shard;
  v1::ForwardResponse response;

  void Close() {
    if (context) context->TryCancel();
    if (stream) stream->Finish();
    stream.reset();
    context.reset();
  }
  ~Process() { Close(); }
};

class GrpcExperts : public ExpertGroup {
 public:
  GrpcExperts(const GrpcExpertOptions& options, const model::ModelConfig& config, std::string fingerprint)
      : options_(options), config_(config), fingerprint_(std::move(fingerprint)) {}

  absl::Status Attach(absl::Duration patience) {
    const absl::Time deadline = absl::Now() + patience;
    for (const std::string& address : options_.addresses) {
      auto p = std::make_unique<Process>();
      p->address = address;
      TANDEM_ASSIGN_OR_RETURN(p->channel, rpc::Connect(address, options_.tls));
      p->stub = v1::Experts::NewStub(p->channel);
      processes_.push_back(std::move(p));
    }
    for (auto& p : processes_) TANDEM_RETURN_IF_ERROR(Open(*p, deadline));
    return CheckCover();
  }

  absl::Status Start(const ExpertCall& call) override {
    if (!broken_.ok()) return broken_;
    if (call.n_tokens > max_tokens_) {
      return absl::InvalidArgumentError(absl::StrCat("a step of ", call.n_tokens,
                                                     " tokens; an expert process takes ", max_tokens_,
                                                     " (--max-tokens there, --chunk-size here)"));
    }
    Encode(call);
    std::vector<grpc::ClientContext*> contexts;
    for (auto& p : processes_) contexts.push_back(p->context.get());
    watchdog_.Arm(absl::Now() + options_.call_timeout, std::move(contexts));
    for (auto& p : processes_) {
      if (!p->stream->Write(request_)) return Break(*p, "the connection broke while sending");
    }
    n_tokens_ = call.n_tokens;
    return absl::OkStatus();
  }

  absl::Status Finish(float* out) override {
    if (!broken_.ok()) return broken_;
    const size_t values = static_cast<size_t>(n_tokens_) * config_.hidden_size;
    const bool several = processes_.size() > 1;
    if (several) sum_.assign(values, 0.0);
    absl::Status first_error;
    for (auto& p : processes_) {
      if (!p->stream->Read(&p->response))
        return Break(*p, "the connection broke while waiting for its answer");
      const v1::ForwardResponse& r = p->response;
      if (r.sequence() != request_.sequence()) return Break(*p, "it answered out of order");
      if (r.status_code() != 0) {
        if (first_error.ok()) {
          first_error = absl::Status(static_cast<absl::StatusCode>(r.status_code()),
                                     absl::StrCat("expert process ", p->address, ": ", r.status_message()));
        }
        continue;
      }
      if (r.answer().size() != values * (several ? sizeof(double) : sizeof(float))) {
        return Break(*p, absl::StrCat("it answered ", r.answer().size(), " bytes"));
      }
      if (several) {
        AddTo(r.answer(), values);
      } else {
        std::memcpy(out, r.answer().data(), r.answer().size());
      }
    }
    watchdog_.Disarm();
    TANDEM_RETURN_IF_ERROR(first_error);
    if (several) {
      for (size_t i = 0; i < values; ++i) out[i] = static_cast<float>(sum_[i]);
    }
    return absl::OkStatus();
  }

  absl::Status Recover(absl::Duration patience) override {
    const absl::Time deadline = absl::Now() + patience;
    for (auto& p : processes_) {
      p->Close();
      TANDEM_RETURN_IF_ERROR(Open(*p, deadline));
    }
    TANDEM_RETURN_IF_ERROR(CheckCover());
    broken_ = absl::OkStatus();
    return absl::OkStatus();
  }

  int processes() const override { return static_cast<int>(processes_.size()); }

 private:
  absl::Status Open(Process& p, absl::Time deadline) {
    TANDEM_RETURN_IF_ERROR(Annotate(rpc::WaitServing(*p.channel, p.address, deadline - absl::Now()),
                                    absl::StrCat("expert process ", p.address)));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    TANDEM_RETURN_IF_ERROR(Annotate(rpc::FromGrpc(p.stub->Describe(&context, {}, &p.shard)),
                                    absl::StrCat("expert process ", p.address)));
    TANDEM_RETURN_IF_ERROR(CheckShard(p));
    p.context = std::make_unique<grpc::ClientContext>();
    p.stream = p.stub->Forward(p.context.get());
    return absl::OkStatus();
  }

  absl::Status CheckShard(const Process& p) const {
    auto refuse = [&](const std::string& why) {
      return absl::FailedPreconditionError(absl::StrCat("expert process ", p.address, " ", why));
    };
    if (p.shard.model_fingerprint() != fingerprint_) {
      return refuse(absl::StrCat("holds another model (", p.shard.model_name(), ", fingerprint ",
                                 p.shard.model_fingerprint(), " instead of ", fingerprint_, ")"));
    }
    if (p.shard.hidden_size() != config_.hidden_size) {
      return refuse(
          absl::StrCat("has hidden size ", p.shard.hidden_size(), " instead of ", config_.hidden_size));
    }
    const v1::Precision wanted = options_.reference_precision ? v1::PRECISION_REFERENCE : v1::PRECISION_FAST;
    if (p.shard.precision() != wanted) {
      return refuse(absl::StrCat("runs with --precision ",
                                 p.shard.precision() == v1::PRECISION_FAST ? "fast" : "reference",
                                 ", this process with the other"));
    }
    return absl::OkStatus();
  }

  absl::Status CheckCover() {
    std::vector<ShardExtent> extents;
    max_tokens_ = 1 << 30;
    float_activations_ = options_.reference_precision;
    for (auto& p : processes_) {
      const std::vector<std::string> types(p->shard.weight_types().begin(), p->shard.weight_types().end());
      float_activations_ = float_activations_ || NeedsFloatActivations(types);
      ShardExtent e;
      e.name = p->address;
      e.layers.assign(p->shard.layers().begin(), p->shard.layers().end());
      e.expert_begin = p->shard.expert_begin();
      e.expert_end = p->shard.expert_end();
      e.row_begin = p->shard.row_begin();
      e.row_end = p->shard.row_end();
      extents.push_back(std::move(e));
      max_tokens_ = std::min<int64_t>(max_tokens_, p->shard.max_tokens());
    }
    return CheckShardCover(extents, config_);
  }

  void Encode(const ExpertCall& call) {
    const size_t pairs = static_cast<size_t>(call.n_tokens) * call.experts_per_token;
    const size_t values = static_cast<size_t>(call.n_tokens) * config_.hidden_size;
    request_.set_sequence(++sequence_);
    request_.set_layer(call.layer);
    request_.set_n_tokens(call.n_tokens);
    request_.set_experts_per_token(call.experts_per_token);
    request_.mutable_expert_ids()->assign(reinterpret_cast<const char*>(call.expert_ids),
                                          pairs * sizeof(int32_t));
    request_.mutable_expert_weights()->assign(reinterpret_cast<const char*>(call.expert_weights),
                                              pairs * sizeof(float));
    std::string& bytes = *request_.mutable_activations();
    if (float_activations_) {
      bytes.assign(reinterpret_cast<const char*>(call.activations), values * sizeof(float));
    } else {
      bytes.resize(values * sizeof(uint16_t));
      for (size_t i = 0; i < values; ++i) {
        const uint16_t h = quant::FloatToBf16(call.activations[i]);
        std::memcpy(bytes.data() + i * sizeof h, &h, sizeof h);
      }
    }
    request_.set_activation_type(float_activations_ ? v1::DATA_TYPE_F32 : v1::DATA_TYPE_BF16);
    request_.set_answer_type(processes_.size() > 1 ? v1::DATA_TYPE_F64 : v1::DATA_TYPE_F32);
  }

  void AddTo(const std::string& answer, size_t values) {
    for (size_t i = 0; i < values; ++i) {
      double v;
      std::memcpy(&v, answer.data() + i * sizeof v, sizeof v);
      sum_[i] += v;
    }
  }

  absl::Status Break(Process& p, const std::string& what) {
    const bool late = watchdog_.Disarm();
    std::string why = what;
    if (late) {
      why = absl::StrCat("no answer within ", absl::FormatDuration(options_.call_timeout));
    } else if (p.stream) {
      p.context->TryCancel();
      const grpc::Status status = p.stream->Finish();
      p.stream.reset();
      if (!status.error_message().empty() && status.error_code() != grpc::StatusCode::CANCELLED) {
        why = absl::StrCat(what, " (", status.error_message(), ")");
      }
    }
    broken_ = absl::UnavailableError(absl::StrCat("expert process ", p.address, ": ", why));
    return broken_;
  }

  const GrpcExpertOptions options_;
  const model::ModelConfig config_;
  const std::string fingerprint_;
  std::vector<std::unique_ptr<Process>> processes_;
  int64_t max_tokens_ = 0;
  bool float_activations_ = false;
  v1::ForwardRequest request_;
  uint64_t sequence_ = 0;
  int32_t n_tokens_ = 0;
  std::vector<double> sum_;
  absl::Status broken_;
  Watchdog watchdog_;  // last: stops before the contexts go
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertGroup>> ConnectGrpcExperts(const GrpcExpertOptions& options,
                                                                const model::ModelConfig& config,
                                                                const std::string& model_fingerprint) {
  auto group = std::make_unique<GrpcExperts>(options, config, model_fingerprint);
  TANDEM_RETURN_IF_ERROR(group->Attach(options.attach_patience));
  return group;
}

}  // namespace tandem::attention
