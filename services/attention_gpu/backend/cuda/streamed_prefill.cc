#include "services/attention_gpu/backend/cuda/streamed_prefill.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"
#include "common/telemetry/log.h"
#include "services/attention_gpu/backend/cuda/device.h"

namespace tandem::attention::cuda {
namespace {

constexpr uint64_t kMeasuredBytes = uint64_t{512} << 20;
// Made-up layers of a kind, of which the last ones count.
constexpr int kTrials = 6, kCounted = 3;
constexpr int kFirstPercent = 40;  // shared in the first one
constexpr int64_t kFewTokens = 128, kSomeTokens = 512;
constexpr int kSmallNumber = 0x3c;  // 0.0115 in each float of such bytes

}  // namespace

void StreamedPrefill::Open() {
  Close();
  if (options_.when.mode == StreamPrefill::Mode::kOff) return;
  const absl::Status status = TryOpen();
  if (status.ok()) return;
  Close();
  const std::string why(status.message());
  if (options_.when.mode == StreamPrefill::Mode::kAuto) {
    spdlog::info("prompts are not streamed: {}", why);
  } else {
    spdlog::warn("--stream-prefill: prompts are not streamed: {}", why);
  }
}

absl::Status StreamedPrefill::TryOpen() {
  TANDEM_ASSIGN_OR_RETURN(auto maps, group_.MapWeights());
  TANDEM_ASSIGN_OR_RETURN(experts_, StreamedExperts::Create(std::move(maps), c_, options_.stream));
  spdlog::info("experts can be streamed: {}", experts_->Description());
  if (options_.share.mode != StreamShare::Mode::kOff) {
    const absl::Status shared = OpenShare();
    if (!shared.ok()) {
      spdlog::info("the processes compute nothing of streamed prompts: {}", std::string(shared.message()));
    }
  }
  if (!measured_) TANDEM_RETURN_IF_ERROR(Measure());
  measured_ = true;
  const int64_t alone = from_tokens(false), beside = from_tokens(true);
  if (alone == 0) return absl::FailedPreconditionError("it would pay from more tokens on than a step takes");
  spdlog::info("prompts of {} tokens and more are streamed{}", alone,
               alone == beside ? std::string()
                               : absl::StrCat(", while others decode ",
                                              beside == 0 ? "none" : absl::StrCat("those of ", beside)));
  return absl::OkStatus();
}

absl::Status StreamedPrefill::OpenShare() {
  if (!options_.bell) return absl::UnimplementedError("the GPU does not call them by itself");
  TANDEM_ASSIGN_OR_RETURN(auto calls,
                          SharedCalls::Open(c_, group_, *options_.bell, options_.device,
                                            std::min(options_.stream.max_tokens, kMostSharedTokens)));
  experts_->Share(std::move(calls),
                  [this](int64_t tokens, std::span<const int32_t> counts, const std::vector<bool>& ahead) {
                    return Choose(tokens, counts, ahead);
                  });
  return absl::OkStatus();
}

absl::Status StreamedPrefill::Measure() {
  const bool automatic = options_.when.mode == StreamPrefill::Mode::kAuto;
  const bool share = options_.share.mode == StreamShare::Mode::kAuto && experts_->shared_calls() != nullptr;
  from_alone_ = from_beside_ = options_.when.from_tokens;
  if (!automatic && !share) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const double rate, experts_->MeasureCopy(kMeasuredBytes));
  double call = 0;
  if (automatic) {
    const double layer = static_cast<double>(experts_->LayerBytes(c_.first_k_dense_replace)) / rate;
    TANDEM_ASSIGN_OR_RETURN(call, TimeExpertCall(group_, c_, options_.call_tokens));
    spdlog::info("weights come at {:.1f} GB/s, {:.2f} ms a layer; the processes take {:.2f} ms for {} tokens",
                 rate / 1e9, layer * 1e3, call * 1e3, options_.call_tokens);
    from_alone_ = from_beside_ = BreakEvenTokens(layer, call, options_.call_tokens);
  }
  if (!share) return absl::OkStatus();
  shape_.experts = c_.n_routed_experts;
  shape_.experts_per_token = c_.num_experts_per_tok;
  shape_.ahead = experts_->experts_ahead();
  shape_.call_tokens = options_.call_tokens;
  shape_.most_tokens = std::min(options_.stream.max_tokens, experts_->shared_calls()->max_tokens());
  const absl::Status shared = MeasureShare(rate);
  trial_.reset();
  if (!shared.ok()) {
    spdlog::warn("the processes compute nothing of streamed prompts: {}", std::string(shared.message()));
    experts_->Share(nullptr, nullptr);
    return absl::OkStatus();
  }
  if (automatic) {
    costs_->alone = std::min(call / SharedCallSeconds(*costs_, shape_, shape_.call_tokens), 1.0);
    from_alone_ = std::min(from_alone_, ShareBreakEven(*costs_, shape_));
  }
  return absl::OkStatus();
}

