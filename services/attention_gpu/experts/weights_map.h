// An expert process's weights, mapped into this process for reading: what streamed prefill copies from.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/config.h"
#include "services/attention_gpu/experts/shard_weights.h"

namespace grpc {
class Channel;
}
namespace tandem::v1 {
class WeightsOffer;
}

namespace tandem::attention {

// Immutable; thread-safe. The memory stays readable after the process has ended, and stays taken as long as
// this lives: whoever waits for a process to come back must let go of its old weights first.
class WeightsMap {
 public:
  // Asks the process (Experts.Weights), fetches the descriptor and maps it. Unavailable: the process is gone;
  // FailedPrecondition: its weights cannot be mapped, and why (private memory, another host, another model,
  // an offer that does not hold water). Takes `patience` at most, as long as the peer answers at all.
  static absl::StatusOr<std::unique_ptr<WeightsMap>> Open(const std::shared_ptr<grpc::Channel>& channel,
                                                          const model::ModelConfig& config,
                                                          const std::string& model_fingerprint,
                                                          absl::Duration patience);
  ~WeightsMap();
  WeightsMap(const WeightsMap&) = delete;
  WeightsMap& operator=(const WeightsMap&) = delete;

  const ShardWeights& weights() const { return weights_; }

 private:
  WeightsMap() = default;
  ShardWeights weights_;
};

// The places that an offer tells, in `memory`. The offer is not trusted: FailedPrecondition names the layer
// and the numbers unless every matrix has the model's shape and lies inside the memory.
absl::StatusOr<ShardWeights> PlaceWeights(const v1::WeightsOffer& offer, const model::ModelConfig& config,
                                          std::span<const std::byte> memory);

}  // namespace tandem::attention
