// The routed experts of a MoE layer for many tokens, on the GPU: the weights come from the experts' own
// memory over PCIe, some experts at a time, while the ones before are multiplied.
//   x[t] += sum over the token's experts e of weight[t, e] * Down_e (SiLU(Gate_e normed[t]) * Up_e normed[t])
//
// An expert's part is added in float32, experts in rising order, shards one after the other: the result does
// not depend on timing, on the size of the buffers, or on the other tokens. Of a layer that is shared, the
// expert processes compute some experts meanwhile (Share); their sum, rounded once, is added last. They round
// otherwise than the GPU does, so that there a token's bits depend on who computes which expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/grouped_products.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/backend/cuda/shared_calls.h"
#include "services/attention_gpu/backend/cuda/weight_copier.h"
#include "services/attention_gpu/experts/shard_weights.h"

namespace tandem::attention::cuda {

struct StreamOptions {
  int64_t max_tokens = 4096;  // of a call
  // Of device memory for weights on their way: what is more than a few experts is filled while attention
  // runs.
  uint64_t buffer_bytes = 640'000'000;
  bool copy_ahead = true;  // the next layer's first experts as soon as there is room
  // Device memory that nobody else uses from Add until the stream comes past what Add has put on it: saves
  // some of its own, if it is enough. Aligned to 256 bytes.
  uint8_t* scratch = nullptr;
  uint64_t scratch_bytes = 0;
  WeightCopier::Options copy;
};

// Calls from one thread at a time, work on one stream.
class StreamedExperts : public RoutedExperts {
 public:
  // For the current device. Unimplemented names a layer whose type or shape has no kernel; ResourceExhausted:
  // no device memory, or buffer_bytes do not hold two experts.
  static absl::StatusOr<std::unique_ptr<StreamedExperts>> Create(
      std::vector<std::shared_ptr<const ShardWeights>> shards, const model::ModelConfig& config,
      const StreamOptions& options);
  // Device memory that Create will take, at most.
  static uint64_t DeviceBytes(const model::ModelConfig& config, const StreamOptions& options);
  ~StreamedExperts() override;
  StreamedExperts(const StreamedExperts&) = delete;
  StreamedExperts& operator=(const StreamedExperts&) = delete;

  // Which experts of a layer of `tokens` tokens the processes compute: out[e] for each. counts[e]: the
  // expert's tokens; ahead[e]: its weights may be on their way already.
  using ChooseShared = std::function<std::vector<bool>(int64_t tokens, std::span<const int32_t> counts,
                                                       const std::vector<bool>& ahead)>;
  // From now on layers of up to calls->max_tokens() tokens are shared as `choose` says. Not during a step.
  void Share(std::unique_ptr<SharedCalls> calls, ChooseShared choose);
  SharedCalls* shared_calls() { return calls_.get(); }
  // Experts whose copies begin before a layer's routing is known, at most.
  int64_t experts_ahead() const;

  // The first MoE layer's first experts begin to come. Optional, before a step.
  absl::Status Begin();
  // Ids in [0, experts) and different for a token; -1: none. Add waits for what was on the stream at Ask
  // (which experts are used decides what is copied), then puts the layer on it and returns while the device
  // works. After an error the object is only good to be destroyed.
  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override;
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override;

  // After a step, when the stream has come to its end; what happened since Begin. Unavailable: a process was
  // lost, and something is missing in the sums.
  struct Totals {
    int64_t layers = 0;
    int64_t used = 0, shared = 0;  // experts: that had tokens; of these, computed by the processes
    int64_t shared_pairs = 0;      // tokens of those, one counted for each of its experts
    // Seconds of the shared layers: of the device for its own experts, then of waiting for the processes; and
    // those that the processes took.
    double worked = 0, waited = 0, processes = 0;

    Totals Since(const Totals& t) const {
      return {layers - t.layers, used - t.used,     shared - t.shared,      shared_pairs - t.shared_pairs,
              worked - t.worked, waited - t.waited, processes - t.processes};
    }
  };
  absl::StatusOr<Totals> End();

