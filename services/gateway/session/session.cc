#include "services/gateway/session/session.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/telemetry/log.h"
#include "tandem/v1/engine.pb.h"

namespace tandem::gateway {
namespace {

constexpr absl::Duration kFirstPause = absl::Milliseconds(20);
constexpr absl::Duration kLongestPause = absl::Milliseconds(200);

}  // namespace

bool SessionEnvironment::WaitIdle(absl::Duration patience) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, absl::ToChronoMilliseconds(std::max(patience, absl::ZeroDuration())),
                        [this] { return sessions_.empty(); });
}

int SessionEnvironment::alive() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(sessions_.size());
}

void SessionEnvironment::CancelAll(const absl::Status& why) {
  std::vector<std::shared_ptr<GenerationSession>> sessions;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [pointer, weak] : sessions_) {
      if (std::shared_ptr<GenerationSession> session = weak.lock()) sessions.push_back(std::move(session));
    }
  }
  for (const auto& session : sessions) session->Cancel(why);
}

void SessionEnvironment::Add(const std::shared_ptr<GenerationSession>& session) {
  std::lock_guard lock(mutex_);
  sessions_.emplace(session.get(), session);
}

void SessionEnvironment::Remove(GenerationSession* session) {
  std::lock_guard lock(mutex_);
  sessions_.erase(session);
  if (sessions_.empty()) idle_.notify_all();
}

GenerationSession::GenerationSession(SessionEnvironment* environment,
                                     std::shared_ptr<const ModelContext> model, GenerationSpec spec,
                                     std::shared_ptr<GenerationListener> listener)
    : environment_(environment),
      model_(std::move(model)),
      spec_(std::move(spec)),
      listener_(std::move(listener)),
      decoder_(&model_->tokenizer()),
      stop_(spec_.stop),
      splitter_(spec_.starts_in_reasoning),
      marks_(spec_.starts_in_reasoning),
      started_(spec_.arrived == absl::InfinitePast() ? absl::Now() : spec_.arrived) {
  result_.prompt_tokens = static_cast<uint32_t>(spec_.prompt_tokens.size());
  environment_->metrics_->waiting.Add(1);
  environment_->metrics_->prompt_tokens.Add(result_.prompt_tokens);
}

GenerationSession::~GenerationSession() {
  // Before the pool may go: an engine cannot end on its own thread, which may be this one.
  engine_.reset();
  refused_.clear();
  environment_->Remove(this);
}

std::shared_ptr<GenerationSession> GenerationSession::Start(SessionEnvironment* environment,
                                                            std::shared_ptr<const ModelContext> model,
                                                            GenerationSpec spec,
                                                            std::shared_ptr<GenerationListener> listener) {
  std::shared_ptr<GenerationSession> session(
      new GenerationSession(environment, std::move(model), std::move(spec), std::move(listener)));
  environment->Add(session);
  std::lock_guard lock(session->mutex_);
  session->Call();
  return session;
}

void GenerationSession::Call() {
  // The engine may have been lost between its last token and the word that it was the last.
  if (!generated_.empty() && !spec_.ignore_eos && model_->tokenizer().IsEndOfGeneration(generated_.back())) {
    return FinishText(Finish::kStop);
  }
  if (generated_.size() >= spec_.max_new_tokens) return FinishText(Finish::kLength);
  v1::GenerateRequest request;
  request.set_request_id(spec_.request_id);
  auto& tokens = *request.mutable_prompt_tokens();
  tokens.Reserve(static_cast<int>(spec_.prompt_tokens.size() + generated_.size()));
  tokens.Add(spec_.prompt_tokens.begin(), spec_.prompt_tokens.end());
  tokens.Add(generated_.begin(), generated_.end());
  EnginePool::Want want;
  want.fingerprint = model_->limits().fingerprint;
  want.prompt = {tokens.data(), static_cast<size_t>(tokens.size())};
  want.refused = refused_;
  absl::StatusOr<std::shared_ptr<Engine>> engine = environment_->pool_->Pick(want);
  if (!engine.ok()) return Lost(engine.status());
  request.set_resumed_tokens(static_cast<uint32_t>(generated_.size()));
  request.set_max_new_tokens(spec_.max_new_tokens - static_cast<uint32_t>(generated_.size()));
  v1::SamplingParameters& sampling = *request.mutable_sampling();
  sampling.set_temperature(spec_.sampling.temperature);
  sampling.set_top_p(spec_.sampling.top_p);
  sampling.set_top_k(spec_.sampling.top_k);
  sampling.set_min_p(spec_.sampling.min_p);
  sampling.set_seed(spec_.sampling.seed);
  sampling.set_presence_penalty(spec_.sampling.presence_penalty);
  sampling.set_frequency_penalty(spec_.sampling.frequency_penalty);
  sampling.set_repetition_penalty(spec_.sampling.repetition_penalty);
  for (const auto& [token, bias] : spec_.sampling.logit_bias) (*sampling.mutable_logit_bias())[token] = bias;
  if (!spec_.ignore_eos) {
    for (const int32_t token : model_->tokenizer().end_of_generation_ids()) request.add_stop_token_ids(token);
  }
  request.set_logprobs(spec_.logprobs);
  request.set_top_logprobs(spec_.top_logprobs);
  engine_ = std::move(*engine);
  call_ = engine_->Generate(std::move(request), spec_.deadline, shared_from_this(), ++attempt_);
}

