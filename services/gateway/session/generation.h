// What a front end (REST, gRPC) asks for and gets, in terms of neither.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace tandem::gateway {

struct Sampling {
  float temperature = 1;  // 0: greedy
  float top_p = 1;        // (0, 1]
  uint32_t top_k = 0;     // 0: off
  float min_p = 0;        // [0, 1)
  uint64_t seed = 0;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;
  std::map<int32_t, float> logit_bias;
};

// One sequence to generate.
struct GenerationSpec {
  std::string request_id;  // for logs
  std::vector<int32_t> prompt_tokens;
  uint32_t max_new_tokens = 0;  // > 0, fits the context
  Sampling sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool logprobs = false;
  uint32_t top_logprobs = 0;
  bool split_reasoning = true;                // false: all text is content, tags included
  bool starts_in_reasoning = false;           // the prompt ends inside <think>
  absl::Time arrived = absl::InfinitePast();  // the request; InfinitePast: now
  absl::Time deadline = absl::InfiniteFuture();
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;  // natural
};

// One generated token, given to the listener together with the end of its text.
struct TokenInfo {
  int32_t token = 0;
  float logprob = 0;
  std::vector<TokenLogprob> top;
  bool reasoning = false;    // its text is not in the content: reasoning, its tags, white space behind them
  uint64_t text_offset = 0;  // code points of all visible text before it
};

struct Delta {
  std::string reasoning;
  std::string content;
  std::vector<TokenInfo> tokens;  // only if logprobs were asked for

  bool empty() const { return reasoning.empty() && content.empty() && tokens.empty(); }
};

enum class Finish { kStop, kLength };

struct GenerationResult {
  absl::Status status;  // OK: `finish` says why it ended
  Finish finish = Finish::kStop;
  uint32_t prompt_tokens = 0;
  uint32_t cached_prompt_tokens = 0;
  uint32_t completion_tokens = 0;  // the end token included
  uint32_t reasoning_tokens = 0;   // of those
  int resumes = 0;                 // how often the engine was lost and the sequence went on
  double queue_seconds = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

// Calls come one at a time, from any thread, and must neither block nor call the session.
class GenerationListener {
 public:
  virtual ~GenerationListener() = default;
  // False: nobody wants the rest; the session ends as cancelled.
  virtual bool OnDelta(Delta delta) = 0;
  // Exactly once, last.
  virtual void OnDone(const GenerationResult& result) = 0;
};

}  // namespace tandem::gateway
