// One batched call over the routed experts of a layer, as far as this process holds them:
//   answer[t] = sum over the token's experts e of weight[t, e] * Down_e (SiLU(Gate_e x_t) * Up_e x_t)
// (DeepSeek-V3 technical report, equations of DeepSeekMoE; the shared expert is computed elsewhere).
//
// The batch is grouped by expert and every distinct expert is read from memory once a call, however many
// tokens share it. An answer depends on its token alone: not on the batch, the number of threads, or (summed
// up from F64 answers and rounded) on how the experts are shared out, bit for bit; see
// common/model/expert_sum.h. (Of bulk calls all of this is true but for slices: see bulk_experts.h.)
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/kernels/kernels.h"
#include "common/threading/thread_pool.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {

enum class ActivationType { kF32, kBf16 };
enum class AnswerType { kF32, kF64 };

// What a call asks for. The spans are little-endian bytes of any alignment, and are read once: a peer that
// changes them meanwhile does no harm.
struct Call {
  int64_t layer = 0;  // block number
  int64_t n_tokens = 0;
  int64_t experts_per_token = 0;            // k
  std::span<const uint8_t> expert_ids;      // int32 [n_tokens, k]; -1: none
  std::span<const uint8_t> expert_weights;  // float32 [n_tokens, k]
  std::span<const uint8_t> activations;     // [n_tokens, hidden_size] of activation_type
  ActivationType activation_type = ActivationType::kF32;
  AnswerType answer_type = AnswerType::kF32;
  // The caller is content with the precision of bfloat16 (common/kernels/bulk.h), which is faster where the
  // processor has tiles for it. Without them, or for weights that have no kernel for it, it means nothing.
  bool bulk = false;
};

struct CallStatistics {
  int64_t nanoseconds = 0;
  uint64_t weight_bytes_read = 0;
  int64_t distinct_experts = 0;
};

class Moe {
 public:
  struct Options {
    kernels::Precision precision = kernels::Precision::kFast;
    int64_t max_tokens = 4096;  // of one call
  };
  // Both must outlive it.
  Moe(const Shard& shard, threading::ThreadPool& pool, const Options& options);
  ~Moe();

  // Bytes of the answer of a call with so many tokens.
  uint64_t AnswerBytes(int64_t n_tokens, AnswerType type) const;

  // Writes all AnswerBytes of `answer`; tokens none of whose experts are held here get zeros. The same expert
  // twice for a token counts twice. Calls from several threads wait for each other.
  // NotFound: the layer is not held; InvalidArgument: no tokens or more than max_tokens, spans of other sizes
  // than the numbers say, an id outside [-1, n_routed_experts); each names the numbers.
  absl::StatusOr<CallStatistics> Forward(const Call& call, std::span<uint8_t> answer);

  const Options& options() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::expert
