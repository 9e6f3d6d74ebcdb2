// Where the matrices of a shard's routed experts lie in a stretch of memory. Plain data; owns nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/gguf/gguf.h"

namespace tandem::attention {

// Matrices of one kind, those of expert `i` of the shard at data + i * expert_bytes: rows of GGUF blocks as
// in a file, one after the other.
struct WeightStack {
  gguf::TensorType type = gguf::TensorType::kF32;
  const std::byte* data = nullptr;
  uint64_t expert_bytes = 0;  // at least rows * row_bytes
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_bytes = 0;  // gguf::RowBytes(type, cols)

  uint64_t used_bytes() const { return static_cast<uint64_t>(rows) * static_cast<uint64_t>(row_bytes); }
};

struct LayerWeights {
  int64_t layer = 0;  // block number
  WeightStack gate;   // [rows of the slice, hidden]
  WeightStack up;
  WeightStack down;  // [hidden, rows of the slice]
};

struct ShardWeights {
  std::span<const std::byte> memory;  // all of the stacks lie in it
  int64_t expert_begin = 0;           // experts [begin, end) of the model are held
  int64_t expert_end = 0;
  int64_t row_begin = 0;  // intermediate rows [begin, end) of each
  int64_t row_end = 0;
  std::vector<LayerWeights> layers;  // by rising block number

  int64_t experts() const { return expert_end - expert_begin; }
  const LayerWeights* Find(int64_t layer) const {  // nullptr: not held
    for (const LayerWeights& l : layers) {
      if (l.layer == layer) return &l;
    }
    return nullptr;
  }
};

}  // namespace tandem::attention
