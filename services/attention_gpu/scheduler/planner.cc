#include "services/attention_gpu/scheduler/planner.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "common/base/check.h"

namespace tandem::attention {
namespace {

// What a prompt may take beside others: so many times as long as alone, and this at least. Beyond it, it is
// urgent, in proportion, up to kMostUrgent.
constexpr double kPatience = 6;
constexpr double kLeastPatienceSeconds = 1;
constexpr double kMostUrgent = 16;

}  // namespace

Planner::Planner(const SchedulerOptions& options, Backend& backend, HostPages host)
    : options_(options),
      backend_(backend),
      max_step_tokens_(backend.max_step_tokens()),
      kv_(backend, options.prefix_cache, std::move(host)),
      pacer_(options.max_decode_slowdown, options.mixed_chunk_size, options.max_batch_size) {}

Plan Planner::Next() {
  Plan plan;
  if (idle()) return plan;
  Admit();
  for (auto& s : running_) Adopt(*s);
  std::vector<int32_t> counts(running_.size(), 0);
  int32_t decoding = 0;
  for (size_t i = 0; i < running_.size(); ++i) {
    if (!running_[i]->decoding() || running_[i]->apart) continue;
    counts[i] = 1;
    ++decoding;
  }
  if (decoding < running()) ShareOut(PromptBudget(decoding), counts);

  ReserveAll(counts);
  for (bool decode : {true, false}) {
    for (size_t i = 0; i < running_.size(); ++i) {
      if (counts[i] > 0 && running_[i]->decoding() == decode) Add(*running_[i], counts[i], plan);
    }
    if (decode) plan.decoding = static_cast<int32_t>(plan.sequences.size());
  }
  // The running ones have no page to go on, the first prompt had no budget.
  if (plan.sequences.empty() && !long_step_) {
    Sequence& first = *running_.front();
    const int32_t count = std::min({first.remaining(), options_.chunk_size, max_step_tokens_});
    TANDEM_CHECK(Reserve(first, first.computed + count));
    Add(first, count, plan);
  }
  plan.prompt_tokens = static_cast<int32_t>(plan.batch.tokens.size()) - plan.decoding;
  return plan;
}

Plan Planner::NextLong() {
  Plan plan;
  if (long_step_ || idle() || !backend_.long_beside_others()) return plan;
  Admit();
  for (auto& s : running_) Adopt(*s);
  if (!LongPrompts()) return plan;
  std::vector<int32_t> counts(running_.size(), 0);
  ShareOut(LongBudget(), counts);
  ReserveAll(counts);
  int32_t tokens = 0;
  for (size_t i = 0; i < running_.size(); ++i) tokens += counts[i];
  if (tokens < LeastLong()) return plan;  // for want of pages
  for (size_t i = 0; i < running_.size(); ++i) {
    if (counts[i] == 0) continue;
    Add(*running_[i], counts[i], plan);
    running_[i]->apart = true;
  }
  plan.prompt_tokens = tokens;
  long_step_ = true;
  return plan;
}

void Planner::LongDone(const Plan& plan, double seconds) {
  LongDropped(plan);
  pacer_.Observe(0, plan.prompt_tokens, seconds);
  Computed(plan);
}

void Planner::LongDropped(const Plan& plan) {
  for (Sequence* s : plan.sequences) s->apart = false;
  long_step_ = false;
}

void Planner::Done(const Plan& plan, double seconds) {
  // Beside a long step others take longer: that says nothing of themselves.
  if (!long_step_) pacer_.Observe(plan.decoding, plan.prompt_tokens, seconds);
  Computed(plan);
}

void Planner::Computed(const Plan& plan) {
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    Sequence& s = *plan.sequences[i];
    s.computed += plan.batch.sequences[i].count;
    s.most_computed = std::max(s.most_computed, s.computed);
    kv_.Commit(s.tokens, s.computed, s.kv);
  }
}

SequencePtr Planner::Remove(uint64_t number) {
  auto is_it = [number](const SequencePtr& s) { return s->number == number; };
  SequencePtr out;
  if (auto it = std::find_if(running_.begin(), running_.end(), is_it); it != running_.end()) {
    out = std::move(*it);
    running_.erase(it);
    kv_.Release(out->kv);
  } else if (auto w = std::find_if(waiting_.begin(), waiting_.end(), is_it); w != waiting_.end()) {
    out = std::move(*w);
    waiting_.erase(w);
  }
  return out;
}

