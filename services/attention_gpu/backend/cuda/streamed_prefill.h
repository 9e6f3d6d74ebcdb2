// When the routed experts are streamed to the GPU, and with what: maps the experts' weights, measures from
// how many tokens on it pays and what the processes can do meanwhile, and lets go of the weights when a
// process is lost.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/bell.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/streamed_experts.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/stream_break_even.h"
#include "services/attention_gpu/experts/stream_share.h"

namespace tandem::attention::cuda {

// Not thread-safe, but for Begin, End and what is said of other steps.
class StreamedPrefill {
 public:
  struct Options {
    StreamPrefill when;
    StreamShare share;
    StreamOptions stream;
    int64_t call_tokens = 0;       // of a step whose tokens go to the processes instead
    std::optional<BellKind> bell;  // how the GPU calls processes; none: it does not, and nothing is shared
    int device = 0;
    // Seconds of a step of so many tokens, up to rest_most, in which nobody computes the routed experts. Is
    // called by the first Open.
    std::function<absl::StatusOr<double>(int64_t tokens)> time_rest;
    int64_t rest_most = 0;
    // Device memory for made-up layers, [stream.max_tokens, hidden] or k; free during Open.
    float *normed = nullptr, *x = nullptr, *weights = nullptr;
    int32_t* ids = nullptr;
  };
  // `group` must outlive this.
  StreamedPrefill(const model::ModelConfig& config, ExpertGroup& group, const Options& options)
      : c_(config), group_(group), options_(options) {}

  // For the current device. Where streaming cannot be had or never pays, the log says why and there is none.
  // The first time copies and calls are measured, as far as the options leave it to that.
  void Open();
  // Unmaps the weights. Idempotent.
  void Close() { experts_.reset(); }
  bool open() const { return experts_ != nullptr; }

  // Steps of so many tokens are better streamed, while others decode beside it or not; 0: none.
  int64_t from_tokens(bool beside) const;
  // A step's tokens at most, where its first prompt has so many left.
  int64_t step_tokens(int64_t prompt_tokens, bool beside) const;
  // For a step: its first experts begin to come. Null where there is no streaming.
  absl::StatusOr<RoutedExperts*> Begin();
  // When its layers are done, however they went. Unavailable: a process was lost that had a part in it.
  absl::Status End();

  // A step of others runs, or has come to its end. While there are such, the processes are theirs:
  // --stream-share auto gives them nothing. Any thread.
  void OthersBegin() {
    ++others_begun_;
    ++others_;
  }
  void OthersEnd() { --others_; }

 private:
  absl::Status TryOpen();
  absl::Status OpenShare();
  absl::Status Measure();
  absl::Status MeasureShare(double rate);
  absl::Status MeasureRest(ShareCosts* costs) const;
  // What an expert of a layer of so many tokens takes either side, when both are about as long at work.
  struct Balance {
    double stream_expert = 0, call_expert = 0;  // seconds
    double pairs = 0;                           // tokens of an expert that the processes computed
    double call = 0;                            // seconds of a call beside the processes' own
  };
  absl::StatusOr<Balance> MeasureBalance(int64_t tokens, double stream_expert);
  std::vector<bool> Choose(int64_t tokens, std::span<const int32_t> counts, const std::vector<bool>& ahead);
  bool Undisturbed();

  const model::ModelConfig c_;
  ExpertGroup& group_;
  const Options options_;
  std::unique_ptr<StreamedExperts> experts_;
  bool measured_ = false;
  int64_t from_alone_ = 0, from_beside_ = 0;  // once measured_
  std::optional<ShareCosts> costs_;           // none: not known
  ShareShape shape_;                          // with costs_
  std::optional<ShareCosts> trial_;           // while the costs are measured
  std::atomic<int64_t> others_{0}, others_begun_{0};
  int64_t others_seen_ = 0;  // of others_begun_, at the layer before
  int64_t tokens_ = 0;       // of the last layer
  double expected_ = 0;      // of the step so far: what the shared experts should have taken
};

}  // namespace tandem::attention::cuda
