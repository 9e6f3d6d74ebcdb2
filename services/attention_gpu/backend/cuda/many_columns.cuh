// A block's part of a product with many columns: kTileRows weight rows times kTile columns, kDepth inputs at
// a time. Weights come as blocks, are decoded to float16 in registers while the tensor cores work, and go to
// shared memory; activations come by asynchronous copies. The type is looked at once per 32 values.
//
// Eight warps. With 256 columns each has 64 rows times 64 columns, so that a matrix loaded from shared memory
// meets four others, and a decoded weight 256 columns; one block has a processor for itself. With fewer
// columns it is 32 rows, and two blocks share a processor. Of two warps on the same quarter of a processor
// one decodes in the middle of a step, the other at its end: the tensor cores have work meanwhile.
#pragma once

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {

constexpr int kProductThreads = 256;
constexpr int kTileRows = 128;
constexpr int kDepth = 64;

template <int kTile>
struct ProductTile {
  static constexpr int kWarpRows = kTile == 256 ? 64 : 32;
  static constexpr int kRowWarps = kTileRows / kWarpRows;
  static constexpr int kWarpColumns = kTile * kRowWarps / (kProductThreads / 32);
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
  static constexpr int kRowBytes = kDepth * 2;  // of either operand in shared memory
  static constexpr int kBytes = 2 * (kTileRows + kTile) * kRowBytes;
  static constexpr int kBlocks = kTile == 256 ? 1 : 2;  // of a processor
  static_assert(kWarpColumns % 16 == 0 && kBytes <= 99 * 1024);
  // Rows 16 m + 8 h + lane / 4 of the warp's, columns 8 n + 2 (lane % 4) + i: sums[m][n][2 h + i].
  using Sums = float[kRowTiles][kColumnTiles][4];

  __device__ static int WarpRow() { return (threadIdx.x >> 5) % kRowWarps * kWarpRows; }
  __device__ static int WarpColumn() { return (threadIdx.x >> 5) / kRowWarps * kWarpColumns; }
};

struct HalfRow {
  __device__ __forceinline__ void Put(int i, float a, float b) { values[i / 2] = __floats2half2_rn(a, b); }
  __half2 values[16];
};

// Sixteen bytes of a row lie at a place that its number turns, so that eight rows of a matrix load meet all
// banks.
__device__ __forceinline__ uint32_t SwizzledAt(int row, int part) {
  return static_cast<uint32_t>(row * (kDepth * 2) + ((part ^ (row & 7)) << 4));
}

// sum = the tile's products over all `cols` inputs. `row` is row threadIdx.x / 2 of the tile's weights.
// source.Has(i) says whether there is a column threadIdx.x / 8 + 32 i, source.At(i) where its activations
// are; some address that may be read where there is none.
template <int kTile, typename Source>
__device__ __forceinline__ void MultiplyTile(unsigned char* shared, int type, const uint8_t* row, int cols,
                                             const Source& source, typename ProductTile<kTile>::Sums& sum) {
  using T = ProductTile<kTile>;
  constexpr uint32_t kWeightBytes = kTileRows * T::kRowBytes, kColumnBytes = kTile * T::kRowBytes;
  const int thread = threadIdx.x, lane = thread & 31;
  const uint32_t w_tile = SharedAddress(shared), x_tile = w_tile + 2 * kWeightBytes;
  const int steps = (cols + kDepth - 1) / kDepth;
  const int w_row = thread >> 1, w_half = thread & 1;  // this thread decodes 32 values of a row
  Raw raw;
  auto load_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    if (chunk * 32 < cols) LoadRaw(type, row, cols, chunk, raw);
  };
  auto store_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    HalfRow out;
    if (chunk * 32 < cols) {
      DecodeRaw(type, raw, chunk, out);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) out.values[i] = __half2half2(__ushort_as_half(0));
    }
    unsigned char* to = shared + (step & 1) * kWeightBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* bits = reinterpret_cast<const uint32_t*>(&out.values[4 * i]);
      *reinterpret_cast<uint4*>(to + SwizzledAt(w_row, w_half * 4 + i)) =
          make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  };
  auto copy_activations = [&](int step) {
    const int part = thread & 7, column = thread >> 3, k = step * kDepth + part * 8;
    const uint32_t to = x_tile + (step & 1) * kColumnBytes + SwizzledAt(column, part);
    const bool within = k < cols;
#pragma unroll
    for (int i = 0; i < kTile / 32; ++i) {
      CopyAsync16(to + i * 32 * T::kRowBytes, source.At(i) + (within ? k : 0), within && source.Has(i));
    }
    CommitCopies();
  };

  const uint32_t a_row = (T::WarpRow() + (lane & 15)) * T::kRowBytes;
  const uint32_t b_row = (T::WarpColumn() + (lane & 7) + (lane >> 4) * 8) * T::kRowBytes;
  const int turn = lane & 7;                   // of all rows that this lane addresses
  const int decode_at = thread & 128 ? 3 : 1;  // of the four parts of a step
  copy_activations(0);
  load_weights(0);
  store_weights(0);
  if (steps > 1) load_weights(1);
  for (int step = 0; step < steps; ++step) {
    WaitCopies<0>();
    __syncthreads();  // tile `step` is complete, and nobody reads the one before any more
    const bool more = step + 1 < steps;
    if (more) copy_activations(step + 1);
    const uint32_t a_from = w_tile + (step & 1) * kWeightBytes + a_row;
    const uint32_t b_from = x_tile + (step & 1) * kColumnBytes + b_row;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[T::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        LoadMatrix4(a[m], a_from + m * 16 * T::kRowBytes + (((2 * k + (lane >> 4)) ^ turn) << 4));
      }
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; n += 2) {
        uint32_t b[4];
        LoadMatrix4(b, b_from + n * 8 * T::kRowBytes + (((2 * k + (lane >> 3 & 1)) ^ turn) << 4));
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          MmaF16(sum[m][n], a[m], b[0], b[1]);
          MmaF16(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
      if ((k & 1) != 0 && more && k == decode_at) {
        store_weights(step + 1);
        if (step + 2 < steps) load_weights(step + 2);
      }
    }
  }
}

// f(column, n, i) for this thread's columns first + column below `count`: sums [*][n][i] and [*][n][2 + i].
template <int kTile, typename F>
__device__ __forceinline__ void EachColumn(int first, int count, const F& f) {
  using T = ProductTile<kTile>;
  const int column = first + T::WarpColumn() + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = column + n * 8 + i;
      if (j < count) f(j, n, i);
    }
  }
}

// The widest tile of which there are enough for a large GPU and that is not half empty; `blocks(tile)` says
// how many there would be. Sums do not depend on it.
constexpr int64_t kEnoughBlocks = 96;
template <typename Blocks>
int TileFor(int64_t columns, const Blocks& blocks) {
  const bool even = (columns + 127) / 128 % 2 == 0 || columns > 1024;
  if (columns > 128 && even && blocks(256) >= kEnoughBlocks) return 256;
  return columns > 64 && blocks(128) >= kEnoughBlocks / 2 ? 128 : 64;
}

}  // namespace tandem::attention::cuda
