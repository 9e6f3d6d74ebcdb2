// The frame of products with few columns: which warp takes what, and how sums meet. How weights and
// activations are read and multiplied is a Unit's business (int8_products.cu, matvec.cu).
//
// A warp computes 16 weight rows times 8 columns. It goes through the rows a unit of values at a time and has
// the next unit on its way meanwhile. Where rows are few, several warps of a block share them: warp s of S
// takes units s, s + S, ... and the sums are added in order through shared memory. How many share depends on
// the weight's shape alone, so a row and column have the same bits in every call. Blocks of the same rows and
// of different columns are neighbours: they read the weights at about the same time, all but the first from
// the L2 cache.
//
// A Unit has
//   static int Count(int cols)                         how many units a row has
//   void Load(rows, cols, unit, lane)                  starts reading the unit of rows[0] and rows[1]
//   void Add(cols, unit, lane, columns, sum)           sum += the unit's products
//   Columns      the activations of 8 columns: Columns(p, batch, first_column, lane). Where kBytes is not 0
//                they come by way of so many bytes of shared memory, copied there with the weights that meet
//                them: all lanes call Copy(unit, shared), later At(unit, shared)
//   One          void, or how a single column is multiplied (int8_units.cuh)
// Lane (g, t) = (lane / 4, lane % 4) has the weight rows g and g + 8 of the 16, and the sums of these rows
// and of columns 2 t and 2 t + 1.
#pragma once

#include <algorithm>
#include <type_traits>

#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/norm_form.cuh"

namespace tandem::attention::cuda {

constexpr int kRowTile = 16;
constexpr int kMostParts = 3;        // matrices of a launch
constexpr int kMostShares = 8;       // warps that share rows
constexpr int64_t kFewWarps = 2048;  // about as many as run at once; more only where rows are that many

// One of the matrices that a launch multiplies with the same activations.
struct FewColumnsPart {
  const uint8_t* data;
  int64_t rows;
  float* y;
  int64_t y_batch, y_column;
  int32_t shares;
  int32_t tile;          // rows of a warp, up to kRowTile
  uint32_t first_block;  // of the grid's y
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
  ResultForm form;  // of the only part
};

// What a warp of a launch works on.
struct WarpRows {
  const FewColumnsPart& part;
  int64_t batch;
  int lane, warp, shares, share;
  int64_t rows[2];  // of this lane; may be behind the last
  const uint8_t* row[2];

  template <int kWarps>
  static __device__ __forceinline__ WarpRows Of(const FewColumns& p) {
    int which = 0;
    while (which + 1 < p.parts && blockIdx.y >= p.part[which + 1].first_block) ++which;
    const FewColumnsPart& part = p.part[which];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, shares = part.shares;
    const int64_t batch = blockIdx.z;
    const int64_t tile =
        (static_cast<int64_t>(blockIdx.y - part.first_block) * (kWarps / shares) + warp / shares) * part.tile;
    const int64_t end = min(tile + part.tile, part.rows);
    const int64_t first = tile + (lane >> 2);
    // Lanes without a row work on the tile's last one.
    const uint8_t* data = part.data + batch * part.rows * p.row_bytes;
    const auto row = [&](int64_t r) { return data + max(min(r, end - 1), int64_t{0}) * p.row_bytes; };
    return {part,
            batch,
            lane,
            warp,
            shares,
            warp % shares,
            {first < end ? first : part.rows, first + 8 < end ? first + 8 : part.rows},
            {row(first), row(first + 8)}};
  }

