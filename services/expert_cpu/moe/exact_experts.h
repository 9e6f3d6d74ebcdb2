// A call's experts by the integer kernels (and by float ones, where the weights are floats): a token's answer
// does not depend on its batch, on threads or, summed up from F64, on slices, bit for bit.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "common/kernels/activations.h"
#include "common/kernels/kernels.h"
#include "common/threading/claims.h"
#include "common/threading/thread_pool.h"
#include "services/expert_cpu/moe/answer.h"
#include "services/expert_cpu/moe/grouping.h"
#include "services/expert_cpu/moe/work_units.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {

// One call at a time.
class ExactExperts {
 public:
  // All must outlive it.
  ExactExperts(threading::ThreadPool& pool, threading::Claims& claims, kernels::Precision precision);

  // activations: [n_tokens, hidden] as bf16 or float32, read once. Writes the whole answer.
  void Forward(const ShardLayer& layer, const Grouping& grouping, int64_t n_tokens,
               std::span<const uint8_t> activations, bool is_bf16, const AnswerTo& answer);

 private:
  struct Job;   // what a call is about
  struct Wave;  // consecutive groups, gate/up and then down

  std::vector<Wave> MakeWaves(const Job& job) const;
  void ReserveInput(const Job& job);
  void ReadColumns(const Job& job, int64_t token, int64_t begin, int64_t end);
  int64_t ReadInput(const Job& job, const Wave& wave, int worker);
  bool Gathers(const ExpertGroup& group) const;
  void Gather(const Job& job, const Wave& wave);
  void Products(const Job& job, const Wave& wave, bool read_input);
  void GateUp(const Job& job, const Wave& wave, int worker, int64_t asked_unit);
  void Down(const Job& job, const Wave& wave, int worker);
  std::span<const int32_t> FirstNumbers(int64_t n) const {
    return {counting_.data(), static_cast<size_t>(n)};
  }

  threading::ThreadPool& pool_;
  threading::Claims& up_claims_;
  threading::Claims down_claims_;
  const kernels::Precision precision_;
  bool gather_ = false;  // this call: activations of an expert's tokens are copied together

  std::vector<float> x_;  // [n_tokens, hidden]
  kernels::Activations x_activations_;
  bool gate_form_ = false;  // whether x_activations_ must be made for gate, for up
  bool up_form_ = false;
  std::atomic<int64_t> input_begun_{0};  // pieces of the input
  std::atomic<int64_t> input_ready_{0};
  std::vector<int32_t> counting_;  // 0, 1, 2, ...
  WorkUnits up_units_;             // parts: groups of the wave
  WorkUnits down_units_;           // one part: rows over all groups, so that no two workers share sums
  std::vector<float> gate_;        // [pairs of the wave, rows of the slice]; then SiLU(gate) * up
  std::vector<float> up_;
  std::vector<kernels::Activations> gathered_;    // by group of the wave, where it has many tokens
  std::vector<kernels::Activations> h_;           // by group of the wave
  std::vector<std::atomic<int64_t>> units_left_;  // of gate and up, by group of the wave; at last kComplete
  std::vector<double> sum_;                       // [n_tokens, hidden]
};

}  // namespace tandem::expert
