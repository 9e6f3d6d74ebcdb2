// Random weights, written straight into the block formats of GGUF: finite, of a wanted size, and faster than
// any disk takes them. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "common/gguf/gguf.h"

namespace tandem::cli {

// Fills `out` with the blocks [first_block, first_block + out.size() / type_size) of an endless random tensor
// that `seed` names: a block depends on the seed and its number alone, so that parts may be made in any order
// and by any thread. Values have the mean 0 (Q4_0, Q5_0, Q8_0, Q3_K and Q6_K, whose integers reach one
// further down than up: almost) and the root mean square `rms`, as near as the blocks' scales can say it.
// out.size() must be a multiple of the type's block bytes; the type must be a supported one.
void FillRandomBlocks(gguf::TensorType type, double rms, uint64_t seed, uint64_t first_block,
                      std::span<uint8_t> out);

// A seed for the tensor called `name` of the model made with `seed`.
uint64_t TensorSeed(uint64_t seed, std::string_view name);

}  // namespace tandem::cli