  // Bytes a second that the way from the experts' memory to the device carries, from copies of `bytes` in
  // all. Not during a step.
  absl::StatusOr<double> MeasureCopy(uint64_t bytes);
  // Weights of a layer, all experts of all shards.
  uint64_t LayerBytes(int64_t layer) const;
  uint64_t device_bytes() const { return device_.bytes(); }
  std::string Description() const;  // for the log

 private:
  static constexpr int kMatrices = 3;  // gate, up, down
  // Experts [first, first + count) of a shard, counted from the shard's first.
  struct Group {
    size_t shard = 0;
    int64_t layer = 0;
    int64_t first = 0, count = 0;
    bool operator==(const Group&) const = default;
  };
  // Room for one group, filled again and again.
  struct Stage {
    uint8_t* data[kMatrices] = {};
    cudaEvent_t free = nullptr;  // recorded when the products that read it are on their way
  };
  struct Fetched {
    Group group;
    size_t stage = 0;
    uint64_t ticket = 0;
  };

  StreamedExperts(std::vector<std::shared_ptr<const ShardWeights>> shards, const model::ModelConfig& config,
                  const StreamOptions& options);
  absl::Status CheckTypes() const;
  absl::Status Allocate();
  // want(pointer, values) for what is only needed within Add.
  template <typename Want>
  void WantForAdd(const uint64_t (&repacked)[kMatrices], const Want& want);
  std::vector<Group> GroupsOf(int64_t layer) const;
  // Tokens of its experts, those apart that the processes compute.
  int64_t PairsOf(const Group& group) const;
  absl::Status ShareOut(const RoutedCall& call, const std::vector<Group>& groups, cudaStream_t stream);
  absl::Status FinishShared();
  // Begins to copy those experts of the group that have tokens here, or all.
  absl::Status Fetch(const Group& group, bool all);
  void Release();  // the stage of the first one in fetched_
  absl::Status Multiply(const RoutedCall& call, const Fetched& fetched, cudaStream_t stream);
  absl::Status Repack(const Fetched& fetched, int matrix, GroupedWeights* out, cudaStream_t stream);
  absl::Status Products(const RoutedCall& call, const Group& group, const GroupedWeights (&w)[kMatrices],
                        int64_t first_pair, int64_t pairs, cudaStream_t stream);

  const std::vector<std::shared_ptr<const ShardWeights>> shards_;
  const model::ModelConfig c_;
  const StreamOptions options_;
  int64_t group_experts_ = 0;              // in a stage
  uint64_t expert_bytes_[kMatrices] = {};  // most of any layer
  int64_t middle_pairs_ = 0;               // multiplied together
  Arena device_{Arena::Kind::kDevice}, host_{Arena::Kind::kPinnedHost};
  std::vector<Stage> stages_;
  uint8_t* repacked_[kMatrices] = {};  // one group's, or null where no layer needs it
  int32_t* counts_ = nullptr;          // [experts]
  int32_t* host_counts_ = nullptr;     // likewise
  int32_t* pair_token_ = nullptr;
  float* pair_weight_ = nullptr;
  uint16_t* form_ = nullptr;  // [max_tokens, hidden] float16
  float* form_scale_ = nullptr;
  float* middle_ = nullptr;          // [middle_pairs_, inner]
  uint16_t* middle_form_ = nullptr;  // likewise
  float* middle_scale_ = nullptr;
  cudaEvent_t counted_ = nullptr;
  cudaEvent_t asked_ = nullptr, wait_begins_ = nullptr, wait_ends_ = nullptr;  // of a shared layer
  std::vector<int64_t> first_pair_;       // [experts + 1]: where an expert's pairs begin
  std::vector<int32_t> streamed_counts_;  // [experts]: of those that are not shared, else 0
  std::deque<Fetched> fetched_;           // in the order of the copies; the first is multiplied next
  std::deque<size_t> free_stages_;        // those that fetched_ does not name, the one longest free first
  std::unique_ptr<SharedCalls> calls_;    // null: no layer is shared
  ChooseShared choose_;
  Totals totals_;
  std::unique_ptr<WeightCopier> copier_;  // last: what it copies to is freed after it
};

}  // namespace tandem::attention::cuda
