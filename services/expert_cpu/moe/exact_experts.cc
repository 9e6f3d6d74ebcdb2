#include "services/expert_cpu/moe/exact_experts.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "common/kernels/activations.h"
#include "common/model/expert_sum.h"
#include "common/quant/quant.h"

namespace tandem::expert {
namespace {

// An expert's h is there.
constexpr int64_t kComplete = -1;
// From so many tokens of an expert on, tiles want them to lie together.
constexpr int64_t kGatheredPairs = 16;
// Pairs that are between gate/up and down at once: bounds the buffers of large calls. No expert is split.
constexpr int64_t kWavePairs = 4096;
// Of a token's input, what is read and quantized at once.
constexpr int64_t kInputColumns = 1024;
// Up to so many tokens of every expert, products wait for memory.
constexpr int64_t kFewTokens = 8;
// Rows of the largest and the smallest units of such calls. What a unit reads first is asked for while the
// unit before it is worked on, so that small ones cost little.
constexpr int64_t kMostUpRows = 128, kLeastUpRows = 32;
constexpr int64_t kMostDownRows = 256, kLeastDownRows = 16;

// Else a pass of the kernels: the tokens' sums should stay in the caches.
WorkUnits::Size UnitRows(int64_t rows, int64_t most_tokens, int64_t least, int64_t most) {
  const int64_t pass = std::min(rows, std::max(least, kernels::PassRows(most_tokens)));
  if (most_tokens > kFewTokens) return {pass, pass};
  return {std::min(rows, least), std::min(rows, most)};
}

template <typename T>
void Grow(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
}

// Asks memory for rows that will be read soon.
void AskFor(const kernels::Matrix& w, int64_t row, int64_t rows) {
  const uint8_t* p = w.data + row * w.row_bytes;
  for (const uint8_t* end = p + rows * w.row_bytes; p < end; p += 64) __builtin_prefetch(p, 0, 2);
}

}  // namespace

struct ExactExperts::Job {
  const ShardLayer& layer;
  const Grouping& grouping;
  int64_t n_tokens;
  std::span<const uint8_t> activations;
  bool is_bf16;
  const AnswerTo& answer;

  int64_t rows() const { return layer.gate.rows; }
  int64_t hidden() const { return layer.gate.cols; }
  const std::vector<ExpertGroup>& groups() const { return grouping.groups(); }
};

struct ExactExperts::Wave {
  size_t begin = 0;  // groups [begin, end)
  size_t end = 0;
  int64_t first_pair = 0;
  int64_t pairs = 0;

  size_t groups() const { return end - begin; }
};

ExactExperts::ExactExperts(threading::ThreadPool& pool, threading::Claims& claims,
                           kernels::Precision precision)
    : pool_(pool),
      up_claims_(claims),
      down_claims_(pool.threads()),
      precision_(precision) {}

void ExactExperts::Forward(const ShardLayer& layer, const Grouping& grouping, int64_t n_tokens,
                           std::span<const uint8_t> activations, bool is_bf16, const AnswerTo& answer) {
  const Job job{layer, grouping, n_tokens, activations, is_bf16, answer};
  Grow(sum_, n_tokens * job.hidden());
  if (job.groups().empty()) {
    std::fill(sum_.begin(), sum_.begin() + n_tokens * job.hidden(), 0.0);
    answer.Write(sum_.data(), 0, n_tokens * job.hidden());
    return;
  }
  ReserveInput(job);
  for (auto i = static_cast<int64_t>(counting_.size()); i < job.groups().front().pairs; ++i) {
    counting_.push_back(static_cast<int32_t>(i));
  }
  // What is gathered must be there first; else the workers read the input themselves as they begin.
  const bool gathers = Gathers(job.groups().front());
  if (gathers) {
    pool_.ParallelFor(n_tokens, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) ReadColumns(job, t, 0, job.hidden());
    });
  }
  for (const Wave& wave : MakeWaves(job)) {
    if (gathers) Gather(job, wave);
    Products(job, wave, !gathers && wave.begin == 0);
  }
}

std::vector<ExactExperts::Wave> ExactExperts::MakeWaves(const Job& job) const {
  std::vector<Wave> waves;
  for (size_t g = 0; g < job.groups().size(); ++g) {
    const ExpertGroup& group = job.groups()[g];
    if (waves.empty() || waves.back().pairs + group.pairs > kWavePairs) {
      waves.push_back({g, g, group.first_pair, 0});
    }
    waves.back().end = g + 1;
    waves.back().pairs += group.pairs;
  }
  return waves;
}

