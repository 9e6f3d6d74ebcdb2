#include "services/gateway/grpc/generation_service.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/server_callback.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/tokenizer/tokenizer.h"
#include "services/gateway/admission/api_key.h"
#include "services/gateway/grpc/generation_params.h"
#include "services/gateway/session/request_log.h"
#include "tandem/v1/generation.grpc.pb.h"

namespace tandem::gateway {
namespace {

// One Generate call. gRPC ends with OnDone, the session with its listener's OnDone: the stream lives until
// both.
class Stream final : public grpc::ServerWriteReactor<v1::GenerationResponse>,
                     public std::enable_shared_from_this<Stream> {
 public:
  Stream(const GenerationServiceParts& parts, Admission::Ticket ticket, size_t max_output_bytes,
         absl::Time deadline)
      : parts_(parts), max_output_bytes_(max_output_bytes), deadline_(deadline), ticket_(std::move(ticket)) {}

  void Hold(std::shared_ptr<Stream> self) { self_ = std::move(self); }

  void Begin(GenerationSpec spec, const std::shared_ptr<const ModelContext>& model, absl::Time arrived,
             double tokenize_seconds) {
    arrived_ = arrived;
    tokenize_seconds_ = tokenize_seconds;
    id_ = spec.request_id;
    auto session = GenerationSession::Start(parts_.sessions, model, std::move(spec),
                                            std::make_shared<Listener>(shared_from_this()));
    bool cancelled;
    {
      std::lock_guard lock(mutex_);
      session_ = session;
      cancelled = cancelled_;
    }
    if (cancelled) session->Cancel(Why());
  }

  void Refuse(const absl::Status& status) {
    parts_.metrics->requests(OutcomeOf(status)).Add();
    std::lock_guard lock(mutex_);
    ticket_.reset();
    Close(rpc::ToGrpc(status));
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mutex_);
    queued_bytes_ -= queue_.front().ByteSizeLong();
    queue_.pop_front();
    writing_ = false;
    if (!ok) queue_.clear();
    Pump();
  }

  void OnCancel() override {
    std::shared_ptr<GenerationSession> session;
    {
      std::lock_guard lock(mutex_);
      cancelled_ = true;
      session = session_;
    }
    if (session != nullptr) session->Cancel(Why());
  }

  void OnDone() override {
    const std::shared_ptr<Stream> self = std::move(self_);
    std::lock_guard lock(mutex_);
    session_.reset();
  }

 private:
  class Listener final : public GenerationListener {
   public:
    explicit Listener(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
    bool OnDelta(Delta delta) override { return stream_->Deliver(std::move(delta)); }
    void OnDone(const GenerationResult& result) override { stream_->End(result); }

   private:
    const std::shared_ptr<Stream> stream_;
  };

  // gRPC cancels at the deadline, too.
  absl::Status Why() const {
    if (absl::Now() < deadline_) return absl::CancelledError("the client is gone");
    return absl::DeadlineExceededError("the request's deadline has passed");
  }

  bool Deliver(Delta delta) {
    v1::GenerationResponse response;
    response.set_reasoning(std::move(delta.reasoning));
    response.set_content(std::move(delta.content));
    std::lock_guard lock(mutex_);
    if (cancelled_ || queued_bytes_ > max_output_bytes_) return false;
    Enqueue(std::move(response));
    return true;
  }

  void End(const GenerationResult& result) {
    RecordRequest(id_, {result}, tokenize_seconds_, absl::ToDoubleSeconds(absl::Now() - arrived_),
                  *parts_.metrics);
    std::lock_guard lock(mutex_);
    ticket_.reset();
    if (result.status.ok()) {
      v1::GenerationResponse response;
      response.set_finish_reason(result.finish == Finish::kStop ? "stop" : "length");
      v1::Usage& usage = *response.mutable_usage();
      usage.set_prompt_tokens(result.prompt_tokens);
      usage.set_completion_tokens(result.completion_tokens);
      usage.set_cached_prompt_tokens(result.cached_prompt_tokens);
      Enqueue(std::move(response));
    }
    Close(rpc::ToGrpc(result.status));
  }

  // With mutex_ held.
  void Enqueue(v1::GenerationResponse response) {
    queued_bytes_ += response.ByteSizeLong();
    queue_.push_back(std::move(response));
    Pump();
  }
  void Pump() {
    if (writing_) return;
    if (!queue_.empty()) {
      writing_ = true;
      StartWrite(&queue_.front());
    } else if (final_.has_value()) {
      const grpc::Status status = *std::exchange(final_, std::nullopt);
      Finish(status);
    }
  }
  void Close(const grpc::Status& status) {
    if (closed_) return;
    closed_ = true;
    final_ = status;
    Pump();
  }

  const GenerationServiceParts parts_;
  const size_t max_output_bytes_;
  const absl::Time deadline_;
  std::string id_;
  absl::Time arrived_;
  double tokenize_seconds_ = 0;

  std::mutex mutex_;
  std::optional<Admission::Ticket> ticket_;
  std::shared_ptr<GenerationSession> session_;
  std::deque<v1::GenerationResponse> queue_;  // the first is being written while writing_
  size_t queued_bytes_ = 0;
  bool writing_ = false;
  bool cancelled_ = false;
  bool closed_ = false;
  std::optional<grpc::Status> final_;
  std::shared_ptr<Stream> self_;
};

class FailedStream final : public grpc::ServerWriteReactor<v1::GenerationResponse> {
 public:
  explicit FailedStream(const absl::Status& status) { Finish(rpc::ToGrpc(status)); }
  void OnDone() override { delete this; }
};

class GenerationService final : public v1::Generation::CallbackService {
 public:
  GenerationService(const GenerationServiceOptions& options, const GenerationServiceParts& parts)
      : options_(options), parts_(parts) {}

