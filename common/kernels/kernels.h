// Matrix products with GGUF weight blocks as they lie in the file: y = W x.
//
// Numerics, the same for every instruction set, batch size and thread count, bit for bit:
//   kFast, quantized weights: activations are quantized once (Q8: int8 with one float scale a block, of 256
//     values for the K types, of 32 for the others). Within a block of activations all integer sums are exact
//     (int32); then acc = fma(scale, float(isum), acc), with one accumulator, in order of the columns; the
//     exact sequence is given with each type in scalar.cc, which is the twin that the others must equal.
//   kFast, F32/F16/BF16 weights: float32 activations, 16 lanes, lane l sums the columns c = l mod 16 in order
//     with fma; the lanes are then added as a tree (8, 4, 2, 1).
//   kReference: weights dequantized to float32, products summed in double in order of the columns.
// A row's result depends on nothing but that row and that token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/gguf/gguf.h"

namespace tandem::kernels {

// Instruction sets in rising order. kAvx2: AVX2, FMA, F16C. kAvx512: F, BW, DQ, VL. kAvx512Vnni: and VNNI.
// kAmx: and AMX int8 tiles and GFNI.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAmx = 4 };

std::string_view IsaName(Isa isa);  // "scalar", "avx2", "avx512", "avx512-vnni", "amx"
Isa DetectIsa();                    // the best that this machine (and this build) has
// What is used: DetectIsa(), lowered by the environment's TANDEM_ISA. A name it does not know or that the
// machine lacks is said once on stderr and ignored.
Isa ActiveIsa();
void SetActiveIsaForTesting(Isa isa);  // must be <= DetectIsa(); not thread-safe
std::vector<Isa> AvailableIsas();

enum class Precision { kFast, kReference };

// A weight in memory; not owned.
struct Matrix {
  gguf::TensorType type = gguf::TensorType::kF32;
  const uint8_t* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;       // a multiple of the type's block size
  int64_t row_bytes = 0;  // distance of rows; RowBytes(type, cols) unless the matrix is a slice of columns
  static Matrix Of(gguf::TensorType type, const uint8_t* data, int64_t rows, int64_t cols);
};

// Activations of some tokens, in float32 and, made on demand, in the quantized forms that weight types want.
// Reusable: Assign keeps the memory. Prepare before the parallel loop; reads are then thread-safe.
class Activations {
 public:
  Activations();
  ~Activations();
  Activations(Activations&&) noexcept;
  Activations& operator=(Activations&&) noexcept;

  // x: [n, cols] float32, rows `stride` floats apart; not copied, must outlive the products.
  void Assign(const float* x, int64_t n, int64_t cols, int64_t stride);
  void Assign(const float* x, int64_t n, int64_t cols) { Assign(x, n, cols, cols); }
  // Makes what products with `type` need. Idempotent. For Precision::kReference nothing is needed.
  void Prepare(gguf::TensorType type, Precision precision);
  // The same in two steps, for many tokens: Reserve, then PrepareTokens over disjoint ranges that cover all
  // tokens, from any threads. Reserve returns false if there is nothing to do (made already, or not needed).
  bool Reserve(gguf::TensorType type, Precision precision);
  void PrepareTokens(gguf::TensorType type, int64_t begin, int64_t end);
  // Of one token the columns [col_begin, col_end), multiples of 256 (or the end): a part of PrepareTokens.
  void PrepareColumns(gguf::TensorType type, int64_t token, int64_t col_begin, int64_t col_end);

  // The quantized forms that `from` has of its tokens token_ids, copied together. No float32 form: for
  // integer kernels only.
  void Gather(const Activations& from, std::span<const int32_t> token_ids);

  int64_t tokens() const;
  int64_t cols() const;

  struct Impl;
  const Impl& impl() const { return *impl_; }
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// What the calling thread will multiply next: rows [row, row_end) of `w`, with that many tokens. Memory
// serves one run of addresses well and its beginning badly, so a call asks for the first bytes of the next
// while it works.
struct Upcoming {
  const Matrix* w = nullptr;  // nullptr: not known
  int64_t row = 0;
  int64_t row_end = 0;
  int64_t tokens = 0;
};
struct Flow {
  Upcoming next;
  bool asked = false;  // this call is what the thread's last one had as `next`
};

// y[t * ldy + r] = sum_c W[r, c] x[t, c] for rows r in [row_begin, row_end) and all tokens t.
// x must be prepared for w.type. Thread-safe for disjoint rows: the caller shares them out, best in multiples
// of kRowGrain (other numbers are as right, but decode the spare lanes for nothing).
constexpr int64_t kRowGrain = 64;
// Rows that one pass over the weights takes with so many tokens: with a few, each group is decoded and used
// at once.
constexpr int64_t PassRows(int64_t tokens) { return tokens <= 3 ? 16 : kRowGrain; }
void MatMul(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x, float* y, int64_t ldy,
            Precision precision, const Flow& flow = {});

// The same for chosen tokens: y[i * ldy + r] is the product with token token_ids[i].
void MatMulGather(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                  std::span<const int32_t> token_ids, float* y, int64_t ldy, Precision precision,
                  const Flow& flow = {});

// Products per leaf: a leaf is 256 columns (the last may be shorter), and each leaf is summed by itself as if
// it were a matrix of its own: y[(i * n_rows + (r - row_begin)) * n_leaves + b]. n_leaves = ceil(cols / 256).
// What lets a sum over columns be taken apart between processes and put together again bit for bit.
constexpr int64_t kLeaf = 256;
void MatMulLeaves(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                  std::span<const int32_t> token_ids, float* y, Precision precision);

// The same leaves, weighted and added up in double, each rounded to the grid of common/model/expert_sum.h:
//   sum[ids[i] * ld + r] += (weights[i] * leaf + grid) - grid   for each leaf of the product with
//   token_ids[i]
// Rows that other threads add to must not be among them.
struct LeafSum {
  const float* weights = nullptr;  // [tokens of the call]
  const int32_t* ids = nullptr;    // [tokens of the call]
  double* sum = nullptr;
  int64_t ld = 0;
  double grid = 0;
};
void MatMulLeafSum(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                   std::span<const int32_t> token_ids, const LeafSum& to, Precision precision,
                   const Flow& flow = {});

// Elementwise and vector helpers, float32, any length; deterministic per ISA-independent definition above.
float Dot(const float* a, const float* b, int64_t n);                               // 16 lanes, tree
void Axpy(float a, const float* x, float* y, int64_t n);                            // y = fma(a, x, y)
void RmsNorm(const float* x, const float* weight, float eps, float* y, int64_t n);  // y = x / rms(x) * weight
void SiluMul(const float* gate, const float* up, float* y, int64_t n);  // y = gate / (1 + exp(-gate)) * up

}  // namespace tandem::kernels
