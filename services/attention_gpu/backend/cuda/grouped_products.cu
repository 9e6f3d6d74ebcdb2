// Tiles as many_columns.cuh computes them; here the columns are gathered through the list of pairs, and the
// rows of a tile may come from two matrices: of each sixteen rows the first eight are gate's and the others
// up's, so that a lane holds both values of a (row, pair) and SiLU(gate) * up needs no memory between.
#include "services/attention_gpu/backend/cuda/grouped_products.h"

#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/many_columns.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kSortThreads = 1024;
constexpr int kKeepThreads = 256;

__global__ void __launch_bounds__(kKeepThreads) KeepExperts(const __grid_constant__ KeepExpertsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kKeepThreads + threadIdx.x;
  if (i >= p.pairs) return;
  const int32_t id = p.ids[i];
  const bool kept = id >= 0 && id < kMostSet && (p.keep[id / 32] >> id % 32 & 1) != 0;
  p.out[i] = kept ? id : -1;
}

// Where the columns of the tile that this thread copies lie in h, in values; `at(j)` for pair j of `count`.
template <typename T>
struct Gathered {
  template <typename At>
  __device__ __forceinline__ Gathered(const uint16_t* h, int first, int count, const At& at)
      : h(h), left(count - first - static_cast<int>(threadIdx.x >> 3)) {
#pragma unroll
    for (int i = 0; i < T::kTile / 32; ++i) place[i] = Has(i) ? at(count - left + 32 * i) : 0;
  }
  __device__ __forceinline__ bool Has(int i) const { return 32 * i < left; }
  __device__ __forceinline__ const uint16_t* At(int i) const { return h + place[i]; }
  const uint16_t* h;
  int left;
  uint32_t place[T::kTile / 32];
};

template <typename T>
__device__ __forceinline__ void GateUpTile(const GateUpParams& p, unsigned char* shared, int first) {
  const int expert = blockIdx.z, count = p.count[expert], begin = p.begin[expert];
  const int first_row = blockIdx.x * (kTileRows / 2);
  const int w_row = threadIdx.x >> 1;
  const int r = min(first_row + (w_row >> 4) * 8 + (w_row & 7), p.inner - 1);
  const GroupedWeights& w = (w_row & 8) != 0 ? p.up : p.gate;
  const Gathered<T> source(p.h, first, count, [&](int j) {
    return static_cast<uint32_t>(p.pair_token[begin + j]) * static_cast<uint32_t>(p.hidden);
  });
  typename T::Sums sum = {};
  MultiplyTile<T>(shared, w.type, w.data[expert] + r * w.row_bytes, p.hidden, source, sum);

  const int row = first_row + T::WarpRow() / 2 + static_cast<int>(threadIdx.x >> 2 & 7);
  const float* scale = OfColumns<T, float>(shared, [&](int c) {
    return first + c < count ? __ldg(p.h_scale + p.pair_token[begin + first + c]) : 0.0f;
  });
  EachColumn<T>(count - first, [&](int c, int n, int i) {
    float* to = p.middle + static_cast<int64_t>(begin + first + c) * p.inner;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      const float gate = sum[m][n][i] * scale[c], value = sum[m][n][2 + i] * scale[c];
      if (row + m * 8 < p.inner) to[row + m * 8] = gate / (1.0f + expf(-gate)) * value;
    }
  });
}

// Grid: tiles of 64 rows, tiles of pairs, experts.
template <typename T>
__global__ void __launch_bounds__(kProductThreads, T::kBlocks)
    GateUp(const __grid_constant__ GateUpParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int first = blockIdx.y * T::kTile, left = p.count[blockIdx.z] - first;
  if (left <= 0) return;
  WithTileFor<T::kTile, T::kWarpgroups>(left,
                                        [&](auto tile) { GateUpTile<decltype(tile)>(p, shared, first); });
}

