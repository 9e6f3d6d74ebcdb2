// What the translation units of the kernels share. Plain data and function pointers only: the units that are
// compiled for one instruction set must not instantiate inline code that other units could end up calling.
#pragma once

#include <stdint.h>

namespace tandem::kernels::internal {

// The GGUF ids again (gguf::TensorType), without its header; dispatch.cc asserts that they agree.
enum WeightType : uint32_t {
  kTypeF32 = 0,
  kTypeF16 = 1,
  kTypeQ4_0 = 2,
  kTypeQ4_1 = 3,
  kTypeQ5_0 = 6,
  kTypeQ5_1 = 7,
  kTypeQ8_0 = 8,
  kTypeQ2_K = 10,
  kTypeQ3_K = 11,
  kTypeQ4_K = 12,
  kTypeQ5_K = 13,
  kTypeQ6_K = 14,
  kTypeBF16 = 30,
};

constexpr int kUnit = 256;        // columns handled together: a K block, or up to 8 blocks of 32
constexpr int kSubBlocks = 8;     // blocks of 32 in a unit
constexpr int kTokenChunk = 512;  // tokens handled by one pass over the weights

// How a product with few tokens asks memory for the weights ahead of their use, see ahead.inc.
enum Requests : int {
  kNoRequests,
  kRequests,        // into the first cache
  kTwoRequests,     // each line again, since the first request may have been dropped
  kSecondRequests,  // into the second cache
};

// A product with quantized weights. Activations lie unit by unit, so that the slice of all tokens that one
// decoded panel of weights meets is contiguous.
struct QuantArgs {
  uint32_t type;
  const uint8_t* w;  // the first row of this call
  int64_t row_bytes;
  int64_t rows;
  int64_t cols;
  const int8_t* q;          // [units][tokens][256], in [-127, 127], zero beyond cols
  const float* d;           // K types: [units][tokens]; others: [units][tokens][8]
  const int16_t* bsum16;    // K types: [units][tokens][16], sums of 16 q
  const int16_t* bsum32;    // K types: [units][tokens][8], sums of 32 q
  const int32_t* neg_bsum;  // others: [units][tokens][8], minus the sum of 32 q
  const float* dsum;        // others: [units][tokens][8], d * float(sum of 32 q)
  int64_t tokens;           // in these arrays
  const int32_t* ids;       // the n tokens wanted; nullptr: 0 .. n-1
  int64_t n;
  float* y;
  int64_t ldy;  // y[i * ldy + r]; with leaves: y[(i * rows + r) * units + unit]
  bool leaves;
  uint8_t* scratch;  // kScratchBytes, 64-byte aligned, the calling thread's own

  // Not null: the leaves are not written but added up, sum[sum_ids[i] * ld_sum + r] += (weights[i] * leaf +
  // grid)
  // - grid, in double.
  double* sum;
  const int32_t* sum_ids;
  const float* sum_weights;
  int64_t ld_sum;
  double grid;

  // What the thread will read after this call, so that it is asked for meanwhile.
  const uint8_t* next;  // nullptr: unknown
  int64_t next_row_bytes;
  int64_t next_used;  // bytes of a row that will be read
  int64_t next_rows;  // at most
  int64_t next_n;     // tokens
  bool asked;         // the first rows of this call have been asked for in that way
  Requests requests;  // ahead of panels
  bool by_rows;       // row by row, where there is such a way for the type and the tokens
  int64_t run_ahead;  // then so many bytes are asked for ahead
};

constexpr int64_t kScratchBytes = 512 << 10;

// A product with float weights. Columns [0, cols) of each row; `w` and `x` already point at the first column.
struct FloatArgs {
  uint32_t type;
  const uint8_t* w;
  int64_t row_bytes;
  int64_t rows;
  int64_t cols;
  const float* x;
  int64_t x_stride;
  const int32_t* ids;
  int64_t n;
  float* y;  // y[i * ldy + r * row_step]
  int64_t ldy;
  int64_t row_step;
};

// One token's 256 values (n of them given, the others count as zero). NaN or infinity among the values of a
// block makes its scale NaN and its integers zero, so that every product with it is NaN.
struct KTables {
  const char* name;
  void (*quant_matmul)(const QuantArgs& args);
  void (*float_matmul)(const FloatArgs& args);
  void (*quantize_k)(const float* x, int8_t* q, float* d, int16_t* bsum16, int16_t* bsum32);
  void (*quantize_32)(const float* x, int n, int8_t* q, float* d, int32_t* neg_bsum, float* dsum);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*axpy)(float a, const float* x, float* y, int64_t n);
  void (*silu_mul)(const float* gate, const float* up, float* y, int64_t n);
  uint64_t (*read)(const uint8_t* data, int64_t bytes);  // loads every byte once; a checksum nobody needs
};

