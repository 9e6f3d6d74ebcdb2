// When many rows of a sequence attend to keys and values made from the latents (prefill_attention.h) instead
// of in absorbed form, and where everything lies then. Pure arithmetic.
#pragma once

#include <cstdint>

#include "common/model/config.h"

namespace tandem::attention::cuda {

// Rows of a sequence go through a layer's attention `rows` at a time; for each such chunk the keys and values
// of `heads` heads are made, for `positions` positions at a time. Offsets are bytes from the beginning of the
// scratch memory, multiples of 256.
struct PrefillLayout {
  int64_t rows = 0;  // 0: the scratch memory is too small
  int64_t heads = 0;
  int64_t positions = 0;  // a multiple of kPrefillTile, or all there are
  int64_t wide = 0;       // rows that pass the projections together

  // Through a chunk: what queries are made of, [rows, q_lora or hidden] float16, and the result, [rows, heads
  // of the model, v] float16; a float32 scale a row each.
  uint64_t low = 0, low_scale = 0, attended = 0, attended_scale = 0;
  uint64_t unit = 0;  // of the latents: one float32
  // Through a group of heads: queries float16 and their scales, [rows, heads, qk] and [rows, heads]; the
  // weights of keys [heads, nope, lora] float16; what PrefillAttention carries where there are more
  // positions.
  uint64_t query = 0, query_scale = 0, key_weights = 0, carry = 0, carry_state = 0;
  // One after the other at the same place: the projections [wide, q_lora] and [wide, lora + rope] float32;
  // queries [rows, heads, qk] float32; latents, rotated keys, keys and values of `positions` positions,
  // float16.
  uint64_t q_a = 0, kv = 0, q = 0, latents = 0, rotated = 0, expanded = 0;
};

// For `count` rows of a sequence, the last of which sees `tokens` positions, in `bytes` of scratch memory.
PrefillLayout LayOutPrefill(const model::ModelConfig& c, int64_t count, int64_t tokens, uint64_t bytes);

// Whether `count` rows from `position` on cost clearly less than in absorbed form, and there are kernels for
// the model's shape.
bool WorthExpanding(const model::ModelConfig& c, int64_t count, int64_t position);

}  // namespace tandem::attention::cuda