// Layers of made-up tokens with experts chosen evenly, shared by what the layers before have shown.
absl::StatusOr<StreamedPrefill::Balance> StreamedPrefill::MeasureBalance(int64_t tokens,
                                                                         double stream_expert) {
  const int64_t k = c_.num_experts_per_tok;
  const std::vector<int32_t> ids = RandomExperts(tokens, k, c_.n_routed_experts);
  cudaStream_t stream = nullptr;
  cudaEvent_t done = nullptr;
  absl::Status status = ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  // A thread that waits is not to take a processor from the experts.
  status.Update(
      ToStatus(cudaEventCreateWithFlags(&done, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
  RoutedCall call;
  call.n = tokens;
  call.normed = options_.normed;
  call.ids = options_.ids;
  call.weights = options_.weights;
  call.x = options_.x;
  const auto set = [&](cudaError_t error) { status.Update(ToStatus(error, "made-up layers")); };
  // Small numbers, since zeros may be faster than others.
  const size_t hidden_bytes = static_cast<size_t>(tokens * c_.hidden_size) * sizeof(float);
  if (status.ok()) {
    set(cudaMemsetAsync(options_.normed, kSmallNumber, hidden_bytes, stream));
    set(cudaMemsetAsync(options_.x, kSmallNumber, hidden_bytes, stream));
    set(cudaMemsetAsync(options_.weights, kSmallNumber, ids.size() * sizeof(float), stream));
    set(cudaMemcpyAsync(options_.ids, ids.data(), ids.size() * sizeof(int32_t), cudaMemcpyHostToDevice,
                        stream));
  }
  if (status.ok()) status = experts_->Begin();
  StreamedExperts::Totals before;
  Balance sum;
  int counted = 0;
  double slack = 0;  // of the bus, at the end of the layer before
  trial_.emplace().stream_expert = stream_expert;
  for (int i = 0; i < kTrials && status.ok(); ++i) {
    call.layer = c_.first_k_dense_replace + i % c_.num_moe_layers();
    status = experts_->Ask(call, stream);
    if (status.ok()) status = experts_->Add(call, stream);
    set(cudaEventRecord(done, stream));
    set(cudaEventSynchronize(done));
    const absl::StatusOr<StreamedExperts::Totals> all = experts_->End();
    status.Update(all.status());
    if (!status.ok()) break;
    const StreamedExperts::Totals t = all->Since(before);
    before = *all;
    if (t.shared == 0) break;  // the processes are of no use here
    const auto shared = static_cast<double>(t.shared);
    const auto streamed = static_cast<double>(t.used - t.shared);
    const auto ahead = static_cast<double>(std::min(experts_->experts_ahead(), t.used - t.shared));
    Balance b;
    // What came before the layer began does not show in its time.
    b.stream_expert = (t.worked + slack) / std::max(streamed, 1.0);
    if (slack > ahead * b.stream_expert) b.stream_expert = t.worked / std::max(streamed - ahead, 1.0);
    b.call_expert = t.processes / shared;
    b.pairs = static_cast<double>(t.shared_pairs) / shared;
    b.call = std::max(t.worked + t.waited - t.processes, 0.0);
    slack = t.waited;
    trial_->stream_expert = b.stream_expert;
    trial_->call_experts = {{0, b.call_expert}, {1, b.call_expert}};  // whatever it has
    if (i < kTrials - kCounted && i > 0) continue;
    if (i == kTrials - kCounted) sum = Balance(), counted = 0;
    sum.stream_expert += b.stream_expert;
    sum.call_expert += b.call_expert;
    sum.pairs += b.pairs;
    sum.call = counted == 0 ? b.call : std::min(sum.call, b.call);  // most of it may be waiting the other way
    ++counted;
  }
  if (done != nullptr) cudaEventDestroy(done);
  if (stream != nullptr) cudaStreamDestroy(stream);
  TANDEM_RETURN_IF_ERROR(status);
  if (counted == 0) return absl::InternalError("no made-up layer was shared");
  sum.stream_expert /= counted;
  sum.call_expert /= counted;
  sum.pairs /= counted;
  return sum;
}

absl::Status StreamedPrefill::MeasureRest(ShareCosts* c) const {
  const int64_t least = std::min(options_.call_tokens, options_.rest_most);
  TANDEM_ASSIGN_OR_RETURN(const double small, options_.time_rest(least));
  TANDEM_ASSIGN_OR_RETURN(const double large, options_.time_rest(options_.rest_most));
  const auto layers = static_cast<double>(c_.num_hidden_layers);
  if (options_.rest_most > least) {
    c->rest_token = std::max((large - small) / layers / static_cast<double>(options_.rest_most - least), 0.0);
  }
  c->rest = std::max(small / layers - c->rest_token * static_cast<double>(least), 0.0);
  return absl::OkStatus();
}

absl::Status StreamedPrefill::MeasureShare(double rate) {
  const double alone = static_cast<double>(experts_->LayerBytes(c_.first_k_dense_replace)) /
                       static_cast<double>(c_.n_routed_experts) / rate;
  const int64_t most = std::min(options_.stream.max_tokens, experts_->shared_calls()->max_tokens());
  // Where the GPU was the later one all the time, its time is in Balance::call: not more than the way there
  // and back can take.
  constexpr double kMostWays = 3;
  const int processes = group_.processes();
  const size_t answer = processes > 1 ? sizeof(double) : sizeof(float);
  const double ways =
      static_cast<double>(c_.hidden_size * processes) * static_cast<double>(sizeof(uint16_t) + answer) / rate;
  ShareCosts c;
  c.call_token = kMostWays * ways;
  TANDEM_RETURN_IF_ERROR(MeasureRest(&c));
  std::string seen;
  int64_t before = 0;
  for (const int64_t wanted : {kFewTokens, kSomeTokens, most}) {
    const int64_t tokens = std::min(wanted, most);
    if (tokens <= before) continue;
    before = tokens;
    TANDEM_ASSIGN_OR_RETURN(const Balance b,
                            MeasureBalance(tokens, c.stream_expert > 0 ? c.stream_expert : alone));
    c.stream_expert = b.stream_expert;
    c.call_token = std::min(c.call_token, b.call / static_cast<double>(tokens));
    absl::StrAppend(&seen, seen.empty() ? "" : ", ",
                    absl::StrFormat("%d tokens a layer %.0f, %.0f (%.1f tokens)", tokens,
                                    b.stream_expert * 1e6, b.call_expert * 1e6, b.pairs));
    if (c.call_experts.empty() || b.pairs > c.call_experts.back().tokens) {
      const double least = c.call_experts.empty() ? 0 : c.call_experts.back().seconds;
      c.call_experts.push_back({b.pairs, std::max(b.call_expert, least)});
    }
  }
  costs_ = c;
  spdlog::info(
      "microseconds of an expert on its way (alone {:.0f}) and in the processes, both at once: {}; {:.2f} "
      "for a "
      "token of a call; all else of a layer {:.0f} and {:.2f} a token",
      alone * 1e6, seen, c.call_token * 1e6, c.rest * 1e6, c.rest_token * 1e6);
  return absl::OkStatus();
}

int64_t StreamedPrefill::from_tokens(bool beside) const {
  const int64_t from = beside ? from_beside_ : from_alone_;
  return experts_ != nullptr && from <= options_.stream.max_tokens ? from : 0;
}

int64_t StreamedPrefill::step_tokens(int64_t prompt_tokens, bool beside) const {
  const int64_t most = options_.stream.max_tokens;
  if (experts_ == nullptr || experts_->shared_calls() == nullptr || !costs_ || beside) return most;
  return ShareStepTokens(*costs_, shape_, prompt_tokens, most);
}

// Whether no other step has run since the layer before.
bool StreamedPrefill::Undisturbed() {
  const int64_t begun = others_begun_;
  return others_ == 0 && std::exchange(others_seen_, begun) == begun;
}

std::vector<bool> StreamedPrefill::Choose(int64_t tokens, std::span<const int32_t> counts,
                                          const std::vector<bool>& ahead) {
  tokens_ = tokens;
  if (trial_) {
    return trial_->call_experts.empty() ? ChoosePercent(kFirstPercent, counts, ahead)
                                        : ChooseShared(*trial_, tokens, counts, ahead);
  }
  if (options_.share.mode == StreamShare::Mode::kPercent) {
    return ChoosePercent(options_.share.percent, counts, ahead);
  }
  if (!costs_ || !Undisturbed()) return std::vector<bool>(counts.size());
  std::vector<bool> shared = ChooseShared(*costs_, tokens, counts, ahead);
  expected_ += CallExpertsSeconds(*costs_, counts, shared);
  return shared;
}

absl::StatusOr<RoutedExperts*> StreamedPrefill::Begin() {
  if (experts_ == nullptr) return nullptr;
  others_seen_ = others_begun_;
  tokens_ = 0;
  expected_ = 0;
  TANDEM_RETURN_IF_ERROR(experts_->Begin());
  return experts_.get();
}

absl::Status StreamedPrefill::End() {
  if (experts_ == nullptr) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const StreamedExperts::Totals t, experts_->End());
  if (t.shared == 0) return absl::OkStatus();
  const auto layers = static_cast<double>(t.layers);
  spdlog::info(
      "a streamed step of {} tokens: of {:.1f} experts a layer the processes computed {:.1f} in {:.2f} ms "
      "({:.2f} "
      "expected), the GPU the others in {:.2f}; then it waited {:.2f} ms for them",
      tokens_, static_cast<double>(t.used) / layers, static_cast<double>(t.shared) / layers,
      1e3 * t.processes / layers, 1e3 * expected_ / layers, 1e3 * t.worked / layers, 1e3 * t.waited / layers);
  if (costs_) LearnCallFactor(expected_, t.processes, &*costs_);
  return absl::OkStatus();
}

}  // namespace tandem::attention::cuda
