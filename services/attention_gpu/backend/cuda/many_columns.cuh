// A block's part of a product with many columns: kTileRows weight rows times kTile columns, kDepth inputs at
// a time. Weights come as blocks, are decoded to float16 in registers while the tensor cores work, and go to
// shared memory; activations come by asynchronous copies. The type is looked at once per 32 values.
//
// Eight warps. By warpgroups (warpgroup_mma.cuh) each four have 64 rows and all columns, and the tensor cores
// read both operands where they lie. By warps, with 256 columns each has 64 rows times 64 columns, so that a
// matrix loaded from shared memory meets four others, and a decoded weight 256 columns; with fewer columns it
// is 32 rows. One block of 256 columns has a processor for itself, two of fewer share one where they have the
// registers.
#pragma once

#include <type_traits>

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/warpgroup_mma.cuh"

namespace tandem::attention::cuda {

constexpr int kProductThreads = 256;
constexpr int kTileRows = 128;
constexpr int kDepth = 64;

template <int kColumns, bool kByWarpgroups>
struct ProductTile {
  static constexpr int kTile = kColumns;
  static constexpr bool kWarpgroups = kByWarpgroups;
  static constexpr int kWarpRows = kWarpgroups ? 16 : kTile == 256 ? 64 : 32;
  static constexpr int kRowWarps = kTileRows / kWarpRows;
  static constexpr int kWarpColumns = kTile * kRowWarps / (kProductThreads / 32);
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
  static constexpr int kRowBytes = kDepth * 2;  // of either operand in shared memory
  static constexpr int kWeightBytes = kTileRows * kRowBytes, kColumnBytes = kTile * kRowBytes;
  // Parts of either operand that are in shared memory at a time: one is read and one written; warpgroups may
  // be a part apart, and activations come two parts ahead.
  static constexpr int kWeightParts = kWarpgroups ? 3 : 2, kColumnParts = kWarpgroups ? 4 : 2;
  static constexpr int kBytes = kWeightParts * kWeightBytes + kColumnParts * kColumnBytes;
  static constexpr int kBlocks = kTile == 256 ? 1 : 2;  // of a processor
  static_assert(kWarpColumns % 16 == 0 && kBytes * kBlocks <= (kWarpgroups ? 227 : 198) * 1024);
  // Rows 16 m + 8 h + lane / 4 of the warp's, columns 8 n + 2 (lane % 4) + i: sums[m][n][2 h + i].
  using Sums = float[kRowTiles][kColumnTiles][4];

  __device__ static int WarpRow() { return (threadIdx.x >> 5) % kRowWarps * kWarpRows; }
  __device__ static int WarpColumn() { return (threadIdx.x >> 5) / kRowWarps * kWarpColumns; }
};

// Sixteen bytes of a row lie at a place that its number turns, so that eight rows of a matrix load meet all
// banks.
__device__ __forceinline__ uint32_t SwizzledAt(int row, int part) {
  return static_cast<uint32_t>(row * (kDepth * 2) + ((part ^ (row & 7)) << 4));
}

// 32 values of a row on their way to shared memory, as float16, sixteen bytes as soon as they are there.
struct StoredRow {
  __device__ __forceinline__ void Put(int i, float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    values[i / 2 % 4] = *reinterpret_cast<const uint32_t*>(&pair);
    if (i % 8 != 6) return;
    *reinterpret_cast<uint4*>(tile + SwizzledAt(row, part + i / 8)) =
        make_uint4(values[0], values[1], values[2], values[3]);
  }
  unsigned char* tile;
  int row, part;
  uint32_t values[4];
};

// Brings the parts of both operands to shared memory. `row` is row threadIdx.x / 2 of the tile's weights.
// source.Has(i) says whether there is a column threadIdx.x / 8 + 32 i, source.At(i) where its activations
// are; some address that may be read where there is none.
template <typename T, typename Source>
struct TileFeed {
  __device__ __forceinline__ TileFeed(unsigned char* shared, int type, const uint8_t* row, int cols,
                                      const Source& source)
      : shared(shared), type(type), row(row), cols(cols), source(source) {}