// Whether an engine is left that has not refused the sequence.
bool GenerationSession::MayTryAnother() {
  if (std::find(refused_.begin(), refused_.end(), engine_) != refused_.end()) return false;
  refused_.push_back(engine_);
  for (const std::shared_ptr<Engine>& engine : environment_->pool_->engines()) {
    const bool refused = std::find(refused_.begin(), refused_.end(), engine) != refused_.end();
    if (!refused && engine->serving()) return true;
  }
  return false;
}

// Whether an engine of the same model is left with nothing in the way of its computing.
bool GenerationSession::AnotherComputes() {
  for (const std::shared_ptr<Engine>& engine : environment_->pool_->engines()) {
    const bool refused = std::find(refused_.begin(), refused_.end(), engine) != refused_.end();
    if (engine == engine_ || refused || !engine->serving() || !engine->degraded().empty()) continue;
    if (engine->model()->limits().fingerprint == model_->limits().fingerprint) return true;
  }
  return false;
}

// Leaves an engine that is there but cannot compute. It is not asked again before another one has made a
// token: the sequence goes from hand to hand once at most.
void GenerationSession::MoveOn(const std::string& why) {
  spdlog::warn("{}: goes to another engine after {} tokens: {}", spec_.request_id, generated_.size(), why);
  ++attempt_;  // what the call has still to say is nobody's
  if (call_ != nullptr) call_->Cancel();
  call_.reset();
  refused_.push_back(engine_);
  if (lost_since_ == absl::InfiniteFuture()) {
    lost_since_ = absl::Now();
    pause_ = kFirstPause;
  }
  Call();
}

// The engine cannot be had, for now. What is lost is tried again until the patience ends.
void GenerationSession::Lost(const absl::Status& status) {
  const absl::Time now = absl::Now();
  if (lost_since_ == absl::InfiniteFuture()) {
    lost_since_ = now;
    pause_ = kFirstPause;
    spdlog::warn("{}: engine lost after {} tokens: {}", spec_.request_id, generated_.size(),
                 std::string(status.message()));
  }
  lost_status_ = status;
  if (now >= spec_.deadline) return End(absl::DeadlineExceededError("the request's deadline has passed"));
  if (now - lost_since_ >= environment_->resume_timeout_ ||
      status.code() == absl::StatusCode::kFailedPrecondition) {
    return End(absl::UnavailableError(
        absl::StrCat("the engine was lost and did not come back within ",
                     absl::FormatDuration(absl::Trunc(now - lost_since_, absl::Milliseconds(1))), ": ",
                     status.message())));
  }
  WaitAndCall(pause_);
  pause_ = std::min(pause_ * 2, kLongestPause);
}

void GenerationSession::WaitAndCall(absl::Duration pause) {
  alarm_ = std::make_unique<grpc::Alarm>();
  const auto when = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(pause);
  alarm_->Set(when, [session = shared_from_this()](bool) {
    std::lock_guard lock(session->mutex_);
    session->OnAlarm();
  });
}

void GenerationSession::OnAlarm() {
  if (listener_ != nullptr) Call();
}

