#include "common/model/cache_sizes.h"

#include <algorithm>

namespace tandem::model {
namespace {

constexpr int64_t kDefaultContext = 8192;
constexpr int64_t kDefaultCacheBytes = int64_t{2} << 30;
constexpr uint64_t kMostHostTierBytes = 8'000'000'000;
constexpr uint64_t kTight = 2'000'000'000;

}  // namespace

int64_t DefaultContext(const ModelConfig& config) {
  return std::min(config.max_position_embeddings, kDefaultContext);
}

int64_t CacheBytesPerToken(const ModelConfig& config, int64_t value_bytes) {
  return config.latent_dim() * config.num_hidden_layers * value_bytes;
}

int64_t DefaultCacheTokens(const ModelConfig& config, int64_t context, int64_t batch) {
  const int64_t affordable =
      kDefaultCacheBytes / std::max<int64_t>(1, CacheBytesPerToken(config, sizeof(float)));
  return std::max(context, std::min(context * batch, affordable));
}

uint64_t DefaultHostTierBytes(uint64_t left) {
  return left < kTight ? 0 : std::min(left / 4, kMostHostTierBytes);
}

}  // namespace tandem::model