void ExactExperts::ReserveInput(const Job& job) {
  Grow(x_, job.n_tokens * job.hidden());
  x_activations_.Assign(x_.data(), job.n_tokens, job.hidden());
  gate_form_ = x_activations_.Reserve(job.layer.gate.type, precision_);
  up_form_ = x_activations_.Reserve(job.layer.up.type, precision_);
  const auto quantized = [](gguf::TensorType type) {
    return kernels::FormFor(type) != kernels::ActivationForm::kFloat;
  };
  gather_ = precision_ == kernels::Precision::kFast && kernels::ActiveIsa() == kernels::Isa::kAmx &&
            quantized(job.layer.gate.type) && quantized(job.layer.up.type);
  input_begun_.store(0, std::memory_order_relaxed);
  input_ready_.store(0, std::memory_order_relaxed);
}

void ExactExperts::ReadColumns(const Job& job, int64_t token, int64_t begin, int64_t end) {
  const int64_t first = token * job.hidden() + begin, last = token * job.hidden() + end;
  if (job.is_bf16) {
    for (int64_t i = first; i < last; ++i) {
      uint16_t half;
      std::memcpy(&half, job.activations.data() + 2 * i, 2);
      x_[static_cast<size_t>(i)] = quant::Bf16ToFloat(half);
    }
  } else {
    std::memcpy(x_.data() + first, job.activations.data() + 4 * first,
                static_cast<size_t>(4 * (last - first)));
  }
  if (gate_form_) x_activations_.PrepareColumns(job.layer.gate.type, token, begin, end);
  if (up_form_) x_activations_.PrepareColumns(job.layer.up.type, token, begin, end);
}

// All workers share the input out and return when all of it is there. One for which there is no piece asks
// memory for the rows that it will begin with, and answers which unit that is; else -1.
int64_t ExactExperts::ReadInput(const Job& job, const Wave& wave, int worker) {
  const int64_t pieces_each = (job.hidden() + kInputColumns - 1) / kInputColumns;
  const int64_t pieces = job.n_tokens * pieces_each;
  int64_t read = 0;
  for (int64_t i; (i = input_begun_.fetch_add(1, std::memory_order_relaxed)) < pieces; ++read) {
    const int64_t begin = i % pieces_each * kInputColumns;
    ReadColumns(job, i / pieces_each, begin, std::min(begin + kInputColumns, job.hidden()));
  }
  int64_t asked_unit = -1;
  if (read > 0) {
    input_ready_.fetch_add(read, std::memory_order_acq_rel);
  } else if (worker < up_units_.count()) {
    asked_unit = worker;
    const WorkUnits::Unit& unit = up_units_[asked_unit];
    const ExpertGroup& group = job.groups()[wave.begin + static_cast<size_t>(unit.part)];
    AskFor(job.layer.gate.Expert(group.expert), unit.begin,
           std::min(unit.end - unit.begin, kernels::PassRows(group.pairs)));
  }
  // Those who read have begun: microseconds.
  while (input_ready_.load(std::memory_order_acquire) < pieces) std::this_thread::yield();
  return asked_unit;
}

bool ExactExperts::Gathers(const ExpertGroup& group) const {
  return gather_ && group.pairs >= kGatheredPairs;
}

void ExactExperts::Gather(const Job& job, const Wave& wave) {
  if (gathered_.size() < wave.groups()) gathered_.resize(wave.groups());
  pool_.ParallelFor(static_cast<int64_t>(wave.groups()), 1, [&](int64_t begin, int64_t end, int) {
    for (auto g = static_cast<size_t>(begin); g < static_cast<size_t>(end); ++g) {
      const ExpertGroup& group = job.groups()[wave.begin + g];
      if (!Gathers(group)) continue;
      gathered_[g].Gather(x_activations_, {job.grouping.tokens().data() + group.first_pair,
                                           static_cast<size_t>(group.pairs)});
    }
  });
}

// Down begins without a step between: a worker that finds no unit of gate and up left goes on to those of
// down, and waits there only for an expert that is not complete yet.
void ExactExperts::Products(const Job& job, const Wave& wave, bool read_input) {
  const int64_t rows = job.rows(), hidden = job.hidden(), most = job.groups()[wave.begin].pairs;
  const auto groups = static_cast<int64_t>(wave.groups());
  up_units_.Cut(groups, rows, pool_.threads(), UnitRows(rows, most, kLeastUpRows, kMostUpRows));
  down_units_.Cut(1, hidden, pool_.threads(), UnitRows(hidden, most, kLeastDownRows, kMostDownRows));
  Grow(gate_, wave.pairs * rows);
  Grow(up_, wave.pairs * rows);
  if (h_.size() < wave.groups()) h_.resize(wave.groups());
  if (units_left_.size() < wave.groups()) units_left_ = std::vector<std::atomic<int64_t>>(wave.groups());
  for (int64_t g = 0; g < groups; ++g) {
    units_left_[static_cast<size_t>(g)].store(up_units_.count_of(g), std::memory_order_relaxed);
  }
  up_claims_.Reset(up_units_.count());
  down_claims_.Reset(down_units_.count());
  pool_.ParallelFor(pool_.threads(), 1, [&](int64_t, int64_t, int worker) {
    const int64_t asked_unit = read_input ? ReadInput(job, wave, worker) : -1;
    GateUp(job, wave, worker, asked_unit);
    Down(job, wave, worker);
  });
}

