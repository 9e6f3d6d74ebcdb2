#include "services/expert_cpu/moe/moe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/threading/claims.h"
#include "services/expert_cpu/moe/answer.h"
#include "services/expert_cpu/moe/bulk_experts.h"
#include "services/expert_cpu/moe/exact_experts.h"
#include "services/expert_cpu/moe/grouping.h"

namespace tandem::expert {
namespace {

// From so many tokens on, what is done for each token is shared out too.
constexpr int64_t kManyTokens = 8;

absl::Status Check(bool good, const std::string& message) {
  return good ? absl::OkStatus() : absl::InvalidArgumentError(message);
}

absl::Status CheckBytes(const char* what, uint64_t have, int64_t tokens, int64_t values,
                        int64_t value_bytes) {
  const auto want = CheckedMul<uint64_t>(static_cast<uint64_t>(tokens) * static_cast<uint64_t>(value_bytes),
                                         static_cast<uint64_t>(values));
  return Check(want.has_value() && have == *want,
               absl::StrCat(what, " has ", have, " bytes; ", tokens, " tokens of ", values, " values of ",
                            value_bytes, " bytes are announced"));
}

}  // namespace

struct Moe::Impl {
  Impl(const Shard& s, threading::ThreadPool& p, const Options& o)
      : shard(s),
        pool(p),
        options(o),
        claims(p.threads()),
        exact_experts(p, claims, o.precision),
        bulk_experts(p, claims) {}

  const Shard& shard;
  threading::ThreadPool& pool;
  const Options options;

  std::mutex mutex;  // one call at a time; everything below belongs to it
  std::vector<int32_t> ids;
  std::vector<float> id_weights;
  Grouping grouping;
  std::vector<double> sum;  // of a bulk call, [n_tokens, hidden]
  threading::Claims claims;
  ExactExperts exact_experts;
  BulkExperts bulk_experts;

