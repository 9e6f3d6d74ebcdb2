#include "services/expert_cpu/moe/moe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/model/expert_sum.h"
#include "common/quant/quant.h"
#include "common/threading/claims.h"
#include "services/expert_cpu/moe/bulk_experts.h"
#include "services/expert_cpu/moe/grouping.h"

namespace tandem::expert {
namespace {

// Rows in a unit of work: few, so that all cores end together, and whole passes of the kernels. What a unit
// reads first is asked for while the unit before it is worked on, so that small ones cost nothing.
int64_t UnitRows(int64_t rows, int64_t most_tokens, int64_t least) {
  return std::min(rows, std::max(least, kernels::PassRows(most_tokens)));
}
// Ranges of `each` rows that cover `rows`.
class RowUnits {
 public:
  RowUnits(int64_t rows, int64_t each) : rows_(rows), each_(each) {}
  int64_t count() const { return (rows_ + each_ - 1) / each_; }
  int64_t begin(int64_t unit) const { return unit * each_; }
  int64_t end(int64_t unit) const { return std::min(rows_, begin(unit) + each_); }

 private:
  int64_t rows_;
  int64_t each_;
};
// Microseconds: more than a GPU needs from one call to the next, and from a step's last to the next step's
// first.
constexpr int64_t kSpinBetweenCalls = 5000;
// An expert's h is there.
constexpr int64_t kComplete = -1;
// From so many tokens on, what is done for each token is shared out too.
constexpr int64_t kManyTokens = 8;
// From so many tokens of an expert on, tiles want them to lie together.
constexpr int64_t kGatheredPairs = 16;
// Pairs that are between gate/up and down at once: bounds the buffers of large calls. No expert is split.
constexpr int64_t kWavePairs = 4096;

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

// A wave: consecutive groups, gate/up and then down.
struct Wave {
  size_t begin = 0;  // groups [begin, end)
  size_t end = 0;
  int64_t first_pair = 0;
  int64_t pairs = 0;
};

std::vector<Wave> MakeWaves(const std::vector<ExpertGroup>& groups) {
  std::vector<Wave> waves;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (waves.empty() || waves.back().pairs + groups[g].pairs > kWavePairs) {
      waves.push_back({g, g, groups[g].first_pair, 0});
    }
    waves.back().end = g + 1;
    waves.back().pairs += groups[g].pairs;
  }
  return waves;
}

template <typename T>
void Grow(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
}

}  // namespace

struct Moe::Impl {
  Impl(const Shard& s, threading::ThreadPool& p, const Options& o)
      : shard(s),
        pool(p),
        options(o),
        gather(o.precision == kernels::Precision::kFast && kernels::ActiveIsa() == kernels::Isa::kAmx),
        claims(p.threads()),
        down_claims(p.threads()),
        bulk_experts(p, claims) {}

  const Shard& shard;
  threading::ThreadPool& pool;
  const Options options;
  const bool gather;  // activations of an expert's tokens are copied together

  std::mutex mutex;  // one call at a time; everything below belongs to it
  std::vector<int32_t> ids;
  std::vector<float> id_weights;
  std::vector<float> x;  // [n_tokens, hidden]
  kernels::Activations x_activations;
  Grouping grouping;
  std::vector<int32_t> counting;  // 0, 1, 2, ...
  std::vector<float> gate;        // [pairs of the wave, rows of the slice]; then SiLU(gate) * up
  std::vector<float> up;
  std::vector<kernels::Activations> gathered;    // by group of the wave, where it has many tokens
  std::vector<kernels::Activations> h;           // by group of the wave
  std::vector<std::atomic<int64_t>> units_left;  // of gate and up, by group of the wave; at last kComplete
  std::vector<double> sum;                       // [n_tokens, hidden]
  threading::Claims claims;
  threading::Claims down_claims;
  BulkExperts bulk_experts;

