#include "services/expert_cpu/moe/choose_reading.h"

#include <algorithm>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"

namespace tandem::expert {
namespace {

constexpr double kWorthChanging = 0.95;

template <typename T>
std::span<const uint8_t> BytesOf(std::span<T> v) {
  return {reinterpret_cast<const uint8_t*>(v.data()), v.size() * sizeof(T)};
}

constexpr int64_t kFewTokens = 4;  // of the second call, if a call may have so many

// Calls that go through the shard's experts, of one token and of a few that share theirs.
class Calls {
 public:
  Calls(const Shard& shard, Moe& moe)
      : plan_(shard.plan()),
        moe_(moe),
        k_(std::min(plan_.num_experts_per_tok, plan_.experts())),
        few_(std::min(kFewTokens, moe.options().max_tokens)),
        ids_(static_cast<size_t>(few_ * k_)),
        weights_(ids_.size(), 1.0f / static_cast<float>(k_)),
        x_(static_cast<size_t>(few_ * plan_.hidden_size)),
        answer_(moe.AnswerBytes(few_, AnswerType::kF32)) {
    for (size_t i = 0; i < x_.size(); ++i) x_[i] = static_cast<float>(i % 17) / 8 - 1;
  }

  // Layers may have weights of different types and sizes: ways are compared on the same one.
  void NextLayer() { layer_ = (layer_ + 1) % plan_.layers.size(); }

  int64_t few() const { return few_; }

  // Seconds, each time with other experts.
  absl::StatusOr<double> Time(int64_t tokens) {
    for (int64_t i = 0; i < k_; ++i) {
      for (int64_t t = 0; t < tokens; ++t) {
        ids_[static_cast<size_t>(t * k_ + i)] = static_cast<int32_t>(plan_.expert_begin + expert_);
      }
      expert_ = (expert_ + 1) % plan_.experts();
    }
    const auto pairs = static_cast<size_t>(tokens * k_);
    Call call;
    call.layer = plan_.layers[layer_];
    call.n_tokens = tokens;
    call.experts_per_token = k_;
    call.expert_ids = BytesOf(std::span(ids_).first(pairs));
    call.expert_weights = BytesOf(std::span(weights_).first(pairs));
    call.activations = BytesOf(std::span(x_).first(static_cast<size_t>(tokens * plan_.hidden_size)));
    TANDEM_ASSIGN_OR_RETURN(
        const CallStatistics statistics,
        moe_.Forward(call, std::span(answer_).first(moe_.AnswerBytes(tokens, AnswerType::kF32))));
    if (statistics.distinct_experts != k_) {
      return absl::InternalError(
          absl::StrCat("a trial call met ", statistics.distinct_experts, " experts instead of ", k_));
    }
    return 1e-9 * static_cast<double>(statistics.nanoseconds);
  }

 private:
  const ShardPlan& plan_;
  Moe& moe_;
  const int64_t k_, few_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_, x_;
  std::vector<uint8_t> answer_;
  size_t layer_ = 0;
  int64_t expert_ = 0;
};

double Median(std::vector<double> v) {
  const auto middle = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2);
  std::nth_element(v.begin(), middle, v.end());
  return *middle;
}

}  // namespace

absl::StatusOr<std::vector<TriedReading>> TryReadings(
    kernels::ReadingWay first, int rounds, absl::Duration most,
    const std::function<absl::StatusOr<double>(kernels::ReadingWay)>& time) {
  std::vector<kernels::ReadingWay> ways(kernels::kReadingWays.begin(), kernels::kReadingWays.end());
  std::stable_partition(ways.begin(), ways.end(), [&](kernels::ReadingWay way) { return way == first; });
  std::vector<std::vector<double>> seconds(ways.size());
  const absl::Time deadline = absl::Now() + most;
  for (int round = 0; round < std::max(rounds, 1) && (round == 0 || absl::Now() < deadline); ++round) {
    for (size_t i = 0; i < ways.size(); ++i) {
      TANDEM_ASSIGN_OR_RETURN(const double one, time(ways[i]));
      seconds[i].push_back(one);
    }
  }
  std::vector<TriedReading> tried;
  for (size_t i = 0; i < ways.size(); ++i) {
    std::vector<double> ratios;
    for (size_t r = 0; r < seconds[i].size(); ++r) ratios.push_back(seconds[i][r] / seconds[0][r]);
    tried.push_back({ways[i], Median(seconds[i]), Median(std::move(ratios))});
  }
  const auto faster = [](const TriedReading& a, const TriedReading& b) { return a.ratio < b.ratio; };
  std::stable_sort(tried.begin(), tried.end(), faster);
  if (tried.front().ratio > kWorthChanging) {
    std::stable_partition(tried.begin(), tried.end(), [&](const TriedReading& t) { return t.way == first; });
  }
  return tried;
}

absl::StatusOr<std::string> ChooseReading(const Shard& shard, Moe& moe, const ChooseReadingOptions& options) {
  const kernels::ReadingWay usual = kernels::DefaultReadingWay();
  kernels::SetReadingWay(usual);
  if (shard.resident_bytes() < options.least_bytes || moe.options().precision != kernels::Precision::kFast) {
    return absl::StrCat(std::string(kernels::ReadingWayName(usual)), ", as is usual on such processors");
  }
  Calls calls(shard, moe);
  TANDEM_RETURN_IF_ERROR(calls.Time(1).status());  // the first finds threads asleep
  const auto time = [&](kernels::ReadingWay way) -> absl::StatusOr<double> {
    if (way == usual) calls.NextLayer();
    kernels::SetReadingWay(way);
    TANDEM_ASSIGN_OR_RETURN(const double one, calls.Time(1));
    TANDEM_ASSIGN_OR_RETURN(const double few, calls.Time(calls.few()));
    return one + few;
  };
  const auto tried = TryReadings(usual, options.rounds, options.most, time);
  kernels::SetReadingWay(tried.ok() ? tried->front().way : usual);
  TANDEM_RETURN_IF_ERROR(tried.status());
  std::string out;
  for (size_t i = 0; i < tried->size(); ++i) {
    const TriedReading& t = (*tried)[i];
    absl::StrAppendFormat(&out, "%s%s %s%.2f%s", i > 1 ? ", " : "", kernels::ReadingWayName(t.way),
                          i == 0 ? "(" : "", 1e3 * t.seconds, i == 0 ? " ms; " : "");
  }
  return absl::StrCat(out, ")");
}

}  // namespace tandem::expert
