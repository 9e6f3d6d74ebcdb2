#include "services/attention_gpu/service/engine_service.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/rpc/channel.h"
#include "tandem/v1/engine.grpc.pb.h"

namespace tandem::attention {
namespace {

constexpr size_t kMetadataChunk = 1 << 20;

v1::FinishReason ToProto(FinishReason r) {
  switch (r) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kNone:
      break;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

SequenceRequest FromProto(const v1::GenerateRequest& r) {
  SequenceRequest out;
  out.id = r.request_id();
  out.prompt.assign(r.prompt_tokens().begin(), r.prompt_tokens().end());
  out.max_new_tokens = static_cast<int32_t>(std::min<uint32_t>(r.max_new_tokens(), INT32_MAX));
  out.stop_token_ids.assign(r.stop_token_ids().begin(), r.stop_token_ids().end());
  out.resumed_tokens = static_cast<int32_t>(std::min<uint32_t>(r.resumed_tokens(), INT32_MAX));
  SamplingParams& p = out.sampling;
  const v1::SamplingParameters& s = r.sampling();
  p.temperature = s.temperature();
  p.top_p = s.top_p() == 0 ? 1 : s.top_p();
  p.top_k = s.top_k();
  p.min_p = s.min_p();
  p.seed = s.seed();
  p.presence_penalty = s.presence_penalty();
  p.frequency_penalty = s.frequency_penalty();
  p.repetition_penalty = s.repetition_penalty() == 0 ? 1 : s.repetition_penalty();
  p.logit_bias.assign(s.logit_bias().begin(), s.logit_bias().end());
  p.top_logprobs = r.top_logprobs();
  p.logprobs = r.logprobs() || r.top_logprobs() > 0;
  return out;
}

void AddToken(const SampledToken& token, bool logprobs, v1::GenerateEvent& event) {
  v1::GeneratedToken* t = event.add_tokens();
  t->set_token(token.token);
  if (!logprobs) return;
  t->set_logprob(token.logprob);
  for (const TokenLogprob& alternative : token.top) {
    v1::TokenLogprob* a = t->add_top_logprobs();
    a->set_token(alternative.token);
    a->set_logprob(alternative.logprob);
  }
}

// One Generate call. Events that come while a write is under way are merged into the next one, so that a slow
// reader costs no more than its tokens; past `max_unread` of them, alternatives included, its sequence is
// cancelled. Deletes itself when gRPC and the scheduler are both done with it.
class GenerateCall : public grpc::ServerWriteReactor<v1::GenerateEvent>,
                     public std::enable_shared_from_this<GenerateCall> {
 public:
  static grpc::ServerWriteReactor<v1::GenerateEvent>* Begin(Scheduler* scheduler, int64_t max_unread,
                                                            absl::Time deadline,
                                                            const v1::GenerateRequest& request) {
    auto call = std::make_shared<GenerateCall>(scheduler, max_unread);
    call->self_ = call;
    call->Submit(request, deadline);
    return call.get();
  }
  GenerateCall(Scheduler* scheduler, int64_t max_unread) : scheduler_(scheduler), max_unread_(max_unread) {}

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    // A write that was under way when the caller went may still succeed, and what is cancelled has no last
    // event.
    if (!ok || gone_) {
      CancelWork();
      FinishOnce(grpc::Status::CANCELLED);
      return;
    }
    Pump();
  }
  void OnCancel() override {
    const std::lock_guard lock(mutex_);
    gone_ = true;
    CancelWork();
    if (!writing_) FinishOnce(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    std::shared_ptr<GenerateCall> last;
    const std::lock_guard lock(mutex_);
    last.swap(self_);  // goes when the lock has been released: declared before it
  }

 private:
  void Submit(const v1::GenerateRequest& request, absl::Time deadline) {
    SequenceRequest r = FromProto(request);
    r.deadline = deadline;
    logprobs_ = r.sampling.logprobs;
    auto number = scheduler_->Submit(
        std::move(r), [call = shared_from_this()](const SequenceEvent& event) { call->OnEvent(event); });
    const std::lock_guard lock(mutex_);
    if (!number.ok()) {
      FinishOnce(rpc::ToGrpc(number.status()));
      return;
    }
    number_ = *number;
    if (cancelled_) scheduler_->Cancel(number_);
  }

  void OnEvent(const SequenceEvent& event) {
    const std::lock_guard lock(mutex_);
    if (ended_) return;  // it fell behind
    for (const SampledToken& t : event.tokens) {
      AddToken(t, logprobs_, pending_);
      unread_ += 1 + static_cast<int64_t>(t.top.size());
    }
    if (!event.status.ok()) {
      ended_ = true;
      end_status_ = rpc::ToGrpc(event.status);
    } else if (event.finish != FinishReason::kNone) {
      ended_ = true;
      pending_.set_finish_reason(ToProto(event.finish));
    }
    if (event.status.ok() && event.statistics.prompt_tokens > 0) {
      v1::GenerateStatistics* s = pending_.mutable_statistics();
      s->set_prompt_tokens(event.statistics.prompt_tokens);
      s->set_cached_prompt_tokens(event.statistics.cached_prompt_tokens);
      s->set_generated_tokens(event.statistics.generated_tokens);
      s->set_queue_seconds(absl::ToDoubleSeconds(event.statistics.queued));
      s->set_prefill_seconds(absl::ToDoubleSeconds(event.statistics.prefill));
      s->set_decode_seconds(absl::ToDoubleSeconds(event.statistics.decode));
    }
    if (!ended_ && writing_ && unread_ > max_unread_) {
      // What was not read is dropped, not sent late: the reader, if it comes back, is to know where it
      // stopped.
      CancelWork();
      ended_ = true;
      end_status_ = {grpc::StatusCode::RESOURCE_EXHAUSTED,
                     absl::StrCat("the reader is ", pending_.tokens_size(), " tokens behind")};
      pending_.Clear();
    }
    if (!writing_) Pump();
  }

  // The rest: with mutex_ held.

  void Pump() {
    if (finished_) return;
    if (pending_.tokens_size() > 0 || pending_.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      writing_ = true;
      out_.Clear();
      out_.Swap(&pending_);
      unread_ = 0;
      StartWrite(&out_);
    } else if (ended_) {
      FinishOnce(end_status_);
    }
  }

  void CancelWork() {
    cancelled_ = true;
    if (number_ != 0 && !ended_) scheduler_->Cancel(number_);
  }

  void FinishOnce(const grpc::Status& status) {
    if (std::exchange(finished_, true)) return;
    Finish(status);
  }

  Scheduler* const scheduler_;
  const int64_t max_unread_;
  std::mutex mutex_;  // guards all below but out_ while writing_, and logprobs_
  std::shared_ptr<GenerateCall> self_;
  v1::GenerateEvent pending_;
  int64_t unread_ = 0;     // tokens and alternatives in pending_
  v1::GenerateEvent out_;  // gRPC's while writing_
  bool logprobs_ = false;
  bool writing_ = false;
  bool ended_ = false;
  bool finished_ = false;
  bool cancelled_ = false;  // the work
  bool gone_ = false;       // the caller
  grpc::Status end_status_;
  uint64_t number_ = 0;
};

class RefusedCall : public grpc::ServerWriteReactor<v1::GenerateEvent> {
 public:
  explicit RefusedCall(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

class MetadataCall : public grpc::ServerWriteReactor<v1::MetadataChunk> {
 public:
  MetadataCall(const grpc::Status& refusal, std::string bytes) : bytes_(std::move(bytes)) {
    if (refusal.ok()) {
      Next();
    } else {
      Finish(refusal);
    }
  }
  void OnWriteDone(bool ok) override {
    if (ok) {
      Next();
    } else {
      Finish(grpc::Status::CANCELLED);
    }
  }
  void OnDone() override { delete this; }

 private:
  void Next() {
    if (sent_ >= bytes_.size()) {
      Finish(grpc::Status::OK);
      return;
    }
    chunk_.set_data(bytes_.substr(sent_, kMetadataChunk));
    sent_ += chunk_.data().size();
    StartWrite(&chunk_);
  }
  const std::string bytes_;
  size_t sent_ = 0;
  v1::MetadataChunk chunk_;
};

}  // namespace

class EngineService::Impl : public v1::Engine::CallbackService {
 public:
  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context, const v1::DescribeEngineRequest*,
                                     v1::EngineDescription* d) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const std::lock_guard lock(mutex_);
    if (scheduler_ == nullptr) {
      reactor->Finish(NotReady());
      return reactor;
    }
    const SchedulerSnapshot now = scheduler_->Snapshot();
    d->set_model_name(info_.model_name);
    d->set_model_fingerprint(info_.model_fingerprint);
    d->set_architecture(info_.architecture);
    d->set_vocab_size(static_cast<uint32_t>(info_.vocab_size));
    d->set_context_length(info_.context_length);
    d->set_max_batch_size(info_.max_batch_size);
    d->set_max_waiting(info_.max_waiting);
    d->set_backend(scheduler_->backend().name());
    d->set_isa(info_.isa);
    d->set_instance_id(info_.instance_id);
    d->set_running(now.running);
    d->set_waiting(now.waiting);
    d->set_expert_processes(info_.expert_processes);
    d->set_degraded(degraded_);
    d->set_kv_capacity_tokens(int64_t{scheduler_->backend().page_count()} *
                              scheduler_->backend().page_tokens());
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerWriteReactor<v1::MetadataChunk>* ReadMetadata(grpc::CallbackServerContext*,
                                                            const v1::ReadMetadataRequest*) override {
    const std::lock_guard lock(mutex_);
    return new MetadataCall(scheduler_ == nullptr ? NotReady() : grpc::Status::OK, info_.metadata);
  }

  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(grpc::CallbackServerContext* context,
                                                        const v1::GenerateRequest* request) override {
    Scheduler* scheduler;
    int64_t max_unread;
    {
      const std::lock_guard lock(mutex_);
      if (scheduler_ == nullptr) return new RefusedCall(NotReady());
      scheduler = scheduler_;
      max_unread = info_.max_unread_tokens;
    }
    const auto deadline = context->deadline();
    const absl::Time by = deadline == std::chrono::system_clock::time_point::max()
                              ? absl::InfiniteFuture()
                              : absl::FromChrono(deadline);
    return GenerateCall::Begin(scheduler, max_unread, by, *request);
  }

  void SetProgress(const std::string& text) {
    const std::lock_guard lock(mutex_);
    progress_ = text;
  }
  void SetDegraded(const std::string& why) {
    const std::lock_guard lock(mutex_);
    degraded_ = why;
  }
  void SetReady(EngineInfo info, Scheduler* scheduler) {
    const std::lock_guard lock(mutex_);
    info_ = std::move(info);
    scheduler_ = scheduler;
  }

 private:
  grpc::Status NotReady() const {
    return {grpc::StatusCode::UNAVAILABLE, absl::StrCat("the engine is starting: ", progress_)};
  }
  std::mutex mutex_;
  std::string progress_ = "reading the model";
  std::string degraded_;
  EngineInfo info_;
  Scheduler* scheduler_ = nullptr;
};

EngineService::EngineService() : impl_(std::make_unique<Impl>()) {}
EngineService::~EngineService() = default;
grpc::Service* EngineService::service() { return impl_.get(); }
std::string EngineService::name() { return v1::Engine::service_full_name(); }
void EngineService::SetProgress(const std::string& text) { impl_->SetProgress(text); }
void EngineService::SetDegraded(const std::string& why) { impl_->SetDegraded(why); }
void EngineService::SetReady(EngineInfo info, Scheduler* scheduler) {
  impl_->SetReady(std::move(info), scheduler);
}

}  // namespace tandem::attention