// The unit that completes an expert quantizes its result for the next step.
void ExactExperts::GateUp(const Job& job, const Wave& wave, int worker, int64_t asked_unit) {
  const int64_t rows = job.rows();
  up_claims_.Run(worker, [&](int64_t number, bool asked, int64_t next_number) {
    const WorkUnits::Unit& unit = up_units_[number];
    const auto g = static_cast<size_t>(unit.part);
    const ExpertGroup& group = job.groups()[wave.begin + g];
    const bool together = Gathers(group);
    const kernels::Activations& in = together ? gathered_[g] : x_activations_;
    const std::span<const int32_t> tokens =
        together
            ? FirstNumbers(group.pairs)
            : std::span(job.grouping.tokens().data() + group.first_pair, static_cast<size_t>(group.pairs));
    float* gate = gate_.data() + (group.first_pair - wave.first_pair) * rows;
    float* up = up_.data() + (group.first_pair - wave.first_pair) * rows;
    const kernels::Matrix gate_matrix = job.layer.gate.Expert(group.expert);
    const kernels::Matrix up_matrix = job.layer.up.Expert(group.expert);
    kernels::MatMulGather(gate_matrix, unit.begin, unit.end, in, tokens, gate, rows, precision_,
                          {{&up_matrix, unit.begin, unit.end, group.pairs}, asked || number == asked_unit});
    kernels::Matrix next_matrix;
    kernels::Flow flow{{}, true};
    if (next_number >= 0) {
      const WorkUnits::Unit& next = up_units_[next_number];
      const ExpertGroup& next_group = job.groups()[wave.begin + static_cast<size_t>(next.part)];
      next_matrix = job.layer.gate.Expert(next_group.expert);
      flow.next = {&next_matrix, next.begin, next.end, next_group.pairs};
    } else if (worker < down_units_.count()) {
      const ExpertGroup& first = job.groups()[wave.begin];
      next_matrix = job.layer.down.Expert(first.expert);
      flow.next = {&next_matrix, down_units_[worker].begin, down_units_[worker].end, first.pairs};
    }
    kernels::MatMulGather(up_matrix, unit.begin, unit.end, in, tokens, up, rows, precision_, flow);
    for (int64_t i = 0; i < group.pairs; ++i) {
      float* y = gate + i * rows + unit.begin;
      kernels::SiluMul(y, up + i * rows + unit.begin, y, unit.end - unit.begin);
    }
    if (units_left_[g].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      h_[g].Assign(gate, group.pairs, rows);
      h_[g].Prepare(job.layer.down.type, precision_);
      units_left_[g].store(kComplete, std::memory_order_release);
    }
  });
}

// A unit has its rows of all experts, so whoever works on it begins the sums and, in the end, writes them.
void ExactExperts::Down(const Job& job, const Wave& wave, int worker) {
  const int64_t hidden = job.hidden();
  const bool first_wave = wave.begin == 0, last_wave = wave.end == job.groups().size();
  down_claims_.Run(worker, [&](int64_t number, bool asked, int64_t next_number) {
    const WorkUnits::Unit& unit = down_units_[number];
    if (first_wave) {
      for (int64_t t = 0; t < job.n_tokens; ++t) {
        std::fill(sum_.data() + t * hidden + unit.begin, sum_.data() + t * hidden + unit.end, 0.0);
      }
    }
    asked |= number == worker;
    for (size_t g = wave.begin; g < wave.end; ++g) {
      const ExpertGroup& group = job.groups()[g];
      const bool last = g + 1 == wave.end;
      const ExpertGroup& next = job.groups()[last ? wave.begin : g + 1];
      const kernels::Matrix down = job.layer.down.Expert(group.expert);
      const kernels::Matrix next_down = job.layer.down.Expert(next.expert);
      kernels::Flow flow{{}, asked};
      if (!last) flow.next = {&next_down, unit.begin, unit.end, next.pairs};
      if (last && next_number >= 0) {
        flow.next = {&next_down, down_units_[next_number].begin, down_units_[next_number].end, next.pairs};
      }
      // Those who work on it have begun, so this takes less than a unit's time.
      while (units_left_[g - wave.begin].load(std::memory_order_acquire) != kComplete) {
        std::this_thread::yield();
      }
      kernels::MatMulLeafSum(
          down, unit.begin, unit.end, h_[g - wave.begin], FirstNumbers(group.pairs),
          {job.grouping.weights().data() + group.first_pair, job.grouping.tokens().data() + group.first_pair,
           sum_.data(), hidden, model::kGridShift},
          precision_, flow);
      asked = true;
    }
    if (last_wave) {
      for (int64_t t = 0; t < job.n_tokens; ++t) {
        const int64_t at = t * hidden + unit.begin;
        job.answer.Write(sum_.data() + at, at, unit.end - unit.begin);
      }
    }
  });
}

}  // namespace tandem::expert
