// Which sequences run and what each of them does in the next step.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "services/attention_gpu/kv/kv_cache.h"
#include "services/attention_gpu/scheduler/pacer.h"
#include "services/attention_gpu/scheduler/sequence.h"

namespace tandem::attention {

// A step and who is in it.
struct Plan {
  StepBatch batch;
  std::vector<Sequence*> sequences;  // as in StepBatch::sequences
  int32_t decoding = 0;              // the first so many of them decode
  int32_t prompt_tokens = 0;         // tokens of the others
};

// The order of things: sequences enter the batch first come first served, when there is a place and room for
// their whole prompt beside what the prompts before them still need. In a step all decode; of the prompt
// budget the earliest prompt gets half and the shortest ones the rest, so that a long one stalls nobody and
// is never stalled. Beside sequences that decode, the budget is the pacer's; it grows with the time that a
// prompt has waited beyond what can be expected of it, and such a prompt goes first. When pages run out, the
// latest comer gives its own up and goes back to the queue; the earliest can take all there are, so it always
// moves on. Not thread-safe.
class Planner {
 public:
  // `backend` must outlive the planner.
  Planner(const SchedulerOptions& options, Backend& backend, HostPages host);

  void Enqueue(SequencePtr s) { waiting_.push_back(std::move(s)); }
  bool idle() const { return running_.empty() && waiting_.empty(); }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }

  // Not empty unless idle(), or nobody can go on before a long step is done. Points into sequences: valid
  // until one of them is changed or removed.
  Plan Next();
  // The step was done in so many seconds: its tokens are computed. Sampled tokens are for the caller to
  // append.
  void Done(const Plan& plan, double seconds);

  // Prompts that are worth a long step, where the backend can make it beside the others' (and Next leaves it
  // to this); empty: none are, or one is under way. From here on they are apart: Next does without them,
  // until LongDone or LongDropped.
  Plan NextLong();
  void LongDone(const Plan& plan, double seconds);
  void LongDropped(const Plan& plan);

  // Takes the sequence out and gives its pages back; nullptr if there is none of this number.
  SequencePtr Remove(uint64_t number);
  // The numbers of those for which `condition` holds, running ones first.
  std::vector<uint64_t> Select(const std::function<bool(const Sequence&)>& condition) const;

  // Fills in all but the counts of the scheduler's own.
  void Describe(SchedulerSnapshot& out) const;

 private:
  void Admit();
  void Adopt(Sequence& s);
  void Gain(Sequence& s, int32_t gained);
  bool WaitsForNeighbour(const Sequence& s) const;
  int32_t PromptBudget(int32_t decoding);
  double UrgencyOf(const Sequence& s) const;
  double Urgency() const;
  int32_t LeastLong() const;
  bool LongPrompts() const;
  int32_t LongBudget() const;
  bool WantsPrompt(const Sequence& s) const { return !s.decoding() && !s.apart && !WaitsForNeighbour(s); }
  void Computed(const Plan& plan);
  void ShareOut(int32_t budget, std::vector<int32_t>& counts) const;
  void ReserveAll(std::vector<int32_t>& counts);
  bool Reserve(Sequence& s, int32_t tokens);
  bool PreemptLaterThan(uint64_t number);
  static void Add(Sequence& s, int32_t count, Plan& plan);

  const SchedulerOptions options_;
  const Backend& backend_;
  const int32_t max_step_tokens_;
  KvCache kv_;
  Pacer pacer_;
  bool long_step_ = false;  // is under way
  // Both in order of arrival.
  std::deque<SequencePtr> waiting_;
  std::vector<SequencePtr> running_;
  uint64_t preemptions_ = 0, query_tokens_ = 0, hit_tokens_ = 0;
};

}  // namespace tandem::attention