void GenerationSession::OnEngineEvent(uint64_t tag, const v1::GenerateEvent& event) {
  std::lock_guard lock(mutex_);
  if (listener_ == nullptr || tag != attempt_) return;
  if (event.has_statistics()) {
    const v1::GenerateStatistics& statistics = event.statistics();
    if (generated_.empty() || result_.resumes == 0) {
      result_.cached_prompt_tokens =
          std::min(statistics.cached_prompt_tokens(), static_cast<uint32_t>(spec_.prompt_tokens.size()));
      result_.queue_seconds = statistics.queue_seconds();
      result_.prefill_seconds = statistics.prefill_seconds();
      result_.decode_seconds = statistics.decode_seconds();
      have_statistics_ = true;
    }
  }
  if (event.tokens_size() > 0) {
    if (lost_since_ != absl::InfiniteFuture()) {
      lost_since_ = absl::InfiniteFuture();
      ++result_.resumes;
      environment_->metrics_->resumes.Add();
    }
    refused_.clear();
    CountTime(event.tokens_size());
    Delta delta;
    for (int i = 0; i < event.tokens_size() && !stop_.stopped(); ++i) TakeToken(event, i, delta);
    GiveTokens(delta, /*all=*/false);
    if (!delta.empty() && !listener_->OnDelta(std::move(delta))) {
      return End(absl::CancelledError("the client is gone"));
    }
    if (stop_.stopped()) return FinishText(Finish::kStop);
  }
  if (event.finish_reason() == v1::FINISH_REASON_STOP) return FinishText(Finish::kStop);
  if (event.finish_reason() == v1::FINISH_REASON_LENGTH) return FinishText(Finish::kLength);
}

void GenerationSession::CountTime(int tokens) {
  const absl::Time now = absl::Now();
  GatewayMetrics& metrics = *environment_->metrics_;
  metrics.generated_tokens.Add(tokens);
  if (first_token_ == absl::InfiniteFuture()) {
    first_token_ = now;
    metrics.time_to_first_token.Observe(absl::ToDoubleSeconds(now - started_));
    metrics.waiting.Add(-1);
    metrics.running.Add(1);
  } else {
    const double gap = absl::ToDoubleSeconds(now - last_token_) / tokens;
    for (int i = 0; i < tokens; ++i) metrics.inter_token.Observe(gap);
  }
  last_token_ = now;
}

void GenerationSession::TakeToken(const v1::GenerateEvent& event, int index, Delta& delta) {
  const v1::GeneratedToken& token = event.tokens(index);
  const int32_t id = token.token();
  generated_.push_back(id);
  ++result_.completion_tokens;
  const bool last = event.finish_reason() == v1::FINISH_REASON_STOP && index + 1 == event.tokens_size();
  const bool end = !spec_.ignore_eos && model_->tokenizer().IsEndOfGeneration(id);
  if (last && end) return;
  if (spec_.split_reasoning && (marks_.in_reasoning() || id == model_->think_open_id())) {
    ++result_.reasoning_tokens;
  }
  const std::string text = model_->Visible(id) ? decoder_.Push(id) : std::string();
  if (spec_.split_reasoning) marks_.Push(text);
  if (spec_.logprobs) {
    const bool reasoning = spec_.split_reasoning && (!marks_.in_answer() || id == model_->think_open_id());
    PendingToken pending{0, {id, token.logprob(), {}, reasoning, text_chars_}};
    for (const v1::TokenLogprob& top : token.top_logprobs()) {
      pending.info.top.push_back({top.token(), top.logprob()});
    }
    pending_.push_back(std::move(pending));
  }
  Emit(text, delta);
  if (spec_.logprobs) pending_.back().end = text_bytes_;
}

void GenerationSession::Emit(const std::string& text, Delta& delta) {
  text_bytes_ += text.size();
  text_chars_ += static_cast<uint64_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
  const std::string safe = stop_.Push(text);
  given_bytes_ += safe.size();
  if (!spec_.split_reasoning) {
    delta.content += safe;
  } else if (!safe.empty()) {
    SplitText split = splitter_.Push(safe);
    delta.reasoning += split.reasoning;
    delta.content += split.content;
  }
}

// The tokens whose text has been given out; those that have part in a stop string never are.
void GenerationSession::GiveTokens(Delta& delta, bool all) {
  size_t count = 0;
  while (count < pending_.size() && (all || pending_[count].end <= given_bytes_)) ++count;
  for (size_t i = 0; i < count; ++i) delta.tokens.push_back(std::move(pending_[i].info));
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(count));
}

