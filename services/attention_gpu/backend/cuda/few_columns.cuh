// The frame of products with few columns: which warp takes what, and how sums meet. How weights and
// activations are read and multiplied is a Unit's business (int8_products.cu, matvec.cu).
//
// A warp computes 16 weight rows times kTiles * 8 columns. It goes through the rows a unit of values at a
// time and has the next unit on its way meanwhile. Where rows are few, several warps of a block share them:
// warp s of S takes units s, s + S, ... and the sums are added in order through shared memory. How many share
// depends on the weight's shape alone, so a row and column have the same bits in every call.
//
// A Unit has
//   static int Count(int cols)                         how many units a row has
//   void Load(rows, cols, unit, lane)                  starts reading the unit of rows[0] and rows[1]
//   void Add(cols, unit, lane, activations, sum)       sum += the unit's products
//   template <int kTiles> struct Columns(p, batch, first_column, lane)   the activations
// Lane (g, t) = (lane / 4, lane % 4) has the weight rows g and g + 8 of the 16, and of each tile the sums of
// these rows and of columns 2 t and 2 t + 1.
#pragma once

#include <algorithm>

#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

constexpr int kRowTile = 16;
constexpr int kMostParts = 3;        // matrices of a launch
constexpr int kMostShares = 16;      // warps that share rows
constexpr int64_t kFewWarps = 2048;  // about as many as run at once; more only where rows are that many

// One of the matrices that a launch multiplies with the same activations.
struct FewColumnsPart {
  const uint8_t* data;
  int64_t rows;
  float* y;
  int64_t y_batch, y_column;
  int32_t shares;
  uint32_t first_block;  // of the grid's x
  bool accumulate;
};
struct FewColumns {
  FewColumnsPart part[kMostParts];
  int32_t parts;
  int32_t cols;
  int64_t row_bytes;
  Activations x;
  int64_t x_batch, x_column;
  int32_t columns;
};

template <class Unit, int kTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps)
    FewColumnsProduct(const __grid_constant__ FewColumns p) {
  __shared__ float parts[kWarps][kTiles][4][32];
  int which = 0;
  while (which + 1 < p.parts && blockIdx.x >= p.part[which + 1].first_block) ++which;
  const FewColumnsPart& part = p.part[which];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, shares = part.shares, share = warp % shares;
  const int64_t batch = blockIdx.y;
  const int first_column = blockIdx.z * kTiles * 8;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x - part.first_block) * (kWarps / shares) + warp / shares) * kRowTile;
  const int64_t rows[2] = {first + (lane >> 2), first + (lane >> 2) + 8};
  const uint8_t* row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Lanes without a row work on the last one.
    row[r] = part.data + (batch * part.rows + min(rows[r], part.rows - 1)) * p.row_bytes;
  }
  const typename Unit::template Columns<kTiles> x(p, batch, first_column, lane);

  float sum[kTiles][4] = {};
  const int units = Unit::Count(p.cols);
  Unit even, odd;
  int unit = share;
  if (unit < units) even.Load(row, p.cols, unit, lane);
  while (unit < units) {
    int next = unit + shares;
    if (next < units) odd.Load(row, p.cols, next, lane);
    even.Add(p.cols, unit, lane, x, sum);
    if (next >= units) break;
    unit = next + shares;
    if (unit < units) even.Load(row, p.cols, unit, lane);
    odd.Add(p.cols, next, lane, x, sum);
  }
  if (shares > 1) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][tile][i][lane] = sum[tile][i];
    }
    __syncthreads();
    if (share != 0) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int s = 1; s < shares; ++s) sum[tile][i] += parts[warp + s][tile][i][lane];
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + tile * 8 + 2 * (lane & 3) + (i & 1);
      const int64_t r = rows[i >> 1];
      if (column >= p.columns || r >= part.rows) continue;
      float* y = part.y + batch * part.y_batch + column * part.y_column + r;
      *y = part.accumulate ? *y + sum[tile][i] : sum[tile][i];
    }
  }
}

// `count` products, up to kMostParts, of the same activations, cols, row_bytes, columns and batches.
template <class Unit>
cudaError_t LaunchFewColumns(const ProductParams* p, int count, cudaStream_t stream) {
  FewColumns f;
  f.parts = count;
  f.cols = static_cast<int32_t>(p->w.cols);
  f.row_bytes = p->w.row_bytes;
  f.x = p->x;
  f.x_batch = p->x_batch;
  f.x_column = p->x_column;
  f.columns = p->columns;
  const int units = Unit::Count(f.cols);
  int warps = 4;
  for (int i = 0; i < count; ++i) {
    const int64_t tiles = (p[i].w.rows + kRowTile - 1) / kRowTile * p[i].batches;
    int shares = 1;
    while (shares < kMostShares && tiles * shares * 2 <= kFewWarps && units >= shares * 2) shares *= 2;
    f.part[i] = {p[i].w.data, p[i].w.rows, p[i].y, p[i].y_batch, p[i].y_column, shares, 0, p[i].accumulate};
    warps = std::max(warps, shares);
  }
  uint32_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    f.part[i].first_block = blocks;
    const int64_t per_block = warps / f.part[i].shares * kRowTile;
    blocks += static_cast<uint32_t>((p[i].w.rows + per_block - 1) / per_block);
  }
  const bool one = f.columns <= 8;
  const auto kernel = warps == 4   ? (one ? FewColumnsProduct<Unit, 1, 4> : FewColumnsProduct<Unit, 2, 4>)
                      : warps == 8 ? (one ? FewColumnsProduct<Unit, 1, 8> : FewColumnsProduct<Unit, 2, 8>)
                                   : (one ? FewColumnsProduct<Unit, 1, 16> : FewColumnsProduct<Unit, 2, 16>);
  const dim3 grid(blocks, static_cast<unsigned>(p->batches),
                  static_cast<unsigned>(one ? 1 : (f.columns + 15) / 16));
  kernel<<<grid, warps * 32, 0, stream>>>(f);
  return cudaGetLastError();
}

// int8_products.cu: LaunchFewColumns for quantized weights.
cudaError_t LaunchInt8Products(const ProductParams* p, int count, cudaStream_t stream);

}  // namespace tandem::attention::cuda
