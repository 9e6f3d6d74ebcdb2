// When the routed experts are streamed to the GPU, and with what: maps the experts' weights, measures from
// how many tokens on it pays, and lets go of the weights when a process is lost.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/streamed_experts.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/stream_break_even.h"

namespace tandem::attention::cuda {

// Not thread-safe.
class StreamedPrefill {
 public:
  struct Options {
    StreamPrefill when;
    StreamOptions stream;
    int64_t call_tokens = 0;  // of a step whose tokens go to the processes instead
  };
  // `group` must outlive this.
  StreamedPrefill(const model::ModelConfig& config, ExpertGroup& group, const Options& options)
      : c_(config), group_(group), options_(options) {}

  // For the current device. Where streaming cannot be had or never pays, the log says why and there is none.
  // The first time (--stream-prefill auto) copies and calls are measured.
  void Open();
  // Unmaps the weights. Idempotent.
  void Close() { experts_.reset(); }

  // Steps of so many tokens are better streamed; 0: none.
  int64_t from_tokens() const { return experts_ != nullptr ? from_tokens_ : 0; }
  // For a step: its first experts begin to come. Null where there is no streaming.
  absl::StatusOr<RoutedExperts*> Begin();

 private:
  absl::Status TryOpen();
  absl::Status Measure();

  const model::ModelConfig c_;
  ExpertGroup& group_;
  const Options options_;
  std::unique_ptr<StreamedExperts> experts_;
  int64_t from_tokens_ = 0;  // 0: not known yet
};

}  // namespace tandem::attention::cuda