void GenerationSession::FinishText(Finish finish) {
  Delta delta;
  const auto give = [this, &delta](const SplitText& split) {
    delta.reasoning += split.reasoning;
    delta.content += split.content;
  };
  if (!stop_.stopped()) Emit(decoder_.Flush(), delta);
  if (!stop_.stopped()) {
    const std::string rest = stop_.Flush();
    given_bytes_ += rest.size();
    if (spec_.split_reasoning) {
      give(splitter_.Push(rest));
    } else {
      delta.content += rest;
    }
  }
  if (spec_.split_reasoning) give(splitter_.Flush());
  if (stop_.stopped()) finish = Finish::kStop;
  GiveTokens(delta, /*all=*/!stop_.stopped());
  if (!delta.empty() && !listener_->OnDelta(std::move(delta))) {
    return End(absl::CancelledError("the client is gone"));
  }
  result_.finish = finish;
  End(absl::OkStatus());
}

void GenerationSession::OnEngineDone(uint64_t tag, const absl::Status& status) {
  std::lock_guard lock(mutex_);
  if (tag != attempt_) return;
  call_.reset();
  if (listener_ == nullptr) return;
  if (status.ok()) return End(absl::InternalError("the engine ended the sequence without saying why"));
  const bool lost = status.code() == absl::StatusCode::kUnavailable;
  const bool resuming = lost_since_ != absl::InfiniteFuture() || !generated_.empty();
  if (lost || (resuming && status.code() == absl::StatusCode::kResourceExhausted)) {
    // A full queue is no reason to give up what has begun.
    if (lost) engine_->Suspect(status);
    if (!lost) refused_.assign(1, engine_);
    return Lost(status);
  }
  if (status.code() == absl::StatusCode::kResourceExhausted && MayTryAnother()) return Call();
  if (status.code() == absl::StatusCode::kAborted) {
    // The engine is there, and would only wait for its experts once more.
    if (AnotherComputes()) return MoveOn(std::string(status.message()));
    return End(absl::UnavailableError(status.message()));
  }
  if (status.code() == absl::StatusCode::kDeadlineExceeded) {
    return End(absl::DeadlineExceededError("the request's deadline has passed"));
  }
  End(status);
}

void GenerationSession::OnEngineStalled(uint64_t tag) {
  std::lock_guard lock(mutex_);
  if (listener_ == nullptr || tag != attempt_ || call_ == nullptr || !AnotherComputes()) return;
  MoveOn(engine_->degraded());
}

void GenerationSession::Cancel(const absl::Status& why) {
  std::lock_guard lock(mutex_);
  if (listener_ != nullptr) End(why);
}

void GenerationSession::End(const absl::Status& status) {
  const std::shared_ptr<GenerationListener> listener = std::move(listener_);
  listener_ = nullptr;
  if (call_ != nullptr) call_->Cancel();
  call_.reset();
  alarm_.reset();
  GatewayMetrics& metrics = *environment_->metrics_;
  const bool begun = first_token_ != absl::InfiniteFuture();
  (begun ? metrics.running : metrics.waiting).Add(-1);
  result_.status = status;
  if (begun) {
    // The engine's own clock where it told; else what was seen from here.
    const double queued_prefill = absl::ToDoubleSeconds(first_token_ - started_);
    if (!have_statistics_) result_.prefill_seconds = queued_prefill;
    if (!have_statistics_ || result_.decode_seconds <= 0) {
      result_.decode_seconds = absl::ToDoubleSeconds(last_token_ - first_token_);
    }
    if (have_statistics_) {
      metrics.queue_seconds.Observe(result_.queue_seconds);
      metrics.cached_prompt_tokens.Add(result_.cached_prompt_tokens);
    }
    const double computed = result_.prompt_tokens - result_.cached_prompt_tokens;
    if (result_.prefill_seconds > 0) metrics.prefill_rate.Observe(computed / result_.prefill_seconds);
    if (result_.completion_tokens > 1 && result_.decode_seconds > 0) {
      metrics.decode_rate.Observe((result_.completion_tokens - 1) / result_.decode_seconds);
    }
  }
  listener->OnDone(result_);
}

}  // namespace tandem::gateway
