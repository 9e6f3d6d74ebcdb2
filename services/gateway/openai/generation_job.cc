#include "services/gateway/openai/generation_job.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "services/gateway/session/request_log.h"

namespace tandem::gateway {
namespace {

constexpr std::string_view kComment = ": keep-alive\n\n";

}  // namespace

class GenerationJob::ChoiceListener final : public GenerationListener {
 public:
  ChoiceListener(std::shared_ptr<GenerationJob> job, int index) : job_(std::move(job)), index_(index) {}
  bool OnDelta(Delta delta) override { return job_->OnDelta(index_, std::move(delta)); }
  void OnDone(const GenerationResult& result) override { job_->OnDone(index_, result); }

 private:
  const std::shared_ptr<GenerationJob> job_;
  const int index_;
};

GenerationJob::GenerationJob(JobSpec spec, GatewayMetrics* metrics, std::shared_ptr<const ModelContext> model,
                             Responder responder, Admission::Ticket ticket)
    : spec_(std::move(spec)),
      metrics_(metrics),
      model_(std::move(model)),
      responder_(std::move(responder)),
      ticket_(std::move(ticket)),
      choices_(spec_.sequences.size()),
      results_(spec_.sequences.size()) {}

GenerationJob::~GenerationJob() = default;

void GenerationJob::Start(JobSpec spec, SessionEnvironment* environment, GatewayMetrics* metrics,
                          const std::shared_ptr<const ModelContext>& model, Responder responder,
                          Admission::Ticket ticket) {
  auto job = std::make_shared<GenerationJob>(std::move(spec), metrics, model, std::move(responder),
                                             std::move(ticket));
  std::vector<GenerationSpec> sequences = std::move(job->spec_.sequences);
  for (size_t i = 0; i < sequences.size(); ++i) {
    auto listener = std::make_shared<ChoiceListener>(job, static_cast<int>(i));
    std::shared_ptr<GenerationSession> session =
        GenerationSession::Start(environment, model, std::move(sequences[i]), std::move(listener));
    std::lock_guard lock(job->mutex_);
    job->sessions_.push_back(std::move(session));
  }
  if (job->spec_.stream) {
    std::lock_guard lock(job->mutex_);
    if (job->done_ < job->results_.size() && !job->failed_) job->SetAlarm(job->spec_.head_after);
  }
  job->responder_.OnDisconnect([weak = std::weak_ptr<GenerationJob>(job)] {
    if (const std::shared_ptr<GenerationJob> running = weak.lock()) running->CancelAll();
  });
}

void GenerationJob::CancelAll() {
  std::vector<std::shared_ptr<GenerationSession>> sessions;
  {
    std::lock_guard lock(mutex_);
    failed_ = true;
    sessions = sessions_;
  }
  for (const auto& session : sessions) session->Cancel();
}

bool GenerationJob::Write(const std::string& json) {
  written_ = absl::Now();
  return responder_.Write(SseEvent(json));
}

void GenerationJob::SetAlarm(absl::Duration from_now) {
  alarm_ = std::make_unique<grpc::Alarm>();
  const auto when = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(from_now);
  alarm_->Set(when, [weak = weak_from_this()](bool passed) {
    const std::shared_ptr<GenerationJob> job = passed ? weak.lock() : nullptr;
    if (job == nullptr) return;
    std::lock_guard lock(job->mutex_);
    job->OnAlarm();
  });
}

// Nothing may have come for a while: the head, or a comment, which clients pass over.
void GenerationJob::OnAlarm() {
  if (failed_ || done_ == results_.size()) return;
  const absl::Duration silent = absl::Now() - written_;
  if (!streaming_) {
    BeginStream();
  } else if (silent >= spec_.comment_after) {
    written_ = absl::Now();
    responder_.Write(kComment);
  } else {
    return SetAlarm(spec_.comment_after - silent);
  }
  SetAlarm(spec_.comment_after);
}

// The status line waits for the first text, if that does not take too long.
bool GenerationJob::BeginStream() {
  if (streaming_) return true;
  streaming_ = true;
  written_ = absl::Now();
  responder_.StartStream(
      200, "text/event-stream; charset=utf-8",
      {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}, {"X-Request-Id", spec_.head.id}});
  for (size_t i = 0; i < choices_.size(); ++i) {
    const int index = static_cast<int>(i);
    if (spec_.head.chat && !Write(FormatRoleChunk(spec_.head, index, spec_.include_usage))) return false;
    if (!spec_.echoes.empty()) {
      Delta echo;
      echo.content = spec_.echoes[i];
      if (!Write(
              FormatDeltaChunk(spec_.head, index, echo, false, spec_.include_usage, model_->tokenizer()))) {
        return false;
      }
    }
  }
  return true;
}