  __device__ __forceinline__ int steps() const { return (cols + kDepth - 1) / kDepth; }
  __device__ __forceinline__ uint32_t WeightsAt(int step) const {
    return SharedAddress(shared) + step % T::kWeightParts * T::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t ColumnsAt(int step) const {
    return SharedAddress(shared) + T::kWeightParts * T::kWeightBytes +
           step % T::kColumnParts * T::kColumnBytes;
  }
  __device__ __forceinline__ int Chunk(int step) const {
    return step * 2 + static_cast<int>(threadIdx.x & 1);
  }
  __device__ __forceinline__ void LoadWeights(int step) {
    if (Chunk(step) * 32 < cols) LoadRaw(type, row, cols, Chunk(step), raw);
  }
  __device__ __forceinline__ void StoreWeights(int step) {
    StoredRow out;
    out.tile = shared + step % T::kWeightParts * T::kWeightBytes;
    out.row = static_cast<int>(threadIdx.x >> 1);
    out.part = static_cast<int>(threadIdx.x & 1) * 4;
    if (Chunk(step) * 32 < cols) {
      DecodeRaw(type, raw, Chunk(step), out);
    } else {
#pragma unroll
      for (int i = 0; i < 32; i += 2) out.Put(i, 0.0f, 0.0f);
    }
  }
  // One group of asynchronous copies, also where there is nothing to copy.
  __device__ __forceinline__ void CopyColumns(int step) {
    const int part = threadIdx.x & 7, column = threadIdx.x >> 3, k = step * kDepth + part * 8;
    const uint32_t to = ColumnsAt(step) + SwizzledAt(column, part);
    const bool within = k < cols;
    if (step < steps()) {
#pragma unroll
      for (int i = 0; i < T::kTile / 32; ++i) {
        CopyAsync16(to + i * 32 * T::kRowBytes, source.At(i) + (within ? k : 0), within && source.Has(i));
      }
    }
    CommitCopies();
  }

  unsigned char* shared;
  int type;
  const uint8_t* row;
  int cols;
  const Source& source;
  Raw raw;
};

// Of two warps on the same quarter of a processor one decodes in the middle of a step, the other at its end:
// the tensor cores have work meanwhile.
template <typename T, typename Source>
__device__ __forceinline__ void MultiplyByWarps(TileFeed<T, Source>& feed, typename T::Sums& sum) {
  const int lane = threadIdx.x & 31, steps = feed.steps();
  const uint32_t a_row = (T::WarpRow() + (lane & 15)) * T::kRowBytes;
  const uint32_t b_row = (T::WarpColumn() + (lane & 7) + (lane >> 4) * 8) * T::kRowBytes;
  const int turn = lane & 7;                        // of all rows that this lane addresses
  const int decode_at = threadIdx.x & 128 ? 3 : 1;  // of the four parts of a step
  feed.CopyColumns(0);
  feed.LoadWeights(0);
  feed.StoreWeights(0);
  if (steps > 1) feed.LoadWeights(1);
  for (int step = 0; step < steps; ++step) {
    WaitCopies<0>();
    __syncthreads();  // part `step` is complete, and nobody reads the one before any more
    const bool more = step + 1 < steps;
    if (more) feed.CopyColumns(step + 1);
    const uint32_t a_from = feed.WeightsAt(step) + a_row, b_from = feed.ColumnsAt(step) + b_row;
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
        feed.StoreWeights(step + 1);
        if (step + 2 < steps) feed.LoadWeights(step + 2);
      }
    }
  }
}

// A part's products run while the next part is decoded; they are waited for a part later.
template <typename T, typename Source>
__device__ __forceinline__ void MultiplyByWarpgroups(TileFeed<T, Source>& feed, typename T::Sums& sum) {
#ifdef TANDEM_WARPGROUP_CODE
  const int steps = feed.steps();
  const uint32_t group_rows = (threadIdx.x >> 7) * 64 * T::kRowBytes;
  feed.CopyColumns(0);
  feed.CopyColumns(1);
  feed.LoadWeights(0);
  feed.StoreWeights(0);
  feed.LoadWeights(1);
  for (int step = 0; step < steps; ++step) {
    WaitCopies<1>();
    ShowToWarpgroups();
    __syncthreads();  // part `step` is complete, and all products of parts before the last one have ended
    const uint64_t a = SharedMatrix(feed.WeightsAt(step) + group_rows),
                   b = SharedMatrix(feed.ColumnsAt(step));
    BeginWarpgroupProducts();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      WarpgroupMma<T::kColumnTiles>(sum[0], a + 2 * k, b + 2 * k);  // 32 bytes on, counted in sixteens
    }
    CommitWarpgroupProducts();
    feed.CopyColumns(step + 2);
    if (step + 1 < steps) feed.StoreWeights(step + 1);
    feed.LoadWeights(step + 2);
    AwaitWarpgroupProducts<1>();
  }
  AwaitWarpgroupProducts<0>();
  HoldSums(sum[0]);
  WaitCopies<0>();
