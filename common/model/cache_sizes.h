// How large the KV cache is where nobody says: what the engine takes, and what `tandem serve` counts before
// it starts one.
#pragma once

#include <cstdint>

#include "common/model/config.h"

namespace tandem::model {

// Tokens of a sequence: the model's, at most 8192.
int64_t DefaultContext(const ModelConfig& config);

// Bytes a token takes in all layers, for entries of `value_bytes` each: 4 in host memory, 2 on a GPU.
int64_t CacheBytesPerToken(const ModelConfig& config, int64_t value_bytes);

// Tokens of the cache in host memory: a context for each of `batch` sequences as far as that takes no more
// than 2 GB, and one context at least.
int64_t DefaultCacheTokens(const ModelConfig& config, int64_t context, int64_t batch);

// Bytes of host memory for pages that the prefix cache has to give up, of `left` bytes that nobody else
// needs: a quarter, at most 8 GB, and none where so little is left that others will miss it.
uint64_t DefaultHostTierBytes(uint64_t left);

}  // namespace tandem::model
