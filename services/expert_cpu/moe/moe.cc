#include "services/expert_cpu/moe/moe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/quant/quant.h"
#include "services/expert_cpu/moe/accumulate.h"
#include "services/expert_cpu/moe/grouping.h"

namespace tandem::expert {
namespace {

// Rows in a unit of work. The first rows of a unit are read with nobody having asked for them ahead, so
// larger units read faster (4 and 16 tokens on 16 cores: 14 to 17 %); but there must be enough of them
// that all cores end together.
int64_t UnitRows(int64_t rows, int threads, int64_t units_a_thread) {
  int64_t unit = 128;
  while (unit > 32 && rows / unit < units_a_thread * threads) unit /= 2;
  return unit;
}
// Pairs whose down projections are formed before they are added up: bounds a worker's buffer.
constexpr int64_t kPairChunk = 256;
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

// What one worker needs for itself.
struct Worker {
  std::vector<float> parts;  // [pairs of a chunk, rows of a unit, leaves]
};

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
        accumulate(AccumulateLeavesFor(kernels::ActiveIsa())),
        workers(static_cast<size_t>(p.threads())) {}

  const Shard& shard;
  threading::ThreadPool& pool;
  const Options options;
  const AccumulateLeavesFn accumulate;

  std::mutex mutex;  // one call at a time; everything below belongs to it
  std::vector<int32_t> ids;
  std::vector<float> id_weights;
  std::vector<float> x;  // [n_tokens, hidden]
  kernels::Activations x_activations;
  Grouping grouping;
  std::vector<float> gate;  // [pairs of the wave, rows of the slice]; then SiLU(gate) * up
  std::vector<float> up;
  std::vector<kernels::Activations> h;  // by group of the wave
  std::vector<std::atomic<int64_t>> units_left;
  std::vector<double> sum;  // [n_tokens, hidden]
  std::vector<Worker> workers;

  absl::Status Validate(const Call& call, const ShardLayer* layer, uint64_t answer_bytes) const;
  void ReadCall(const Call& call);
  void GateUp(const ShardLayer& layer, const Wave& wave);
  void Down(const ShardLayer& layer, const Wave& wave);
  void WriteAnswer(const Call& call, std::span<uint8_t> answer);
  void AddRows(const ShardLayer& layer, const Wave& wave, int64_t row_begin, int64_t row_end, Worker& worker);
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

// Copies what the peer gave, so that what was checked is what is used.
void Moe::Impl::ReadCall(const Call& call) {
  const int64_t n = call.n_tokens, hidden = shard.plan().hidden_size;
  ids.resize(static_cast<size_t>(n * call.experts_per_token));
  std::memcpy(ids.data(), call.expert_ids.data(), call.expert_ids.size());
  id_weights.resize(ids.size());
  std::memcpy(id_weights.data(), call.expert_weights.data(), call.expert_weights.size());
  x.resize(static_cast<size_t>(n * hidden));
  if (call.activation_type == ActivationType::kF32) {
    std::memcpy(x.data(), call.activations.data(), call.activations.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      uint16_t half;
      std::memcpy(&half, call.activations.data() + 2 * i, 2);
      x[i] = quant::Bf16ToFloat(half);
    }
  }
}

// Units: (expert, range of rows). The unit that completes an expert quantizes its result for the next step.
void Moe::Impl::GateUp(const ShardLayer& layer, const Wave& wave) {
  const int64_t rows = shard.plan().rows();
  const auto groups = static_cast<int64_t>(wave.end - wave.begin);
  const int64_t unit_rows = UnitRows(groups * rows, pool.threads(), 8);
  const int64_t units_each = (rows + unit_rows - 1) / unit_rows;
  Grow(gate, wave.pairs * rows);
  Grow(up, wave.pairs * rows);
  if (static_cast<int64_t>(h.size()) < groups) h.resize(static_cast<size_t>(groups));
  if (static_cast<int64_t>(units_left.size()) < groups) {
    units_left = std::vector<std::atomic<int64_t>>(static_cast<size_t>(groups));
  }
  for (int64_t g = 0; g < groups; ++g) units_left[static_cast<size_t>(g)].store(units_each);

  const auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto g = static_cast<size_t>(unit / units_each);
      const int64_t row_begin = unit % units_each * unit_rows;
      const int64_t row_end = std::min(rows, row_begin + unit_rows);
      const ExpertGroup& group = grouping.groups()[wave.begin + g];
      const std::span<const int32_t> tokens(grouping.tokens().data() + group.first_pair,
                                            static_cast<size_t>(group.pairs));
      float* group_gate = gate.data() + (group.first_pair - wave.first_pair) * rows;
      float* group_up = up.data() + (group.first_pair - wave.first_pair) * rows;
      kernels::MatMulGather(layer.gate.Expert(group.expert), row_begin, row_end, x_activations, tokens,
                            group_gate, rows, options.precision);
      kernels::MatMulGather(layer.up.Expert(group.expert), row_begin, row_end, x_activations, tokens,
                            group_up, rows, options.precision);
      for (int64_t i = 0; i < group.pairs; ++i) {
        float* y = group_gate + i * rows + row_begin;
        kernels::SiluMul(y, group_up + i * rows + row_begin, y, row_end - row_begin);
      }
      if (units_left[g].fetch_sub(1, std::memory_order_acq_rel) == 1) {
        h[g].Assign(group_gate, group.pairs, rows);
        h[g].Prepare(layer.down.type, options.precision);
      }
    }
  };
  pool.ParallelFor(groups * units_each, 1, work);
}