  // Returns what y is then.
  __device__ __forceinline__ float Store(int column, int64_t r, float sum) const {
    if (r >= part.rows) return 0;
    float* y = part.y + batch * part.y_batch + column * part.y_column + r;
    const float v = part.accumulate ? *y + sum : sum;
    *y = v;
    return v;
  }
  // Where this lane's row `which` is among the block's.
  template <int kWarps>
  __device__ __forceinline__ int Place(int which) const {
    return warp / shares * kRowTile + (lane >> 2) + 8 * which;
  }
  template <int kWarps>
  __device__ __forceinline__ int64_t FirstOfBlock() const {
    return static_cast<int64_t>(blockIdx.y - part.first_block) * (kWarps / shares) * kRowTile;
  }
};

// The form of the results of a block's rows, 32 a warp at a time. All threads of the block have written
// theirs to values, [columns of the block][rows of the block].
template <int kWarps, int kColumns>
__device__ __forceinline__ void MakeResultForm(const FewColumns& p, const WarpRows& w, int first_column,
                                               const float (&values)[kColumns][kWarps * kRowTile]) {
  const ResultForm& f = p.form;
  const int64_t first = w.template FirstOfBlock<kWarps>();
  const int count = kWarps / w.shares * kRowTile / 32;
  const int of_head = static_cast<int>(f.of_head >> 5), kept = static_cast<int>(f.values >> 5);
  const int groups = (p.columns + 7) >> 3;
  for (int item = w.warp; item < count * kColumns; item += kWarps) {
    const int j = item % kColumns, column = first_column + j, rows = item / kColumns * 32;
    if (column >= p.columns || first + rows >= w.part.rows) continue;
    const int block = static_cast<int>((w.batch * w.part.rows + first + rows) >> 5);
    const int head = block / of_head, at = block - head * of_head;
    if (at >= kept) continue;
    QuantizeOne(values[j][rows + w.lane],
                (static_cast<int64_t>(head * groups + (column >> 3)) * kept + at) * 8 + (column & 7), f.q,
                f.q_meta);
  }
}

template <class Unit, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps)
    FewColumnsProduct(const __grid_constant__ FewColumns p) {
  using Columns = typename Unit::Columns;
  constexpr int kStages = 2;
  // What activations come by way of, at last what results do.
  constexpr int kStaged = kWarps * kStages * Columns::kBytes, kValues = 8 * kWarps * kRowTile * 4;
  __shared__ __align__(16) unsigned char pool[kStaged > kValues ? kStaged : kValues];
  __shared__ float parts[kWarps][4][32];
  LetNextBegin();
  const WarpRows w = WarpRows::Of<kWarps>(p);
  const int lane = w.lane, shares = w.shares;
  const uint8_t* const row[2] = {w.row[0], w.row[1]};
  const int first_column = blockIdx.x * 8;
  const int units = Unit::Count(p.cols);
  Unit stage[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    const int unit = w.share + i * shares;
    if (unit < units) stage[i].Load(row, p.cols, unit, lane);
  }
  AwaitEarlier();
  float sum[4] = {};
  Columns x(p, w.batch, first_column, lane);
  const bool scaled = p.x.factors.squares != nullptr && w.share == 0;
  float squares = 0;  // of column lane / 4
  if (scaled) squares = PartOfSquares(p.x.factors, min(first_column + (lane >> 2), p.columns - 1));
  // `ready` before a unit is multiplied, `copy` for the one that takes its place.
  auto multiply = [&](const auto& ready, const auto& copy) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) copy(w.share + i * shares, i);
    for (int unit = w.share; unit < units;) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        if (unit >= units) break;
        ready(unit, i);
        stage[i].Add(p.cols, unit, lane, x, sum);
        const int next = unit + kStages * shares;
        if (next < units) stage[i].Load(row, p.cols, next, lane);
        copy(next, i);
        unit += shares;
      }
    }
  };
  if constexpr (Columns::kBytes > 0) {
    unsigned char* const staged = pool + w.warp * kStages * Columns::kBytes;
    multiply(
        [&](int unit, int i) {
          WaitCopies<kStages - 1>();
          __syncwarp();
          x.At(unit, staged + i * Columns::kBytes);
        },
        [&](int unit, int i) {
          __syncwarp();
          if (unit < units) x.Copy(unit, staged + i * Columns::kBytes);
          CommitCopies();
        });
  } else {
    multiply([](int, int) {}, [](int, int) {});
  }
  if (shares > 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[w.warp][i][lane] = sum[i];
    __syncthreads();
  }
  if (shares > 1 && w.share == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int s = 1; s < shares; ++s) sum[i] += parts[w.warp + s][i][lane];
    }
  }
  if (scaled) {
    const float factor = FactorOf(p.x.factors, squares);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] *= __shfl_sync(0xffffffffu, factor, (2 * (lane & 3) + (i & 1)) * 4);
    }
  }
  const bool forms = p.form.q != nullptr;
  auto& values = *reinterpret_cast<float(*)[8][kWarps * kRowTile]>(pool);
  if (forms) __syncthreads();  // nobody reads activations any more
  if (w.share == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 2 * (lane & 3) + (i & 1), column = first_column + j;
      if (column >= p.columns) continue;
      const float v = w.Store(column, w.rows[i >> 1], sum[i]);
      if (forms) values[j][w.template Place<kWarps>(i >> 1)] = v;
    }
  }
  if (!forms) return;
  __syncthreads();
  MakeResultForm<kWarps, 8>(p, w, first_column, values);
}