  absl::Status Validate(const Call& call, const ShardLayer* layer, uint64_t answer_bytes) const;
  template <typename Fn>
  void ForTokens(int64_t n, const Fn& fn);
  void ReadExperts(const Call& call);
  void ForwardInBulk(const Call& call, const ShardLayer& layer);
  void ForwardExactly(const Call& call, const ShardLayer& layer);
  void ReadActivations(const Call& call, const ShardLayer& layer);
  void Gather(const Wave& wave);
  void Products(const ShardLayer& layer, const Wave& wave);
  void GateUp(const ShardLayer& layer, const Wave& wave, const RowUnits& units, const RowUnits& down_units,
              int worker);
  void Down(const ShardLayer& layer, const Wave& wave, const RowUnits& units, int worker);
  void WriteAnswer(const Call& call, std::span<uint8_t> answer);
  std::span<const int32_t> FirstNumbers(int64_t n) const { return {counting.data(), static_cast<size_t>(n)}; }
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

void Moe::Impl::ForwardInBulk(const Call& call, const ShardLayer& layer) {
  const int64_t hidden = shard.plan().hidden_size;
  Grow(sum, call.n_tokens * hidden);
  ForTokens(call.n_tokens, [&](int64_t begin, int64_t end) {
    std::fill(sum.begin() + begin * hidden, sum.begin() + end * hidden, 0.0);
  });
  bulk_experts.Forward(layer, grouping, call.n_tokens, call.activations,
                       call.activation_type == ActivationType::kBf16, sum.data());
}

void Moe::Impl::ForwardExactly(const Call& call, const ShardLayer& layer) {
  ReadActivations(call, layer);
  for (int64_t i = static_cast<int64_t>(counting.size()); i < call.n_tokens * call.experts_per_token; ++i) {
    counting.push_back(static_cast<int32_t>(i));
  }
  for (const Wave& wave : MakeWaves(grouping.groups())) {
    Gather(wave);
    Products(layer, wave);
  }
}

void Moe::Impl::ReadActivations(const Call& call, const ShardLayer& layer) {
  const int64_t n = call.n_tokens, hidden = shard.plan().hidden_size;
  Grow(x, n * hidden);
  Grow(sum, n * hidden);
  x_activations.Assign(x.data(), n, hidden);
  const gguf::TensorType types[] = {layer.gate.type, layer.up.type};
  bool wanted[2];
  for (int i = 0; i < 2; ++i) wanted[i] = x_activations.Reserve(types[i], options.precision);
  ForTokens(n, [&](int64_t begin, int64_t end) {
    if (call.activation_type == ActivationType::kF32) {
      std::memcpy(x.data() + begin * hidden, call.activations.data() + 4 * begin * hidden,
                  static_cast<size_t>(4 * (end - begin) * hidden));
    } else {
      for (int64_t i = begin * hidden; i < end * hidden; ++i) {
        uint16_t half;
        std::memcpy(&half, call.activations.data() + 2 * i, 2);
        x[static_cast<size_t>(i)] = quant::Bf16ToFloat(half);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (wanted[i]) x_activations.PrepareTokens(types[i], begin, end);
    }
    std::fill(sum.begin() + begin * hidden, sum.begin() + end * hidden, 0.0);
  });
}

void Moe::Impl::Gather(const Wave& wave) {
  if (!gather || grouping.groups()[wave.begin].pairs < kGatheredPairs) return;
  const auto groups = static_cast<int64_t>(wave.end - wave.begin);
  if (static_cast<int64_t>(gathered.size()) < groups) gathered.resize(static_cast<size_t>(groups));
  pool.ParallelFor(groups, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) {
      const ExpertGroup& group = grouping.groups()[wave.begin + static_cast<size_t>(g)];
      if (group.pairs < kGatheredPairs) continue;
      gathered[static_cast<size_t>(g)].Gather(
          x_activations, {grouping.tokens().data() + group.first_pair, static_cast<size_t>(group.pairs)});
    }
  });
}

// Down begins without a step between: a worker that finds no unit of gate and up left goes on to those of
// down, and waits there only for an expert that is not complete yet.
void Moe::Impl::Products(const ShardLayer& layer, const Wave& wave) {
  const auto groups = static_cast<int64_t>(wave.end - wave.begin);
  const int64_t rows = shard.plan().rows(), most = grouping.groups()[wave.begin].pairs;
  const RowUnits up_units(rows, UnitRows(rows, most, 32));
  const RowUnits down_units(shard.plan().hidden_size, UnitRows(shard.plan().hidden_size, most, 16));
  Grow(gate, wave.pairs * rows);
  Grow(up, wave.pairs * rows);
  if (static_cast<int64_t>(h.size()) < groups) h.resize(static_cast<size_t>(groups));
  if (static_cast<int64_t>(units_left.size()) < groups) {
    units_left = std::vector<std::atomic<int64_t>>(static_cast<size_t>(groups));
  }
  for (int64_t g = 0; g < groups; ++g) units_left[static_cast<size_t>(g)].store(up_units.count());
  claims.Reset(groups * up_units.count());
  down_claims.Reset(down_units.count());
  pool.ParallelFor(pool.threads(), 1, [&](int64_t, int64_t, int worker) {
    GateUp(layer, wave, up_units, down_units, worker);
    Down(layer, wave, down_units, worker);
  });
}