std::vector<uint64_t> Planner::Select(const std::function<bool(const Sequence&)>& condition) const {
  std::vector<uint64_t> out;
  for (const auto& s : running_) {
    if (condition(*s)) out.push_back(s->number);
  }
  for (const auto& s : waiting_) {
    if (condition(*s)) out.push_back(s->number);
  }
  return out;
}

void Planner::Describe(SchedulerSnapshot& out) const {
  out.running = running();
  out.kv = kv_.Statistics();
  out.preemptions = preemptions_;
  out.query_tokens = query_tokens_;
  out.hit_tokens = hit_tokens_;
}

void Planner::Admit() {
  if (waiting_.empty()) return;
  const absl::Time now = absl::Now();
  int64_t promised = 0;  // pages that running ones still need for the tokens they have
  for (const auto& s : running_) {
    promised +=
        std::max<int64_t>(0, kv_.PagesFor(s->tokens.size()) - static_cast<int64_t>(s->kv.pages.size()));
  }
  while (!waiting_.empty() && running() < options_.max_batch_size) {
    const Sequence& s = *waiting_.front();
    const int64_t needed = kv_.PagesFor(s.tokens.size()) - kv_.Probe(s.tokens).free_of_cost;
    if (!running_.empty() && promised + needed > kv_.available()) return;
    promised += needed;
    if (options_.prefix_cache) query_tokens_ += s.tokens.size();
    waiting_.front()->admitted = now;
    const auto at = std::find_if(running_.begin(), running_.end(),
                                 [&](const SequencePtr& r) { return r->number > s.number; });
    running_.insert(at, std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// Takes over pages that others have computed, at the admission and at every page's end after it: a neighbour
// may be ahead. Then the beginning of a page, unless a neighbour is about to know the whole.
void Planner::Adopt(Sequence& s) {
  if (s.apart) return;
  Gain(s, kv_.Adopt(s.tokens, s.computed, s.kv));
  if (!WaitsForNeighbour(s)) Gain(s, kv_.CopyPart(s.tokens, s.computed, s.kv));
}

void Planner::Gain(Sequence& s, int32_t gained) {
  if (gained == 0) return;
  hit_tokens_ += gained;
  s.computed += gained;
  if (s.generated == 0) s.cached += std::max(0, s.computed - std::max(s.most_computed, s.computed - gained));
  s.most_computed = std::max(s.most_computed, s.computed);
}

// An earlier sequence is about to compute the very page that `s` needs next.
bool Planner::WaitsForNeighbour(const Sequence& s) const {
  if (!options_.prefix_cache) return false;
  const int32_t page = kv_.page_tokens();
  const auto begin = static_cast<int32_t>(s.kv.shared.size()) * page;
  if (s.computed != begin || s.remaining() < page) return false;
  for (const auto& other : running_) {
    if (other->number >= s.number) return false;
    if (other->decoding() || other->kv.shared.size() != s.kv.shared.size() ||
        static_cast<int32_t>(other->tokens.size()) < begin + page) {
      continue;
    }
    if (begin > 0 && other->kv.shared.back() != s.kv.shared.back()) continue;
    if (std::equal(s.tokens.begin() + begin, s.tokens.begin() + begin + page,
                   other->tokens.begin() + begin)) {
      return true;
    }
  }
  return false;
}

// How many times as long as can be expected a running prompt has been in the batch. What it waits for a
// place does not count: those who run cannot shorten that by standing back.
double Planner::UrgencyOf(const Sequence& s) const {
  const auto own = static_cast<int64_t>(s.tokens.size()) - s.cached;
  const double patience = std::max(kLeastPatienceSeconds, kPatience * pacer_.SecondsAlone(own));
  return absl::ToDoubleSeconds(absl::Now() - s.admitted) / patience;
}

// Of the one that is worst off; at least 1.
double Planner::Urgency() const {
  double most = 1;
  for (const auto& s : running_) {
    if (WantsPrompt(*s)) most = std::max(most, UrgencyOf(*s));
  }
  return std::min(most, kMostUrgent);
}

int32_t Planner::PromptBudget(int32_t decoding) {
  pacer_.SetUrgency(decoding > 0 ? Urgency() : 1);
  int32_t chunk = decoding > 0 ? std::min(pacer_.Chunk(decoding), options_.chunk_size) : options_.chunk_size;
  // A step of many tokens takes long: not while somebody waits for his next one.
  if (decoding == 0 && !backend_.long_beside_others() && LongPrompts()) return backend_.max_long_tokens();
  // Those who are apart are not to wait for others' prompts when their step is done.
  if (long_step_) chunk = std::min(chunk, options_.mixed_chunk_size);
  return std::min(chunk, max_step_tokens_ - decoding);
}

// Prompt tokens that are worth a large step.
int32_t Planner::LeastLong() const {
  for (const auto& s : running_) {
    if (s->decoding()) return backend_.long_prompt_tokens();
  }
  return backend_.long_prompt_tokens_alone();
}

// Of a large step, by the prompt that is its turn.
int32_t Planner::LongBudget() const {
  bool decodes = false;
  const Sequence* first = nullptr;
  for (const auto& s : running_) {
    decodes |= s->decoding();
    if (first == nullptr && WantsPrompt(*s)) first = s.get();
  }
  return first != nullptr ? backend_.long_step_tokens(first->remaining(), decodes) : 0;
}

// What prompts there are to compute is worth a large step.
bool Planner::LongPrompts() const {
  const int32_t least = LeastLong();
  if (least <= 0) return false;
  int64_t tokens = 0;
  for (const auto& s : running_) {
    if (WantsPrompt(*s)) tokens += s->remaining();
  }
  return tokens >= least;
}

// Gives prompt tokens to the running sequences that do not decode.
void Planner::ShareOut(int32_t budget, std::vector<int32_t>& counts) const {
  std::vector<size_t> order;
  for (size_t i = 0; i < running_.size(); ++i) {
    if (WantsPrompt(*running_[i])) order.push_back(i);
  }
  if (order.empty() || budget <= 0) return;
  const size_t first = order[0];
  const int32_t wanted = running_[first]->remaining();
  const bool all = order.size() == 1 || UrgencyOf(*running_[first]) > 1;
  counts[first] = std::min(wanted, all ? budget : (budget + 1) / 2);
  budget -= counts[first];
  std::stable_sort(order.begin() + 1, order.end(), [this](size_t a, size_t b) {
    return running_[a]->remaining() < running_[b]->remaining();
  });
  for (size_t i = 1; i < order.size() && budget > 0; ++i) {
    counts[order[i]] = std::min(budget, running_[order[i]]->remaining());
    budget -= counts[order[i]];
  }
  counts[first] += std::min(budget, wanted - counts[first]);
}

// Pages for so many more tokens of each, in order of arrival: who comes later may lose his place in the step
// to who came earlier, never the other way round.
void Planner::ReserveAll(std::vector<int32_t>& counts) {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    // In the place of one who gave it up stands one who is apart, if anybody.
    if (s.apart || (counts[i] > 0 && !Reserve(s, s.computed + counts[i]))) counts[i] = 0;
  }
}

// Makes sure that `s` has pages for its first `tokens` tokens; sequences that came later give theirs up.
bool Planner::Reserve(Sequence& s, int32_t tokens) {
  while (!kv_.Reserve(tokens, s.kv)) {
    if (!PreemptLaterThan(s.number)) return false;
  }
  return true;
}

// Takes the pages of the latest comer that is not apart, if that is later than `number`; it goes back to the
// queue, and what is not in the prefix cache any more when its turn comes again is computed again.
bool Planner::PreemptLaterThan(uint64_t number) {
  const auto latest =
      std::find_if(running_.rbegin(), running_.rend(), [](const SequencePtr& s) { return !s->apart; });
  if (latest == running_.rend() || (*latest)->number <= number) return false;
  SequencePtr victim = std::move(*latest);
  running_.erase(std::next(latest).base());
  kv_.Release(victim->kv);
  victim->computed = 0;
  ++preemptions_;
  const auto at = std::find_if(waiting_.begin(), waiting_.end(),
                               [&](const SequencePtr& w) { return w->number > victim->number; });
  waiting_.insert(at, std::move(victim));
  return true;
}

void Planner::Add(Sequence& s, int32_t count, Plan& plan) {
  if (s.started == absl::InfiniteFuture()) s.started = absl::Now();
  StepSequence out;
  out.first = static_cast<int32_t>(plan.batch.tokens.size());
  out.count = count;
  out.position = s.computed;
  out.pages = s.kv.pages;
  out.generated_from = static_cast<int32_t>(s.request.prompt.size()) - s.request.resumed_tokens;
  out.sample = count == s.remaining();
  out.params = &s.request.sampling;
  out.counts = &s.counts;
  plan.batch.tokens.insert(plan.batch.tokens.end(), s.tokens.begin() + s.computed,
                           s.tokens.begin() + s.computed + count);
  plan.batch.sequences.push_back(out);
  plan.sequences.push_back(&s);
}

}  // namespace tandem::attention