bool GenerationJob::OnDelta(int index, Delta delta) {
  std::lock_guard lock(mutex_);
  if (failed_) return false;
  if (!spec_.stream) {
    Choice& choice = choices_[static_cast<size_t>(index)];
    choice.reasoning += delta.reasoning;
    choice.content += delta.content;
    for (TokenInfo& token : delta.tokens) choice.tokens.push_back(std::move(token));
    return true;
  }
  if (!BeginStream()) return false;
  return Write(
      FormatDeltaChunk(spec_.head, index, delta, spec_.logprobs, spec_.include_usage, model_->tokenizer()));
}

void GenerationJob::OnDone(int index, const GenerationResult& result) {
  std::lock_guard lock(mutex_);
  results_[static_cast<size_t>(index)] = result;
  if (done_ + 1 == results_.size()) ticket_.reset();
  if (!result.status.ok()) {
    if (!failed_) Fail(result.status);
  } else if (!failed_) {
    choices_[static_cast<size_t>(index)].finish = result.finish;
    if (spec_.stream && BeginStream()) {
      Write(FormatFinishChunk(spec_.head, index, result.finish, spec_.include_usage));
    }
  }
  if (++done_ == results_.size()) Complete();
}

void GenerationJob::Fail(const absl::Status& status) {
  failed_ = true;
  const ApiError error = FromStatus(status);
  if (streaming_) {
    Write(error.ToJson());
    responder_.Write(kSseDone);
    responder_.Finish();
    return;
  }
  HeaderList headers = {{"X-Request-Id", spec_.head.id}};
  if (error.retry_after > 0) headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  responder_.Respond(error.status, "application/json", error.ToJson(), headers);
}

UsageCounts GenerationJob::Usage() const {
  UsageCounts usage;
  usage.prompt_tokens = spec_.prompt_tokens;
  const auto together = static_cast<size_t>(spec_.choices_a_prompt);
  for (size_t i = 0; i < results_.size(); i += together) {
    // What one choice of a prompt has computed is in the cache for the next one: the first one's counts.
    uint32_t cached = results_[i].cached_prompt_tokens;
    for (size_t j = i; j < std::min(i + together, results_.size()); ++j) {
      cached = std::min(cached, results_[j].cached_prompt_tokens);
      usage.completion_tokens += results_[j].completion_tokens;
      usage.reasoning_tokens += results_[j].reasoning_tokens;
    }
    usage.cached_tokens += cached;
  }
  return usage;
}

void GenerationJob::Complete() {
  // First the room and the books, then the answer: who has his answer may come again at once.
  ticket_.reset();
  alarm_.reset();
  RecordRequest(spec_.head.id, results_, spec_.tokenize_seconds,
                absl::ToDoubleSeconds(absl::Now() - spec_.arrived), *metrics_);
  sessions_.clear();
  if (failed_) return;
  if (spec_.stream) {
    if (spec_.include_usage) Write(FormatUsageChunk(spec_.head, Usage()));
    responder_.Write(kSseDone);
    responder_.Finish();
    return;
  }
  for (size_t i = 0; i < spec_.echoes.size(); ++i) choices_[i].content.insert(0, spec_.echoes[i]);
  responder_.Respond(200, "application/json",
                     FormatAnswer(spec_.head, choices_, Usage(), spec_.logprobs, model_->tokenizer()),
                     {{"X-Request-Id", spec_.head.id}});
}

}  // namespace tandem::gateway