  absl::Status Validate(const Call& call, const ShardLayer* layer, uint64_t answer_bytes) const;
  template <typename Fn>
  void ForTokens(int64_t n, const Fn& fn);
  void ReadExperts(const Call& call);
  void ForwardInBulk(const Call& call, const ShardLayer& layer, const AnswerTo& answer);
};

absl::Status Moe::Impl::Validate(const Call& call, const ShardLayer* layer, uint64_t answer_bytes) const {
  const ShardPlan& plan = shard.plan();
  if (layer == nullptr) {
    return absl::NotFoundError(absl::StrCat("layer ", call.layer, " is not held here; MoE layers are ",
                                            plan.layers.front(), " to ", plan.layers.back()));
  }
  TANDEM_RETURN_IF_ERROR(
      Check(call.n_tokens >= 1 && call.n_tokens <= options.max_tokens,
            absl::StrCat(call.n_tokens, " tokens; from 1 to ", options.max_tokens, " can be in a call")));
  const int64_t k = call.experts_per_token;
  TANDEM_RETURN_IF_ERROR(Check(k >= 1 && k <= plan.n_routed_experts,
                               absl::StrCat(k, " experts per token; the model has ", plan.n_routed_experts)));
  TANDEM_RETURN_IF_ERROR(CheckBytes("expert_ids", call.expert_ids.size(), call.n_tokens, k, 4));
  TANDEM_RETURN_IF_ERROR(CheckBytes("expert_weights", call.expert_weights.size(), call.n_tokens, k, 4));
  const int64_t value_bytes = call.activation_type == ActivationType::kF32 ? 4 : 2;
  TANDEM_RETURN_IF_ERROR(
      CheckBytes("activations", call.activations.size(), call.n_tokens, plan.hidden_size, value_bytes));
  return CheckBytes("the answer", answer_bytes, call.n_tokens, plan.hidden_size,
                    call.answer_type == AnswerType::kF32 ? 4 : 8);
}

// fn(begin, end) over ranges of tokens.
template <typename Fn>
void Moe::Impl::ForTokens(int64_t n, const Fn& fn) {
  if (n < kManyTokens) return fn(0, n);
  pool.ParallelFor(n, 4, [&](int64_t begin, int64_t end, int) { fn(begin, end); });
}

// Copies what the peer gave, so that what was checked is what is used.
void Moe::Impl::ReadExperts(const Call& call) {
  ids.resize(static_cast<size_t>(call.n_tokens * call.experts_per_token));
  std::memcpy(ids.data(), call.expert_ids.data(), call.expert_ids.size());
  id_weights.resize(ids.size());
  std::memcpy(id_weights.data(), call.expert_weights.data(), call.expert_weights.size());
}

void Moe::Impl::ForwardInBulk(const Call& call, const ShardLayer& layer, const AnswerTo& answer) {
  const int64_t hidden = shard.plan().hidden_size;
  const auto values = static_cast<size_t>(call.n_tokens * hidden);
  if (sum.size() < values) sum.resize(values);
  ForTokens(call.n_tokens, [&](int64_t begin, int64_t end) {
    std::fill(sum.begin() + begin * hidden, sum.begin() + end * hidden, 0.0);
  });
  bulk_experts.Forward(layer, grouping, call.n_tokens, call.activations,
                       call.activation_type == ActivationType::kBf16, sum.data());
  ForTokens(call.n_tokens, [&](int64_t begin, int64_t end) {
    answer.Write(sum.data() + begin * hidden, begin * hidden, (end - begin) * hidden);
  });
}

Moe::Moe(const Shard& shard, threading::ThreadPool& pool, const Options& options)
    : impl_(std::make_unique<Impl>(shard, pool, options)) {}
Moe::~Moe() = default;

const Moe::Options& Moe::options() const { return impl_->options; }

uint64_t Moe::AnswerBytes(int64_t n_tokens, AnswerType type) const {
  return static_cast<uint64_t>(n_tokens) * static_cast<uint64_t>(impl_->shard.plan().hidden_size) *
         (type == AnswerType::kF32 ? sizeof(float) : sizeof(double));
}

absl::StatusOr<CallStatistics> Moe::Forward(const Call& call, std::span<uint8_t> answer) {
  Impl& m = *impl_;
  const std::lock_guard lock(m.mutex);
  const auto start = std::chrono::steady_clock::now();
  const ShardPlan& plan = m.shard.plan();
  const ShardLayer* layer = m.shard.FindLayer(call.layer);
  TANDEM_RETURN_IF_ERROR(m.Validate(call, layer, answer.size()));
  m.ReadExperts(call);
  const int64_t k = call.experts_per_token;
  for (size_t i = 0; i < m.ids.size(); ++i) {
    if (m.ids[i] < -1 || m.ids[i] >= plan.n_routed_experts) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", static_cast<int64_t>(i) / k, ", expert ", static_cast<int64_t>(i) % k,
                       " of its ", k, ": id ", m.ids[i], " is outside [-1, ", plan.n_routed_experts, ")"));
    }
  }
  m.grouping.Build(m.ids, m.id_weights, k, plan.expert_begin, plan.expert_end);
  const AnswerTo to{answer.data(), call.answer_type};
  if (call.bulk && m.options.precision == kernels::Precision::kFast && BulkExperts::Serves(*layer)) {
    m.ForwardInBulk(call, *layer, to);
  } else {
    m.exact_experts.Forward(*layer, m.grouping, call.n_tokens, call.activations,
                            call.activation_type == ActivationType::kBf16, to);
  }

  CallStatistics statistics;
  statistics.distinct_experts = static_cast<int64_t>(m.grouping.groups().size());
  statistics.weight_bytes_read =
      static_cast<uint64_t>(statistics.distinct_experts) * layer->expert_weight_bytes;
  statistics.nanoseconds =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  return statistics;
}

}  // namespace tandem::expert