void Moe::Impl::AddRows(const ShardLayer& layer, const Wave& wave, int64_t row_begin, int64_t row_end,
                        Worker& worker) {
  const int64_t hidden = shard.plan().hidden_size;
  const int64_t n_rows = row_end - row_begin;
  const int64_t leaves = (layer.down.cols + kernels::kLeaf - 1) / kernels::kLeaf;
  for (size_t g = wave.begin; g < wave.end; ++g) {
    const ExpertGroup& group = grouping.groups()[g];
    const kernels::Matrix down = layer.down.Expert(group.expert);
    for (int64_t first = 0; first < group.pairs; first += kPairChunk) {
      const int64_t n = std::min(kPairChunk, group.pairs - first);
      int32_t chunk[kPairChunk];
      for (int64_t i = 0; i < n; ++i) chunk[i] = static_cast<int32_t>(first + i);
      Grow(worker.parts, n * n_rows * leaves);
      kernels::MatMulLeaves(down, row_begin, row_end, h[g - wave.begin],
                            std::span<const int32_t>(chunk, static_cast<size_t>(n)), worker.parts.data(),
                            options.precision);
      for (int64_t i = 0; i < n; ++i) {
        const auto pair = static_cast<size_t>(group.first_pair + first + i);
        accumulate(grouping.weights()[pair], worker.parts.data() + i * n_rows * leaves, n_rows, leaves,
                   sum.data() + grouping.tokens()[pair] * hidden + row_begin);
      }
    }
  }
}

// Units: ranges of rows over all experts, so that no two workers add to the same sums.
void Moe::Impl::Down(const ShardLayer& layer, const Wave& wave) {
  const int64_t hidden = shard.plan().hidden_size;
  const int64_t unit_rows = UnitRows(hidden, pool.threads(), 6);
  const auto work = [&](int64_t begin, int64_t end, int worker) {
    for (int64_t unit = begin; unit < end; ++unit) {
      AddRows(layer, wave, unit * unit_rows, std::min(hidden, (unit + 1) * unit_rows),
              workers[static_cast<size_t>(worker)]);
    }
  };
  pool.ParallelFor((hidden + unit_rows - 1) / unit_rows, 1, work);
}

void Moe::Impl::WriteAnswer(const Call& call, std::span<uint8_t> answer) {
  const auto values = static_cast<size_t>(call.n_tokens * shard.plan().hidden_size);
  if (call.answer_type == AnswerType::kF64) {
    std::memcpy(answer.data(), sum.data(), values * sizeof(double));
    return;
  }
  for (size_t i = 0; i < values; ++i) {
    const auto rounded = static_cast<float>(sum[i]);
    std::memcpy(answer.data() + i * sizeof rounded, &rounded, sizeof rounded);
  }
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
  m.ReadCall(call);
  const int64_t k = call.experts_per_token;
  for (size_t i = 0; i < m.ids.size(); ++i) {
    if (m.ids[i] < -1 || m.ids[i] >= plan.n_routed_experts) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", static_cast<int64_t>(i) / k, ", expert ", static_cast<int64_t>(i) % k,
                       " of its ", k, ": id ", m.ids[i], " is outside [-1, ", plan.n_routed_experts, ")"));
    }
  }
  m.grouping.Build(m.ids, m.id_weights, k, plan.expert_begin, plan.expert_end);
  m.x_activations.Assign(m.x.data(), call.n_tokens, plan.hidden_size);
  m.x_activations.Prepare(layer->gate.type, m.options.precision);
  m.x_activations.Prepare(layer->up.type, m.options.precision);
  m.sum.assign(static_cast<size_t>(call.n_tokens * plan.hidden_size), 0.0);
  for (const Wave& wave : MakeWaves(m.grouping.groups())) {
    m.GateUp(*layer, wave);
    m.Down(*layer, wave);
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
