// One request to a completions endpoint while it runs: its sequences, and the answer made of them.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "services/gateway/admission/admission.h"
#include "services/gateway/http/http_server.h"
#include "services/gateway/openai/api_error.h"
#include "services/gateway/openai/response.h"
#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/generation.h"
#include "services/gateway/session/session.h"

namespace grpc {
class Alarm;
}

namespace tandem::gateway {

struct JobSpec {
  AnswerHead head;
  bool stream = false;
  bool include_usage = false;
  bool logprobs = false;
  absl::Time arrived;
  double tokenize_seconds = 0;
  std::vector<GenerationSpec> sequences;  // one a choice, those of a prompt one after the other
  int choices_a_prompt = 1;
  absl::Duration head_after, comment_after;  // of a stream, see GatewayOptions
  std::vector<std::string> echoes;           // put before each choice's text; empty, or one a choice
  uint64_t prompt_tokens = 0;                // for usage: each prompt counts once
};

// Keeps itself alive until every sequence has ended. Thread-safe.
class GenerationJob : public std::enable_shared_from_this<GenerationJob> {
 public:
  static void Start(JobSpec spec, SessionEnvironment* environment, GatewayMetrics* metrics,
                    const std::shared_ptr<const ModelContext>& model, Responder responder,
                    Admission::Ticket ticket);
  GenerationJob(JobSpec spec, GatewayMetrics* metrics, std::shared_ptr<const ModelContext> model,
                Responder responder, Admission::Ticket ticket);
  ~GenerationJob();

 private:
  class ChoiceListener;

  bool OnDelta(int index, Delta delta);
  void OnDone(int index, const GenerationResult& result);
  void CancelAll();

  // With mutex_ held.
  bool BeginStream();
  void SetAlarm(absl::Duration from_now);
  void OnAlarm();
  bool Write(const std::string& json);
  void Fail(const absl::Status& status);
  void Complete();
  UsageCounts Usage() const;

  JobSpec spec_;
  GatewayMetrics* const metrics_;
  const std::shared_ptr<const ModelContext> model_;

  std::mutex mutex_;
  Responder responder_;
  std::optional<Admission::Ticket> ticket_;
  std::vector<std::shared_ptr<GenerationSession>> sessions_;
  std::vector<Choice> choices_;
  std::vector<GenerationResult> results_;
  size_t done_ = 0;
  bool streaming_ = false;                     // the head is sent
  absl::Time written_ = absl::InfinitePast();  // when, something of a stream
  std::unique_ptr<grpc::Alarm> alarm_;         // of a stream that has not ended
  bool failed_ = false;                        // the answer is given, or cut: what still runs is of no use
};

}  // namespace tandem::gateway
