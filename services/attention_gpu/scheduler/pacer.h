// How many prompt tokens a step may take along without the running sequences feeling it too much: learned
// from the times of the steps themselves, since it depends on the model, the machine and the batch.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem::attention {

// Not thread-safe.
class Pacer {
 public:
  // `slowdown`: how many times as long as without prompt work a step of running sequences may take (above 1;
  // 0: no such limit). `max_chunk`: prompt tokens beside running sequences at most. `max_decoding`:
  // sequences.
  Pacer(double slowdown, int32_t max_chunk, int32_t max_decoding);

  // Prompt tokens for the next step beside `decoding` (at least one) running sequences. 0: this step is to
  // show what they take undisturbed; the next one for the same number will not be 0.
  int32_t Chunk(int32_t decoding);

  // A step of `decoding` running sequences and `prompt_tokens` took `seconds`.
  void Observe(int32_t decoding, int32_t prompt_tokens, double seconds);

 private:
  struct Undisturbed {
    double seconds = 0;
    uint64_t at = 0;  // step of the last measurement; 0: none
  };

  const double slowdown_;
  const int32_t max_chunk_;
  std::vector<Undisturbed> undisturbed_;  // [number of running sequences]
  double seconds_per_prompt_token_ = 0;   // beside running sequences; 0: not known
  uint64_t step_ = 0;
};

}  // namespace tandem::attention