#endif
}

// sum = the tile's products over all `cols` inputs; what the feed's arguments are is said there.
template <typename T, typename Source>
__device__ __forceinline__ void MultiplyTile(unsigned char* shared, int type, const uint8_t* row, int cols,
                                             const Source& source, typename T::Sums& sum) {
  TileFeed<T, Source> feed(shared, type, row, cols, source);
  if constexpr (T::kWarpgroups) {
    MultiplyByWarpgroups(feed, sum);
  } else {
    MultiplyByWarps(feed, sum);
  }
}

// body(tile) with the narrowest tile up to kTile columns that holds `columns`, for a block at the end.
template <int kTile, bool kWarpgroups, typename Body>
__device__ __forceinline__ void WithTileFor(int columns, const Body& body) {
#ifndef TANDEM_WARPGROUP_CODE
  if constexpr (kWarpgroups) __trap();  // never launched: WithTile
#endif
  if constexpr (kTile > 64) {
    if (columns <= kTile / 2) return WithTileFor<kTile / 2, kWarpgroups>(columns, body);
  }
  body(ProductTile<kTile, kWarpgroups>());
}

// What a block knows of each of its tile's columns, in shared memory where the operands were: value(c) for
// column c of the tile. After the products; for all threads of the block.
template <typename T, typename V, typename F>
__device__ __forceinline__ const V* OfColumns(unsigned char* shared, const F& value) {
  V* of = reinterpret_cast<V*>(shared);
  __syncthreads();  // nobody reads operands any more
  if (threadIdx.x < T::kTile) of[threadIdx.x] = value(static_cast<int>(threadIdx.x));
  __syncthreads();
  return of;
}

// f(c, n, i) for this thread's columns c of the tile below `count`: sums [*][n][i] and [*][n][2 + i].
template <typename T, typename F>
__device__ __forceinline__ void EachColumn(int count, const F& f) {
  const int column = T::WarpColumn() + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = column + n * 8 + i;
      if (c < count) f(c, n, i);
    }
  }
}

// *to += v where nobody else adds at the same time: not waited for, unlike a read, a sum and a write.
__device__ __forceinline__ void AddTo(float* to, float v) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory");
}

// The widest tile of which there are enough for a large GPU; `blocks(tile)` says how many there would be.
// Sums do not depend on it.
constexpr int64_t kEnoughBlocks = 96;
template <typename Blocks>
int TileFor(int64_t columns, const Blocks& blocks) {
  if (columns > 128 && blocks(256) >= kEnoughBlocks) return 256;
  return columns > 64 && blocks(128) >= kEnoughBlocks / 2 ? 128 : 64;
}

// What is launched: launch(tile) with a ProductTile of `columns` columns, as the current device has them.
template <typename Launch>
void WithTile(int columns, const Launch& launch) {
  auto wide = [&](auto warpgroups) {
    if (columns == 256) {
      launch(ProductTile<256, warpgroups.value>());
    } else if (columns == 128) {
      launch(ProductTile<128, warpgroups.value>());
    } else {
      launch(ProductTile<64, warpgroups.value>());
    }
  };
#ifdef TANDEM_WARPGROUPS
  if (CanUseWarpgroups()) return wide(std::true_type());
#endif
  wide(std::false_type());
}

// prepare(tile) for each ProductTile that WithTile may choose, until one fails.
template <typename Prepare>
cudaError_t ForEachTile(const Prepare& prepare) {
  cudaError_t result = cudaSuccess;
  for (const int columns : {256, 128, 64}) {
    WithTile(columns, [&](auto tile) {
      if (result == cudaSuccess) result = prepare(tile);
    });
  }
  return result;
}

template <typename Kernel>
cudaError_t AllowShared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace tandem::attention::cuda