// One a unit; nullptr where this build has no such unit.
const KTables* ScalarTables();
const KTables* Avx2Tables();
const KTables* Avx512Tables();
const KTables* Avx512VnniTables();
const KTables* AmxTables();

// Products with bf16 tiles, see bulk.h. Weight rows by kTileRows, columns by kUnit.
struct BulkArgs {
  uint32_t type;  // Q4_K, Q5_K, Q6_K or Q8_0
  const uint8_t* w;
  int64_t row_bytes;
  int64_t rows;       // a multiple of 32
  int64_t cols;       // a multiple of kUnit
  const uint16_t* x;  // [tiles][cols / 32][16 pairs of columns][16 tokens][2]
  int64_t tiles;      // of 16 tokens
  float* sums;        // [rows / 16][tiles][16 rows][16 tokens]
  uint8_t* scratch;   // kScratchBytes, 64-byte aligned, the calling thread's own

  const uint8_t* next;  // what the thread will read after this call; nullptr: unknown
  int64_t next_row_bytes;
  int64_t next_rows;
};

struct BulkTables {
  void (*matmul)(const BulkArgs& args);
  // A tile of the rows ids[0 .. n) of x, [cols] each, n <= 16.
  void (*pack)(const uint16_t* x, int64_t cols, const int32_t* ids, int64_t n, uint16_t* to);
  // Sums of a product become the columns [row_begin, row_begin + rows) of the next one's tokens; order[i] is
  // the column that stands at place i of a unit there.
  void (*pack_rows)(const uint8_t* order, const float* sums, int64_t tiles, int64_t row_begin, int64_t rows,
                    int64_t cols, uint16_t* to);
  // sum[ids[i] * ld + r] += (weights[i] * sums[r, i] + grid) - grid for n tokens.
  void (*add)(const float* sums, int64_t tiles, int64_t rows, int64_t n, const float* weights,
              const int32_t* ids, double* sum, int64_t ld, double grid);
};
const BulkTables* BulkAmxTables();  // nullptr where this build has no such unit

// exp(x) = 2^n * p(r), n = rint(x * kLog2e), r = x - n * ln 2 with ln 2 in two parts, p(r) = 1 + r + r^2 *
// (c0 + c1 r + ... + c4 r^4), all by fma in Horner's order; x is clamped to [kExpLow, kExpHigh]. Minimax on
// |r| <= ln(2) / 2; relative error below 8e-8.
constexpr float kExpLow = -87.0f;
constexpr float kExpHigh = 88.0f;
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693147182f;
constexpr float kLn2Low = -1.90465421e-9f;
constexpr float kExpC0 = 0.49999994f;
constexpr float kExpC1 = 0.166665211f;
constexpr float kExpC2 = 0.041668389f;
constexpr float kExpC3 = 0.00836874545f;
constexpr float kExpC4 = 0.00138145674f;

constexpr float kSmallestScale = 1.17549435e-38f;  // FLT_MIN: a smaller scale counts as zero

}  // namespace tandem::kernels::internal