// Units: (expert, range of rows). The unit that completes an expert quantizes its result for the next step.
void Moe::Impl::GateUp(const ShardLayer& layer, const Wave& wave, const RowUnits& units,
                       const RowUnits& down_units, int worker) {
  const int64_t rows = shard.plan().rows(), units_each = units.count();
  claims.Run(worker, [&](int64_t unit, bool asked, int64_t next_unit) {
    const auto g = static_cast<size_t>(unit / units_each);
    const int64_t row_begin = units.begin(unit % units_each), row_end = units.end(unit % units_each);
    const ExpertGroup& group = grouping.groups()[wave.begin + g];
    const bool together = gather && group.pairs >= kGatheredPairs;
    const kernels::Activations& in = together ? gathered[g] : x_activations;
    const std::span<const int32_t> tokens =
        together ? FirstNumbers(group.pairs)
                 : std::span(grouping.tokens().data() + group.first_pair, static_cast<size_t>(group.pairs));
    float* group_gate = gate.data() + (group.first_pair - wave.first_pair) * rows;
    float* group_up = up.data() + (group.first_pair - wave.first_pair) * rows;
    const kernels::Matrix gate_matrix = layer.gate.Expert(group.expert);
    const kernels::Matrix up_matrix = layer.up.Expert(group.expert);
    kernels::MatMulGather(gate_matrix, row_begin, row_end, in, tokens, group_gate, rows, options.precision,
                          {{&up_matrix, row_begin, row_end, group.pairs}, asked});
    kernels::Matrix next_matrix;
    kernels::Flow flow{{}, true};
    if (next_unit >= 0) {
      const ExpertGroup& next = grouping.groups()[wave.begin + static_cast<size_t>(next_unit / units_each)];
      next_matrix = layer.gate.Expert(next.expert);
      flow.next = {&next_matrix, units.begin(next_unit % units_each), rows, next.pairs};
    } else if (worker < down_units.count()) {
      const ExpertGroup& first = grouping.groups()[wave.begin];
      next_matrix = layer.down.Expert(first.expert);
      flow.next = {&next_matrix, down_units.begin(worker), down_units.end(worker), first.pairs};
    }
    kernels::MatMulGather(up_matrix, row_begin, row_end, in, tokens, group_up, rows, options.precision, flow);
    for (int64_t i = 0; i < group.pairs; ++i) {
      float* y = group_gate + i * rows + row_begin;
      kernels::SiluMul(y, group_up + i * rows + row_begin, y, row_end - row_begin);
    }
    if (units_left[g].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      h[g].Assign(group_gate, group.pairs, rows);
      h[g].Prepare(layer.down.type, options.precision);
      units_left[g].store(kComplete, std::memory_order_release);
    }
  });
}

// Units: ranges of rows over all experts, so that no two workers add to the same sums.
void Moe::Impl::Down(const ShardLayer& layer, const Wave& wave, const RowUnits& units, int worker) {
  const int64_t hidden = shard.plan().hidden_size;
  down_claims.Run(worker, [&](int64_t unit, bool asked, int64_t next_unit) {
    const int64_t row_begin = units.begin(unit), row_end = units.end(unit);
    asked |= unit == worker;
    for (size_t g = wave.begin; g < wave.end; ++g) {
      const ExpertGroup& group = grouping.groups()[g];
      const bool last = g + 1 == wave.end;
      const ExpertGroup& next = grouping.groups()[last ? wave.begin : g + 1];
      const kernels::Matrix down = layer.down.Expert(group.expert);
      const kernels::Matrix next_down = layer.down.Expert(next.expert);
      kernels::Flow flow{{}, asked};
      if (!last) flow.next = {&next_down, row_begin, row_end, next.pairs};
      if (last && next_unit >= 0) flow.next = {&next_down, units.begin(next_unit), hidden, next.pairs};
      // Those who work on it have begun, so this takes less than a unit's time.
      while (units_left[g - wave.begin].load(std::memory_order_acquire) != kComplete) {
        std::this_thread::yield();
      }
      kernels::MatMulLeafSum(
          down, row_begin, row_end, h[g - wave.begin], FirstNumbers(group.pairs),
          {grouping.weights().data() + group.first_pair, grouping.tokens().data() + group.first_pair,
           sum.data(), hidden, model::kGridShift},
          options.precision, flow);
      asked = true;
    }
  });
}

void Moe::Impl::WriteAnswer(const Call& call, std::span<uint8_t> answer) {
  const int64_t hidden = shard.plan().hidden_size;
  ForTokens(call.n_tokens, [&](int64_t begin, int64_t end) {
    if (call.answer_type == AnswerType::kF64) {
      std::memcpy(answer.data() + 8 * begin * hidden, sum.data() + begin * hidden,
                  static_cast<size_t>(8 * (end - begin) * hidden));
      return;
    }
    for (int64_t i = begin * hidden; i < end * hidden; ++i) {
      const auto rounded = static_cast<float>(sum[static_cast<size_t>(i)]);
      std::memcpy(answer.data() + 4 * i, &rounded, sizeof rounded);
    }
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
  m.pool.SetSpin(call.more_soon ? kSpinBetweenCalls : -1);
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
  if (call.bulk && m.options.precision == kernels::Precision::kFast && BulkExperts::Serves(*layer)) {
    m.ForwardInBulk(call, *layer);
  } else {
    m.ForwardExactly(call, *layer);
  }
  m.WriteAnswer(call, answer);

  CallStatistics statistics;
  statistics.distinct_experts = static_cast<int64_t>(m.grouping.groups().size());
  statistics.weight_bytes_read =
      static_cast<uint64_t>(statistics.distinct_experts) * layer->expert_weight_bytes;
  statistics.nanoseconds =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  return statistics;
}

}  // namespace tandem::expert
