#include <algorithm>
#include <cstring>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/shm/call_client.h"
#include "common/telemetry/log.h"
#include "services/attention_gpu/experts/device_calls.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/expert_link.h"
#include "services/attention_gpu/experts/shard_cover.h"
#include "services/attention_gpu/experts/weights_map.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

constexpr absl::Duration kAttachPause = absl::Milliseconds(50);

struct Process {
  std::string address;
  std::shared_ptr<grpc::Channel> channel;
  v1::ShardDescription shard;
  std::unique_ptr<ExpertLink> link;
};

// Whether the address can only be of this host.
bool OnThisHost(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const absl::StatusOr<HostPort> at = ParseHostPort(address);
  return at.ok() && (at->host == "localhost" || at->host == "::1" || absl::StartsWith(at->host, "127."));
}

class ConnectedExperts final : public ExpertGroup, private DeviceCalls {
 public:
  ConnectedExperts(const ExpertOptions& options, const model::ModelConfig& config, std::string fingerprint)
      : options_(options), config_(config), fingerprint_(std::move(fingerprint)) {}

  absl::Status Attach() {
    for (const std::string& address : options_.addresses) {
      Process p;
      p.address = address;
      TANDEM_ASSIGN_OR_RETURN(p.channel, rpc::Connect(address, options_.tls));
      processes_.push_back(std::move(p));
    }
    // One may die again between its first sign of life and the end of all this.
    const absl::Time deadline = absl::Now() + options_.attach_patience;
    for (;;) {
      absl::Status opened = Open(deadline);
      if (opened.ok() || !absl::IsUnavailable(opened) || absl::Now() >= deadline) return opened;
      absl::SleepFor(kAttachPause);
    }
  }

