// The routed experts of a MoE layer for many tokens, on the GPU: the weights come from the experts' own
// memory over PCIe, some experts at a time, while the ones before are multiplied.
//   x[t] += sum over the token's experts e of weight[t, e] * Down_e (SiLU(Gate_e normed[t]) * Up_e normed[t])
//
// An expert's part is added in float32, experts in rising order, shards one after the other: the result does
// not depend on timing, on the size of the buffers, or on the other tokens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/grouped_products.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/backend/cuda/weight_copier.h"
#include "services/attention_gpu/experts/shard_weights.h"

namespace tandem::attention::cuda {

struct StreamOptions {
  int64_t max_tokens = 4096;  // of a call
  // Of device memory for weights on their way: what is more than a few experts is filled while attention
  // runs.
  uint64_t buffer_bytes = uint64_t{768} << 20;
  bool copy_ahead = true;  // the next layer's first experts as soon as there is room
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

  // The first MoE layer's first experts begin to come. Optional, before a step.
  absl::Status Begin();
  // Ids in [0, experts) and different for a token; -1: none. Add waits for what was on the stream at Ask
  // (which experts are used decides what is copied), then puts the layer on it and returns while the device
  // works. After an error the object is only good to be destroyed.
  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override;
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override;

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
  std::vector<Group> GroupsOf(int64_t layer) const;
  int64_t PairsOf(const Group& group) const;
  // Begins to copy those experts of the group that the counts name, or all.
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
  std::vector<int64_t> first_pair_;       // [experts + 1]: where an expert's pairs begin
  std::deque<Fetched> fetched_;           // in the order of the copies; the first is multiplied next
  std::deque<size_t> free_stages_;        // those that fetched_ does not name, the one longest free first
  std::unique_ptr<WeightCopier> copier_;  // last: what it copies to is freed after it
};

}  // namespace tandem::attention::cuda
