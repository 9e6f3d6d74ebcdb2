// What the scheduler asks of a device: run one step over a batch of token rows. Rooms: cpu/ and cuda/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/attention_gpu/sampling/sampling.h"

namespace tandem::attention {

// Consecutive tokens of one sequence within a step: one in decode, a chunk in prefill.
struct StepSequence {
  int32_t first = 0;  // index of its first token in StepBatch::tokens
  int32_t count = 0;
  int32_t position = 0;  // of the first token in its sequence
  // Page i holds positions [i * page_tokens, (i + 1) * page_tokens). Sequences may have pages in common, but
  // not those that the step writes.
  std::span<const int32_t> pages;
  // Tokens at this position and behind were generated, not given: those that --defer-experts is for.
  int32_t generated_from = std::numeric_limits<int32_t>::max();
  bool sample = false;                                           // choose a token after the last of these
  const SamplingParams* params = nullptr;                        // if sample
  const std::unordered_map<int32_t, int32_t>* counts = nullptr;  // if sample: generated tokens, for penalties
};

struct StepBatch {
  std::vector<int32_t> tokens;
  std::vector<StepSequence> sequences;
  bool want_logits = false;  // also return the logits of every token (tests, evaluation)
};

// The routed experts chosen in a MoE layer, in falling order of weight.
struct RoutingTrace {
  int32_t layer = 0;                  // block number
  std::vector<int32_t> expert_ids;    // [tokens, k]
  std::vector<float> expert_weights;  // [tokens, k]
};

struct StepResult {
  std::vector<SampledToken> sampled;  // one for each sequence, in order; meaningless where !sample
  std::vector<float> logits;          // [tokens, vocab] if wanted
  std::vector<RoutingTrace> routing;  // if want_logits
};

// InvalidArgument if the step has more tokens than a backend takes.
absl::Status CheckStepTokens(const StepBatch& batch, int32_t max_step_tokens);
// Whether some of the step's tokens were generated.
bool HasGeneratedTokens(const StepBatch& batch);

// Not thread-safe: one caller, the scheduler's thread.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // "cpu", "cuda"
  virtual int32_t page_tokens() const = 0;
  virtual int32_t page_count() const = 0;  // pages of the KV cache, ids [0, page_count)
  virtual int32_t max_step_tokens() const = 0;
  // So many prompt tokens are better computed in one step, up to max_long_tokens, than in chunks; 0: never.
  // May change with RecoverExperts.
  virtual int32_t long_prompt_tokens() const { return 0; }
  // Likewise while nobody decodes; not more.
  virtual int32_t long_prompt_tokens_alone() const { return long_prompt_tokens(); }
  // Of such a large step, at most; it is of prompts alone.
  virtual int32_t max_long_tokens() const { return max_step_tokens(); }
  // Likewise where the first prompt in it has so many tokens left: fewer may be faster. `beside`: others
  // decode meanwhile.
  virtual int32_t long_step_tokens(int64_t /*prompt_tokens*/, bool /*beside*/) const {
    return max_long_tokens();
  }

  // Runs the batch: writes the tokens' cache entries and fills `result`. On error nothing that an earlier
  // step wrote is changed, and the same step may be asked for again: positions already written are written
  // over. Unavailable: the experts are gone; see RecoverExperts.
  virtual absl::Status Step(const StepBatch& batch, StepResult* result) = 0;

  // Whether such a large step can be made beside others: BeginLong, then Step and the copies below as ever,
  // for other sequences that write other pages, and AwaitLong until it says that it is done or fails. One at
  // a time. What the batch points to must stay until then.
  virtual bool long_beside_others() const { return false; }
  virtual absl::Status BeginLong(const StepBatch&) {
    return absl::UnimplementedError("no step beside others");
  }
  // True: it is done, and *result is what Step would have given; false: not within `most`. After an error, of
  // the kinds that Step has, there is no such step any more.
  virtual absl::StatusOr<bool> AwaitLong(absl::Duration, StepResult*) {
    return absl::UnimplementedError("no step beside others");
  }
  // Gives it up, if there is one; before RecoverExperts.
  virtual void DropLong() {}

  // The contents of a page, all layers, as bytes of the backend's own layout: what CopyPageOut wrote,
  // CopyPageIn puts back, into the same page or another one, bit for bit. Between steps; the next step sees
  // the page. A page that could not be copied in is undefined.
  virtual int64_t page_bytes() const = 0;
  virtual absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) = 0;
  virtual absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) = 0;

  // Attaches anew to experts that were lost, waiting up to `patience`. OK if all are there.
  virtual absl::Status RecoverExperts(absl::Duration patience) = 0;
};

}  // namespace tandem::attention