  grpc::ServerWriteReactor<v1::GenerationResponse>* Generate(grpc::CallbackServerContext* context,
                                                             const v1::GenerationRequest* request) override {
    const absl::Time arrived = absl::Now();
    if (absl::Status allowed = Authorize(*context); !allowed.ok()) return new FailedStream(allowed);
    absl::StatusOr<Admission::Ticket> ticket = parts_.admission->Enter();
    if (!ticket.ok()) {
      parts_.metrics->requests(Outcome::kRefused).Add();
      return new FailedStream(ticket.status());
    }
    absl::Time deadline = arrived + options_.request_timeout;
    if (context->deadline() != std::chrono::system_clock::time_point::max()) {
      deadline = std::min(deadline, absl::FromChrono(context->deadline()));
    }
    auto stream = std::make_shared<Stream>(parts_, std::move(*ticket), options_.max_output_bytes, deadline);
    stream->Hold(stream);
    // The request belongs to gRPC and lives until the call ends, which the stream's hold outlasts.
    auto task = [this, stream, request, arrived, deadline] { Run(stream, *request, arrived, deadline); };
    if (!parts_.work->TryPush(request->ByteSizeLong(), std::move(task))) {
      stream->Refuse(absl::ResourceExhaustedError("too many requests are waiting"));
    }
    return stream.get();
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return Unary(context, request->ByteSizeLong(), [this, request, response] {
      const std::shared_ptr<const ModelContext> model = parts_.engines->model();
      if (model == nullptr) return parts_.engines->status();
      tokenizer::EncodeOptions options;
      options.add_special = request->add_special();
      options.parse_special = request->parse_special();
      for (const int32_t token : model->tokenizer().Encode(request->content(), options)) {
        response->add_tokens(token);
      }
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return Unary(context, request->ByteSizeLong(), [this, request, response] {
      const std::shared_ptr<const ModelContext> model = parts_.engines->model();
      if (model == nullptr) return parts_.engines->status();
      const std::vector<int32_t> tokens(request->tokens().begin(), request->tokens().end());
      for (size_t i = 0; i < tokens.size(); ++i) {
        if (!model->tokenizer().IsValid(tokens[i])) {
          return absl::InvalidArgumentError(absl::StrCat("'tokens[", i, "]' must be from 0 to ",
                                                         model->tokenizer().vocab_size() - 1, ", not ",
                                                         tokens[i]));
        }
      }
      response->set_content(tokenizer::SanitizeUtf8(model->tokenizer().Decode(tokens)));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest*,
                                       v1::ListModelsResponse* response) override {
    return Unary(context, 0, [this, response] {
      const std::shared_ptr<const ModelContext> model = parts_.engines->model();
      if (model == nullptr) return parts_.engines->status();
      response->add_ids(model->id());
      return absl::OkStatus();
    });
  }

 private:
  absl::Status Authorize(const grpc::CallbackServerContext& context) const {
    if (options_.api_key.empty()) return absl::OkStatus();
    const auto& metadata = context.client_metadata();
    const auto it = metadata.find("authorization");
    if (it == metadata.end()) {
      return absl::UnauthenticatedError("an API key is needed: metadata authorization: Bearer KEY");
    }
    if (BearerMatches({it->second.data(), it->second.size()}, options_.api_key)) return absl::OkStatus();
    return absl::UnauthenticatedError("the API key is wrong");
  }

  template <typename Work>
  grpc::ServerUnaryReactor* Unary(grpc::CallbackServerContext* context, size_t input_bytes, Work work) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (absl::Status allowed = Authorize(*context); !allowed.ok()) {
      reactor->Finish(rpc::ToGrpc(allowed));
    } else if (!parts_.work->TryPush(input_bytes,
                                     [reactor, work] { reactor->Finish(rpc::ToGrpc(work())); })) {
      reactor->Finish(rpc::ToGrpc(absl::ResourceExhaustedError("too many requests are waiting")));
    }
    return reactor;
  }

  void Run(const std::shared_ptr<Stream>& stream, const v1::GenerationRequest& request, absl::Time arrived,
           absl::Time deadline) {
    const std::shared_ptr<const ModelContext> model = parts_.engines->model();
    const absl::Time start = absl::Now();
    absl::StatusOr<GenerationSpec> spec = SpecOf(request, *model, options_);
    if (!spec.ok()) return stream->Refuse(spec.status());
    spec->request_id = MakeId("gen-");
    spec->deadline = deadline;
    spec->arrived = arrived;
    stream->Begin(std::move(*spec), model, arrived, absl::ToDoubleSeconds(absl::Now() - start));
  }

  const GenerationServiceOptions options_;
  const GenerationServiceParts parts_;
};

}  // namespace

std::string GenerationServiceName() { return v1::Generation::service_full_name(); }

std::unique_ptr<grpc::Service> MakeGenerationService(const GenerationServiceOptions& options,
                                                     const GenerationServiceParts& parts) {
  return std::make_unique<GenerationService>(options, parts);
}

}  // namespace tandem::gateway