  absl::Status Start(const ExpertCall& call) override {
    if (!broken_.ok()) return broken_;
    if (call.n_tokens > format_.max_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("a step of ", call.n_tokens,
                                                     " tokens; an expert process takes ", format_.max_tokens,
                                                     " (--max-tokens there, --chunk-size here)"));
    }
    n_tokens_ = call.n_tokens;
    deadline_ = absl::Now() + options_.call_timeout;
    for (Process& p : processes_) {
      if (const absl::Status s = p.link->Prepare(call); !s.ok()) return Break(p, s);
    }
    for (Process& p : processes_) {
      if (const absl::Status s = p.link->Send(deadline_); !s.ok()) return Break(p, s);
    }
    return absl::OkStatus();
  }

  absl::Status Finish(float* out) override {
    if (!broken_.ok()) return broken_;
    const size_t values = static_cast<size_t>(n_tokens_) * static_cast<size_t>(config_.hidden_size);
    if (format_.exact_answers) sum_.assign(values, 0.0);
    absl::Status first_error;
    for (Process& p : processes_) {
      const absl::StatusOr<LinkAnswer> answer = p.link->Await(deadline_);
      if (!answer.ok()) return Break(p, answer.status());
      if (!answer->status.ok()) {
        if (first_error.ok()) {
          first_error = Annotate(answer->status, absl::StrCat("expert process ", p.address));
        }
      } else if (format_.exact_answers) {
        AddToSum(answer->values);
      } else if (values > 0) {
        std::memcpy(out, answer->values.data(), answer->values.size());
      }
    }
    TANDEM_RETURN_IF_ERROR(first_error);
    if (format_.exact_answers) {
      for (size_t i = 0; i < values; ++i) out[i] = static_cast<float>(sum_[i]);
    }
    return absl::OkStatus();
  }

  absl::Status Recover(absl::Duration patience) override {
    for (Process& p : processes_) p.link.reset();
    broken_ = absl::UnavailableError("the experts are not attached");
    return Open(absl::Now() + patience);
  }

  int processes() const override { return static_cast<int>(processes_.size()); }

  absl::StatusOr<std::vector<std::shared_ptr<const ShardWeights>>> MapWeights() override {
    std::vector<std::shared_ptr<const ShardWeights>> out;
    for (const Process& p : processes_) {
      auto map = OnThisHost(p.address) ? WeightsMap::Open(p.channel, config_, fingerprint_, absl::Seconds(10))
                                       : absl::FailedPreconditionError("it is on another host");
      if (!map.ok()) return Annotate(map.status(), absl::StrCat("expert process ", p.address));
      const std::shared_ptr<const WeightsMap> owner(std::move(*map));
      out.emplace_back(owner, &owner->weights());
    }
    return out;
  }

  absl::StatusOr<std::unique_ptr<ExpertGroup>> Beside(int64_t max_call_tokens) override {
    ExpertOptions options = options_;
    options.max_call_tokens = max_call_tokens;
    options.slots = 1;
    options.transport = ExpertTransport::kRing;
    options.attach_patience = absl::Seconds(10);
    auto group = std::make_unique<ConnectedExperts>(options, config_, fingerprint_);
    TANDEM_RETURN_IF_ERROR(group->Attach());
    return group;
  }

  DeviceCalls* device_calls() override {
    for (const Process& p : processes_) {
      if (p.link == nullptr || p.link->client() == nullptr) return nullptr;
    }
    return processes_.empty() ? nullptr : this;
  }

 private:
  std::vector<DeviceRing> rings() const override {
    std::vector<DeviceRing> out;
    for (const Process& p : processes_) {
      const shm::CallClient& client = *p.link->client();
      out.push_back({client.region(), client.layout(), client.session().epoch});
    }
    return out;
  }
  int64_t max_tokens() const override { return format_.max_tokens; }
  shm::ValueType input_type() const override { return format_.input_type(); }
  shm::ValueType output_type() const override { return format_.output_type(); }
  absl::Duration call_timeout() const override { return options_.call_timeout; }

  absl::StatusOr<std::vector<uint64_t>> BeginRun(uint64_t calls) override {
    if (!broken_.ok()) return broken_;
    run_.clear();
    for (Process& p : processes_) {
      const absl::StatusOr<uint64_t> first = p.link->client()->BeginRun(calls);
      if (!first.ok()) {
        for (Process& q : processes_) {
          if (&q == &p) break;
          (void)q.link->client()->EndRun(false, first.status());
        }
        return Break(p, first.status());
      }
      run_.push_back(*first);
    }
    return run_;
  }

  absl::Status EndRun(bool made_all, const absl::Status& why) override {
    absl::Status out;
    for (Process& p : processes_) {
      const absl::Status end = p.link->client()->EndRun(made_all, why);
      if (!end.ok() && out.ok()) out = Break(p, end);
    }
    return out;
  }

  uint64_t Progress() const override {
    uint64_t sum = 0;
    for (const Process& p : processes_) sum += p.link->client()->Answers();
    return sum;
  }

  absl::Status AnswerStatus(uint64_t index) override {
    for (size_t i = 0; i < processes_.size(); ++i) {
      const absl::Status s = processes_[i].link->client()->AnswerStatus(run_[i] + index);
      if (!s.ok()) return Annotate(s, absl::StrCat("expert process ", processes_[i].address));
    }
    return absl::OkStatus();
  }

  void Abort(const absl::Status& why) override {
    for (Process& p : processes_) p.link->client()->Abort(why);
  }

  absl::Status Open(absl::Time deadline) {
    for (Process& p : processes_) {
      TANDEM_RETURN_IF_ERROR(Annotate(Describe(p, deadline), absl::StrCat("expert process ", p.address)));
    }
    TANDEM_RETURN_IF_ERROR(CheckCover());
    for (Process& p : processes_) {
      TANDEM_RETURN_IF_ERROR(Annotate(OpenLink(p), absl::StrCat("expert process ", p.address)));
    }
    broken_ = absl::OkStatus();
    return absl::OkStatus();
  }

  absl::Status Describe(Process& p, absl::Time deadline) const {
    TANDEM_RETURN_IF_ERROR(rpc::WaitServing(*p.channel, p.address, deadline - absl::Now()));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    v1::Experts::Stub stub(p.channel);
    TANDEM_RETURN_IF_ERROR(rpc::FromGrpc(stub.Describe(&context, {}, &p.shard)));
    if (p.shard.model_fingerprint() != fingerprint_) {
      return absl::FailedPreconditionError(absl::StrCat("holds another model (", p.shard.model_name(),
                                                        ", fingerprint ", p.shard.model_fingerprint(),
                                                        " instead of ", fingerprint_, ")"));
    }
    if (p.shard.hidden_size() != config_.hidden_size) {
      return absl::FailedPreconditionError(
          absl::StrCat("has hidden size ", p.shard.hidden_size(), " instead of ", config_.hidden_size));
    }
    const v1::Precision wanted = options_.reference_precision ? v1::PRECISION_REFERENCE : v1::PRECISION_FAST;
    if (p.shard.precision() != wanted) {
      return absl::FailedPreconditionError(absl::StrCat(
          "runs with --precision ", p.shard.precision() == v1::PRECISION_FAST ? "fast" : "reference",
          ", this process with the other"));
    }
    return absl::OkStatus();
  }

  // Also settles what calls look like.
  absl::Status CheckCover() {
    std::vector<ShardExtent> extents;
    format_ = CallFormat();
    format_.hidden_size = config_.hidden_size;
    format_.max_tokens = options_.max_call_tokens > 0 ? options_.max_call_tokens : 1 << 20;
    format_.experts_per_token = config_.num_experts_per_tok;
    format_.slots = options_.slots;
    format_.float_activations = options_.reference_precision;
    format_.exact_answers = processes_.size() > 1;
    for (const Process& p : processes_) {
      const std::vector<std::string> types(p.shard.weight_types().begin(), p.shard.weight_types().end());
      format_.float_activations = format_.float_activations || NeedsFloatActivations(types);
      format_.max_tokens = std::min<int64_t>(format_.max_tokens, p.shard.max_tokens());
      ShardExtent e;
      e.name = p.address;
      e.layers.assign(p.shard.layers().begin(), p.shard.layers().end());
      e.expert_begin = p.shard.expert_begin();
      e.expert_end = p.shard.expert_end();
      e.row_begin = p.shard.row_begin();
      e.row_end = p.shard.row_end();
      extents.push_back(std::move(e));
    }
    return CheckShardCover(extents, config_);
  }

  absl::Status OpenLink(Process& p) const {
    p.link.reset();
    std::string why = options_.transport == ExpertTransport::kGrpc ? "as asked for" : "it is on another host";
    if (options_.transport == ExpertTransport::kRing ||
        (options_.transport == ExpertTransport::kAuto && OnThisHost(p.address))) {
      auto ring = OpenRingLink(p.channel, format_, options_.spin);
      if (ring.ok()) {
        p.link = std::move(*ring);
        spdlog::info("expert process {}: calls through shared memory", p.address);
        return absl::OkStatus();
      }
      if (options_.transport == ExpertTransport::kRing || absl::IsUnavailable(ring.status())) {
        return ring.status();
      }
      why = std::string(ring.status().message());
    }
    p.link = OpenGrpcLink(p.channel, format_);
    spdlog::info("expert process {}: calls in-band over gRPC ({})", p.address, why);
    return absl::OkStatus();
  }

  void AddToSum(std::span<const uint8_t> answer) {
    for (size_t i = 0; i < sum_.size(); ++i) {
      double v;
      std::memcpy(&v, answer.data() + i * sizeof v, sizeof v);
      sum_[i] += v;
    }
  }

  absl::Status Break(const Process& p, const absl::Status& status) {
    const std::string why =
        absl::IsDeadlineExceeded(status)
            ? absl::StrCat("no answer within ", absl::FormatDuration(options_.call_timeout))
            : std::string(status.message());
    broken_ = absl::UnavailableError(absl::StrCat("expert process ", p.address, ": ", why));
    return broken_;
  }

  const ExpertOptions options_;
  const model::ModelConfig config_;
  const std::string fingerprint_;
  std::vector<Process> processes_;
  CallFormat format_;
  int32_t n_tokens_ = 0;
  absl::Time deadline_;
  std::vector<double> sum_;
  std::vector<uint64_t> run_;  // number of the first call of a device's run, for each process
  absl::Status broken_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertGroup>> ConnectExperts(const ExpertOptions& options,
                                                            const model::ModelConfig& config,
                                                            const std::string& model_fingerprint) {
  auto group = std::make_unique<ConnectedExperts>(options, config, model_fingerprint);
  TANDEM_RETURN_IF_ERROR(group->Attach());
  return group;
}

}  // namespace tandem::attention
