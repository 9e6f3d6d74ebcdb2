// Products of quantized weights with many tokens on bf16 tiles (AMX-BF16): several times as fast as the
// integer kernels, for calls whose caller does not ask for their exactness.
//
// Numerics: weights are dequantized (one fused multiply-add in float32) and rounded to bf16, activations are
// rounded to bf16, products are summed in float32 in the order of BulkOrder, with the tiles' own rules: pairs
// of columns by fma in two sums of 16 columns each, the two added, then added to the result; subnormal
// numbers count as zero. That is more accurate than the integer kernels' activations of 8 bits, but not the
// same numbers. A (row, token)'s result depends on nothing but that row and that token: not on the batch nor
// on threads.
//
// Tokens stand in tiles: for each 16 tokens and each 32 columns 1024 bytes, 16 pairs of columns of 16 tokens.
// The order of columns is that of the weight type.
#pragma once

#include <cstdint>
#include <span>

#include "common/kernels/kernels.h"

namespace tandem::kernels {

constexpr int64_t kBulkTileTokens = 16;
constexpr int64_t kBulkRowStep = 32;   // rows of a call are a multiple of it
constexpr int64_t kBulkColStep = 256;  // columns of a matrix are a multiple of it

// Whether this machine and build have them, and ActiveIsa() is not below kAmx.
bool BulkAvailable();
// Whether there is a kernel for weights of that type and shape.
bool BulkFits(gguf::TensorType type, int64_t rows, int64_t cols);
// Whether tokens prepared for one type serve for the other.
bool BulkSameOrder(gguf::TensorType a, gguf::TensorType b);

// Tiles of n tokens; words (bf16) that they take with `cols` columns; floats that `rows` sums of them take.
constexpr int64_t BulkTiles(int64_t n) { return (n + kBulkTileTokens - 1) / kBulkTileTokens; }
constexpr int64_t BulkTokenWords(int64_t tiles, int64_t cols) { return tiles * kBulkTileTokens * cols; }
constexpr int64_t BulkSums(int64_t tiles, int64_t rows) { return tiles * kBulkTileTokens * rows; }

// One token's activations as bf16 in the type's order: [cols], from bf16 or float32 at any alignment.
void BulkOrderBf16(gguf::TensorType type, const uint8_t* x, int64_t cols, uint16_t* to);
void BulkOrderFloat(gguf::TensorType type, const uint8_t* x, int64_t cols, uint16_t* to);

// One tile of up to 16 tokens: those with `ids` among rows of [cols] as above; zeros for the rest.
void BulkPack(const uint16_t* rows, int64_t cols, std::span<const int32_t> ids, uint16_t* to);

// sums = W[row_begin .. row_end) x, as BulkSums floats: [rows / 16][tiles][16 rows][16 tokens].
// `next`: what the thread will read after this call. Thread-safe. sums and x: aligned to 64 bytes.
void BulkMatMul(const Matrix& w, int64_t row_begin, int64_t row_end, const uint16_t* x, int64_t tiles,
                float* sums, const Upcoming& next);

// SiLU(gate) * up of those sums, rounded to bf16, as rows [row_begin, row_end) of `cols` columns of the
// tokens that the next product, with weights of `type`, takes. Overwrites `gate`.
void BulkSiluMul(gguf::TensorType type, float* gate, const float* up, int64_t tiles, int64_t row_begin,
                 int64_t row_end, int64_t cols, uint16_t* to);

// to.sum[ids[i] * ld + r] += (weights[i] * sums[r, i] + grid) - grid for rows r in [row_begin, row_end) and
// the first n tokens of the tiles. Rows that other threads add to must not be among them.
void BulkAdd(const float* sums, int64_t tiles, int64_t n, int64_t row_begin, int64_t row_end,
             const LeafSum& to);

namespace internal {
struct BulkTables;
// Takes the place of the machine's until called with nullptr; BulkAvailable is true meanwhile. Not
// thread-safe.
void SetBulkTablesForTesting(const BulkTables* tables);
}  // namespace internal

}  // namespace tandem::kernels