// Some units of each warp's rows are on their way, the first ones before the activations are there.
template <class One, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps)
    OneColumnProduct(const __grid_constant__ FewColumns p) {
  __shared__ float parts[kWarps][kRowTile];
  __shared__ float values[1][kWarps * kRowTile];
  LetNextBegin();
  const WarpRows w = WarpRows::Of<kWarps>(p);
  const uint8_t* const row[2] = {w.row[0], w.row[1]};
  const int units = One::Count(p.cols);
  constexpr int kStages = One::kStages;
  One stage[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    const int unit = w.share + i * w.shares;
    if (unit < units) stage[i].Load(row, p.cols, unit, w.lane);
  }
  AwaitEarlier();
  const int64_t at = w.batch * (p.cols >> 5) * 8;
  const int8_t* const q = p.x.q + at * 32;
  const float2* const meta = p.x.q_meta + at;
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    const int unit = w.share + i * w.shares;
    if (unit < units) stage[i].LoadColumn(q, meta, unit, w.lane);
  }
  const bool scaled = p.x.factors.squares != nullptr && w.share == 0;
  float squares = 0;
  if (scaled) squares = PartOfSquares(p.x.factors, 0);
  float sum[2] = {0, 0};
  for (int unit = w.share; unit < units;) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (unit >= units) break;
      stage[i].Add(w.lane, sum);
      const int next = unit + kStages * w.shares;
      if (next < units) {
        stage[i].Load(row, p.cols, next, w.lane);
        stage[i].LoadColumn(q, meta, next, w.lane);
      }
      unit += w.shares;
    }
  }
  // All lanes (g, t) of a g have both sums of it: t 0 and 1 go on with one each.
  const int r = w.lane & 1;
  const bool goes_on = (w.lane & 2) == 0;
  float total = r == 0 ? sum[0] : sum[1];
  if (w.shares > 1) {
    const int place = (w.lane >> 2) * 2 + r;
    if (goes_on) parts[w.warp][place] = total;
    __syncthreads();
    if (w.share == 0) {
      for (int s = 1; s < w.shares; ++s) total += parts[w.warp + s][place];
    }
  }
  if (scaled) total *= FactorOf(p.x.factors, squares);
  const bool forms = p.form.q != nullptr;
  if (goes_on && w.share == 0) {
    const float v = w.Store(0, r == 0 ? w.rows[0] : w.rows[1], total);
    if (forms) values[0][w.template Place<kWarps>(r)] = v;
  }
  if (!forms) return;
  __syncthreads();
  MakeResultForm<kWarps, 1>(p, w, 0, values);
}

// matvec.cu: of the current device; asked once.
int ProcessorsOfDevice();

// Rows of a warp. All blocks of a launch that fits the device are there at once, but for short of that they
// lie unevenly: the processors that have one more than others come to their end later by as much. So tiles
// are made smaller until there are as many blocks as have room. No row's bits depend on it.
inline int TileOf(const ProductParams* p, const FewColumns& f, int warps) {
  const int64_t room = int64_t{ProcessorsOfDevice()} * (16 / warps);
  const int64_t groups = (f.columns + 7) / 8 * p->batches;
  for (int tile = kRowTile / 2; tile < kRowTile; ++tile) {
    int64_t blocks = 0;
    for (int i = 0; i < f.parts; ++i) {
      const int64_t per_block = warps / f.part[i].shares * tile;
      blocks += (p[i].w.rows + per_block - 1) / per_block * groups;
    }
    if (blocks <= room) return tile;
  }
  return kRowTile;
}

// How many warps share the rows of a product with so many units a row.
inline int SharesOf(const ProductParams& p, int units) {
  const int64_t tiles = (p.w.rows + kRowTile - 1) / kRowTile * p.batches;
  int shares = 1;
  while (shares < kMostShares && tiles * shares * 2 <= kFewWarps && units >= shares * 2) shares *= 2;
  return shares;
}

// `count` products, up to kMostParts, of the same activations, cols, row_bytes, columns and batches. One that
// makes a form is alone.
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
    const int shares = SharesOf(p[i], units);
    f.part[i] = {p[i].w.data, p[i].w.rows, p[i].y, p[i].y_batch,   p[i].y_column,
                 shares,      kRowTile,    0,      p[i].accumulate};
    warps = std::max(warps, shares);
  }
  f.form = p->form;
  if (f.form.q != nullptr) {
    if (f.part[0].shares > 2) warps = 8;  // 32 rows a block
    const int64_t all = p->w.rows * p->batches;
    if (f.form.of_head == 0) f.form.of_head = all;
    if (f.form.values == 0) f.form.values = f.form.of_head;
    if (count != 1 || f.part[0].shares > 4 || p->w.rows % 32 != 0 || f.form.of_head % 32 != 0 ||
        f.form.values % 32 != 0 || all % f.form.of_head != 0) {
      return cudaErrorInvalidValue;
    }
  }
  const int tile = f.form.q == nullptr ? TileOf(p, f, warps) : kRowTile;
  uint32_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    f.part[i].first_block = blocks;
    f.part[i].tile = tile;
    const int64_t per_block = warps / f.part[i].shares * tile;
    blocks += static_cast<uint32_t>((p[i].w.rows + per_block - 1) / per_block);
  }
  const dim3 grid(static_cast<unsigned>((f.columns + 7) / 8), blocks, static_cast<unsigned>(p->batches));
  auto launch = [&](auto kernel) { return LaunchEarly(kernel, grid, warps * 32, 0, stream, f); };
  if constexpr (!std::is_void_v<typename Unit::One>) {
    if (f.columns == 1) {
      using One = typename Unit::One;
      return launch(warps == 4 ? OneColumnProduct<One, 4> : OneColumnProduct<One, 8>);
    }
  }
  return launch(warps == 4 ? FewColumnsProduct<Unit, 4> : FewColumnsProduct<Unit, 8>);
}

// int8_products.cu: LaunchFewColumns for quantized weights.
cudaError_t LaunchInt8Products(const ProductParams* p, int count, cudaStream_t stream);
int Int8UnitsOf(int32_t type, int cols);  // units of a row

}  // namespace tandem::attention::cuda