template <typename T>
__device__ __forceinline__ void DownTile(const DownParams& p, unsigned char* shared, int first) {
  const int first_row = blockIdx.x * kTileRows;
  const int r = min(first_row + static_cast<int>(threadIdx.x >> 1), p.hidden - 1);
  const Gathered<T> source(p.h, first, p.count,
                           [&](int j) { return static_cast<uint32_t>(j) * static_cast<uint32_t>(p.inner); });
  typename T::Sums sum = {};
  MultiplyTile<T>(shared, p.type, p.data + r * p.row_bytes, p.inner, source, sum);

  struct Column {
    int token;
    float factor;
  };
  const Column* columns = OfColumns<T, Column>(shared, [&](int c) {
    const int j = min(first + c, p.count - 1);
    return Column{p.pair_token[j], __ldg(p.h_scale + j) * __ldg(p.pair_weight + j)};
  });
  // What other experts' products add to the same tokens is there, or not begun.
  AwaitEarlier();
  const int row = first_row + T::WarpRow() + static_cast<int>(threadIdx.x >> 2 & 7);
  EachColumn<T>(p.count - first, [&](int c, int n, int i) {
    const Column column = columns[c];
    float* to = p.x + static_cast<int64_t>(column.token) * p.hidden;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + m * 16 + half * 8;
        if (at < p.hidden) AddTo(to + at, sum[m][n][half * 2 + i] * column.factor);
      }
    }
  });
}

// Grid: tiles of 128 rows, tiles of pairs.
template <typename T>
__global__ void __launch_bounds__(kProductThreads, T::kBlocks) Down(const __grid_constant__ DownParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  LetNextBegin();
  const int first = blockIdx.y * T::kTile;
  WithTileFor<T::kTile, T::kWarpgroups>(p.count - first,
                                        [&](auto tile) { DownTile<decltype(tile)>(p, shared, first); });
}

// A block an expert, a stretch of the pairs a warp.
struct Stretch {
  int64_t begin, end;
};
__device__ __forceinline__ Stretch StretchOf(int64_t pairs) {
  constexpr int kWarps = kSortThreads / 32;
  const int64_t each = ((pairs + kWarps - 1) / kWarps + 31) / 32 * 32;
  const int64_t begin = each * (threadIdx.x >> 5);
  return {begin < pairs ? begin : pairs, begin + each < pairs ? begin + each : pairs};
}
__device__ __forceinline__ unsigned Matches(const SortPairsParams& p, int64_t at, const Stretch& s) {
  const int64_t i = at + (threadIdx.x & 31);
  return __ballot_sync(0xffffffffu, i < s.end && __ldg(p.ids + i) == static_cast<int>(blockIdx.x));
}
__device__ __forceinline__ int CountMatches(const SortPairsParams& p, const Stretch& s) {
  int count = 0;
  for (int64_t at = s.begin; at < s.end; at += 32) count += __popc(Matches(p, at, s));
  return count;
}

__global__ void __launch_bounds__(kSortThreads) CountPairs(const SortPairsParams p) {
  const int count = CountMatches(p, StretchOf(p.n * p.k));
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) atomicAdd(&total, count);  // integers: any order
  __syncthreads();
  if (threadIdx.x == 0) p.counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kSortThreads) PlacePairs(const SortPairsParams p) {
  constexpr int kWarps = kSortThreads / 32;
  __shared__ int of_warp[kWarps], base;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Stretch s = StretchOf(p.n * p.k);
  const int count = CountMatches(p, s);
  if (threadIdx.x == 0) base = 0;
  if (lane == 0) of_warp[warp] = count;
  __syncthreads();
  int before = 0;
  for (int e = threadIdx.x; e < static_cast<int>(blockIdx.x); e += kSortThreads) before += p.counts[e];
  if (before != 0) atomicAdd(&base, before);
  __syncthreads();
  int to = base;
  for (int w = 0; w < warp; ++w) to += of_warp[w];
  for (int64_t at = s.begin; at < s.end; at += 32) {
    const unsigned matches = Matches(p, at, s);
    if (matches >> lane & 1) {
      const int64_t i = at + lane;
      const int place = to + __popc(matches & ((1u << lane) - 1));
      p.pair_token[place] = static_cast<int32_t>(i / p.k);
      p.pair_weight[place] = __ldg(p.weights + i);
    }
    to += __popc(matches);
  }
}

