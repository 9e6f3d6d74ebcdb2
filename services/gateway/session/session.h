// One sequence on its way: tokens go to an engine, text comes back. Both front ends use it.
//
// The session keeps the prompt and every generated token. If the engine is lost (UNAVAILABLE), it waits for
// one that serves the same model and calls again with all of them; sampling depends on (seed, position)
// alone, so the text goes on as if nothing had happened. An engine whose queue is full (RESOURCE_EXHAUSTED)
// leaves a new sequence to the next one; when all are full, it is refused. From an engine whose experts are
// lost, a sequence that has had no token for a while goes to one that has its own; where there is none, it
// ends when the engine has waited as long as it may (ABORTED).
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/tokenizer/tokenizer.h"
#include "services/gateway/grpc/engine_pool.h"
#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/generation.h"
#include "services/gateway/session/reasoning_splitter.h"
#include "services/gateway/session/stop_matcher.h"

namespace grpc {
class Alarm;
}

namespace tandem::gateway {

class GenerationSession;

// What all sessions share. Must outlive them: see WaitIdle.
class SessionEnvironment {
 public:
  SessionEnvironment(EnginePool* pool, GatewayMetrics* metrics, absl::Duration resume_timeout)
      : pool_(pool), metrics_(metrics), resume_timeout_(resume_timeout) {}

  // True once no session and none of their calls is left.
  bool WaitIdle(absl::Duration patience);
  int alive() const;
  // Ends every session with `why`.
  void CancelAll(const absl::Status& why);

 private:
  friend class GenerationSession;
  void Add(const std::shared_ptr<GenerationSession>& session);
  void Remove(GenerationSession* session);

  EnginePool* const pool_;
  GatewayMetrics* const metrics_;
  const absl::Duration resume_timeout_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  std::map<GenerationSession*, std::weak_ptr<GenerationSession>> sessions_;
};

// Thread-safe.
class GenerationSession final : public EngineListener,
                                public std::enable_shared_from_this<GenerationSession> {
 public:
  // The listener is kept until its OnDone has run.
  static std::shared_ptr<GenerationSession> Start(SessionEnvironment* environment,
                                                  std::shared_ptr<const ModelContext> model,
                                                  GenerationSpec spec,
                                                  std::shared_ptr<GenerationListener> listener);
  ~GenerationSession() override;

  // Ends the session with `why`, if it has not ended: the engine's call is cancelled, OnDone runs here.
  void Cancel(const absl::Status& why = absl::CancelledError("the client is gone"));

  // For the engine's client.
  void OnEngineEvent(uint64_t tag, const v1::GenerateEvent& event) override;
  void OnEngineDone(uint64_t tag, const absl::Status& status) override;
  void OnEngineStalled(uint64_t tag) override;

 private:
  GenerationSession(SessionEnvironment* environment, std::shared_ptr<const ModelContext> model,
                    GenerationSpec spec, std::shared_ptr<GenerationListener> listener);

  // All of these with mutex_ held.
  void Call();
  bool MayTryAnother();
  bool AnotherComputes();
  void MoveOn(const std::string& why);
  void Lost(const absl::Status& status);
  void WaitAndCall(absl::Duration pause);
  void OnAlarm();
  void TakeToken(const v1::GenerateEvent& event, int index, Delta& delta);
  void Emit(const std::string& text, Delta& delta);
  void GiveTokens(Delta& delta, bool all);
  void FinishText(Finish finish);
  void End(const absl::Status& status);
  void CountTime(int tokens);

  SessionEnvironment* const environment_;
  const std::shared_ptr<const ModelContext> model_;
  const GenerationSpec spec_;

  std::mutex mutex_;
  std::shared_ptr<GenerationListener> listener_;  // null once ended
  std::shared_ptr<Engine> engine_;                // of the last call
  std::vector<std::shared_ptr<Engine>>
      refused_;  // whose queues were full or experts lost, till a token comes
  std::shared_ptr<EngineCall> call_;
  uint64_t attempt_ = 0;
  std::unique_ptr<grpc::Alarm> alarm_;
  absl::Time lost_since_ = absl::InfiniteFuture();
  absl::Status lost_status_;
  absl::Duration pause_;

  std::vector<int32_t> generated_;
  tokenizer::StreamDecoder decoder_;
  StopMatcher stop_;
  ReasoningSplitter splitter_;
  ReasoningSplitter
      marks_;  // the same for tokens as they come: splitter_ may wait for the end of a stop string
  uint64_t text_chars_ = 0;  // code points of all text that went into stop_
  size_t text_bytes_ = 0;    // and bytes
  size_t given_bytes_ = 0;   // and that came out
  struct PendingToken {
    size_t end;  // of its text, in the same count
    TokenInfo info;
  };
  std::vector<PendingToken> pending_;

  GenerationResult result_;
  absl::Time started_;
  absl::Time first_token_ = absl::InfiniteFuture();
  absl::Time last_token_ = absl::InfiniteFuture();
  bool have_statistics_ = false;
};

}  // namespace tandem::gateway
