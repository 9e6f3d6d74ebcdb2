// How many prompt tokens a step may take along without the running sequences feeling it too much: learned
// from the times of the steps themselves, since it depends on the model, the machine, the batch and the
// contexts.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem::attention {

// Over any stretch of steps, running sequences take at most `slowdown` times as long as they would
// undisturbed, but for the scatter of the times. Where at least one prompt token a step fits that, every step
// keeps to it. Where not even one does (a token at the end of a long prompt beside short sequences), prompt
// tokens come in a few steps, between which there is none: as many at a time as make the disturbed steps few
// (under one in twenty) unless they become so long that one would see it. A prompt that has waited too long
// is urgent: prompts may then slow the others down in proportion. Not thread-safe.
class Pacer {
 public:
  // `slowdown`: above 1, or 0: no such limit. `max_chunk`: prompt tokens beside running sequences at most.
  // `max_decoding`: running sequences at most.
  Pacer(double slowdown, int32_t max_chunk, int32_t max_decoding);

  // What prompts may add to a step is so many times (at least 1) what it is otherwise, until this is set
  // anew. Above 1, steps may take 30 ms in any case, and `max_chunk` does not count.
  void SetUrgency(double urgency) { urgency_ = urgency; }

  // Prompt tokens for the next step beside `decoding` (at least one) running sequences; often 0.
  int32_t Chunk(int32_t decoding) const;

  // Seconds that so many prompt tokens take where nobody else runs, by what such steps took of late; 0: not
  // known.
  double SecondsAlone(int64_t prompt_tokens) const {
    return static_cast<double>(prompt_tokens) * seconds_per_token_alone_;
  }

  // A step of `decoding` running sequences and `prompt_tokens` took `seconds`.
  void Observe(int32_t decoding, int32_t prompt_tokens, double seconds);

 private:
  struct Undisturbed {
    double seconds = 0;
    uint64_t at = 0;  // step of the last measurement; 0: none
  };
  // Seconds that prompts may add to a step.
  double Allowance(int32_t decoding) const;

  const double slowdown_;
  const int32_t max_chunk_;
  std::vector<Undisturbed> undisturbed_;  // [number of running sequences]
  double seconds_per_prompt_token_ = 0;   // beside running sequences, of late; 0: not known
  double seconds_per_token_alone_ = 0;    // where nobody runs beside them; 0: not known
  double urgency_ = 1;
  int32_t last_chunk_ = 0;  // prompt tokens of the last disturbed step
  double debt_ = 0;         // seconds that prompts took beyond the allowance; steps pay it back
  uint64_t step_ = 0;
};

}  // namespace tandem::attention