bool Usable(int32_t type, int32_t cols) {
  return type != kF32 && ShapeOf(type).bytes != 0 && cols % 32 == 0 && cols % ShapeOf(type).values == 0;
}

unsigned Tiles(int64_t n, int64_t tile) { return static_cast<unsigned>((n + tile - 1) / tile); }

}  // namespace

cudaError_t PrepareGroupedProducts() {
  return ForEachTile([](auto tile) {
    const cudaError_t e = AllowShared(GateUp<decltype(tile)>, tile.kBytes);
    return e != cudaSuccess ? e : AllowShared(Down<decltype(tile)>, tile.kBytes);
  });
}

cudaError_t LaunchSortPairs(const SortPairsParams& p, cudaStream_t stream) {
  if (p.experts <= 0) return cudaSuccess;
  if (p.k < 1 || p.n < 0 || p.n * p.k > INT32_MAX) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(p.experts);
  CountPairs<<<blocks, kSortThreads, 0, stream>>>(p);
  PlacePairs<<<blocks, kSortThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchKeepExperts(const KeepExpertsParams& p, cudaStream_t stream) {
  if (p.pairs < 0) return cudaErrorInvalidValue;
  if (p.pairs == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((p.pairs + kKeepThreads - 1) / kKeepThreads);
  KeepExperts<<<blocks, kKeepThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchGateUp(const GateUpParams& p, cudaStream_t stream) {
  if (p.experts < 0 || p.experts > kMostGrouped || p.inner <= 0 || !Usable(p.gate.type, p.hidden) ||
      !Usable(p.up.type, p.hidden)) {
    return cudaErrorInvalidValue;
  }
  int32_t most = 0;
  for (int32_t e = 0; e < p.experts; ++e) most = p.count[e] > most ? p.count[e] : most;
  if (most == 0) return cudaSuccess;
  int tile = p.tile;
  if (tile == 0) {
    tile = TileFor(most, [&](int columns) {
      int64_t blocks = 0;
      for (int32_t e = 0; e < p.experts; ++e) blocks += Tiles(p.count[e], columns);
      return blocks * Tiles(p.inner, kTileRows / 2);
    });
  }
  WithTile(tile, [&](auto t) {
    const dim3 grid(Tiles(p.inner, kTileRows / 2), Tiles(most, t.kTile), static_cast<unsigned>(p.experts));
    GateUp<decltype(t)><<<grid, kProductThreads, t.kBytes, stream>>>(p);
  });
  return cudaGetLastError();
}

cudaError_t LaunchDown(const DownParams& p, cudaStream_t stream) {
  if (p.hidden <= 0 || !Usable(p.type, p.inner)) return cudaErrorInvalidValue;
  if (p.count <= 0) return cudaSuccess;
  int tile = p.tile;
  if (tile == 0) {
    tile = TileFor(
        p.count, [&](int columns) { return int64_t{Tiles(p.hidden, kTileRows)} * Tiles(p.count, columns); });
  }
  cudaError_t launched = cudaSuccess;
  WithTile(tile, [&](auto t) {
    const dim3 grid(Tiles(p.hidden, kTileRows), Tiles(p.count, t.kTile));
    if (p.after_another) {
      launched = LaunchEarly(Down<decltype(t)>, grid, kProductThreads, t.kBytes, stream, p);
    } else {
      Down<decltype(t)><<<grid, kProductThreads, t.kBytes, stream>>>(p);
    }
  });
  return launched != cudaSuccess ? launched : cudaGetLastError();
}

}  // namespace tandem::attention::cuda
