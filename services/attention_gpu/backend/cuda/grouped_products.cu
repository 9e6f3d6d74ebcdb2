// A block computes 128 weight rows times kTile pairs, 64 inputs at a time, as matmul.cu does; here the
// columns are gathered through the list of pairs, and the rows of a tile may come from two matrices: rows 32
// w to 32 w + 15 are gate's and the next 16 up's, so that a warp holds both values of a (row, pair) in the
// same registers and SiLU(gate) * up needs no memory between.
#include "services/attention_gpu/backend/cuda/grouped_products.h"

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 128;
constexpr int kDepth = 64;
constexpr int kPitch = kDepth + 8;        // values; eight rows of a matrix load meet all 32 banks
constexpr int kWide = 128, kNarrow = 64;  // columns of a tile
constexpr int kSortThreads = 1024;

template <int kTile>
constexpr int SharedBytes() {
  return 2 * (kTileRows + kTile) * kPitch * static_cast<int>(sizeof(__half));
}

struct HalfRow {
  __device__ __forceinline__ void Put(int i, float a, float b) { values[i / 2] = __floats2half2_rn(a, b); }
  __half2 values[16];
};

template <int kTile>
using Sums = float[2][kTile / 16][4];

// sum = the tile's products over all `cols` inputs. `row` is row thread / 2 of the tile's weights; source[i]
// the activations of column thread / 8 + 32 i, null for none. Warp w has rows 32 (w % 4) on and columns
// kTile / 2 * (w / 4) on.
template <int kTile>
__device__ __forceinline__ void MultiplyTile(__half* shared, int type, const uint8_t* row, int cols,
                                             const uint16_t* const (&source)[kTile / 32], Sums<kTile>& sum) {
  __half* const w_tile = shared;                           // [2][kTileRows][kPitch]
  __half* const x_tile = shared + 2 * kTileRows * kPitch;  // [2][kTile][kPitch]
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int steps = (cols + kDepth - 1) / kDepth;
  const int w_row = thread >> 1, w_half = thread & 1;  // this thread decodes 32 values of a row
  Raw raw;
  auto load_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    if (chunk * 32 < cols) LoadRaw(type, row, cols, chunk, raw);
  };
  auto store_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    uint4* to = reinterpret_cast<uint4*>(w_tile + ((step & 1) * kTileRows + w_row) * kPitch + w_half * 32);
    HalfRow out;
    if (chunk * 32 < cols) {
      DecodeRaw(type, raw, chunk, out);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) out.values[i] = __half2half2(__ushort_as_half(0));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* bits = reinterpret_cast<const uint32_t*>(&out.values[4 * i]);
      to[i] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  };
  auto copy_activations = [&](int step) {
    const int part = thread & 7, k = step * kDepth + part * 8;
#pragma unroll
    for (int i = 0; i < kTile / 32; ++i) {
      const int j = (thread >> 3) + 32 * i;
      const bool valid = source[i] != nullptr && k < cols;
      const void* from = valid ? static_cast<const void*>(source[i] + k) : static_cast<const void*>(row);
      CopyAsync16(SharedAddress(x_tile + ((step & 1) * kTile + j) * kPitch + part * 8), from, valid);
    }
    CommitCopies();
  };

  constexpr int kColumnTiles = kTile / 16;  // of 8 columns, a warp
  const int warp_row = (warp & 3) * 32, warp_column = (warp >> 2) * (kTile / 2);
  copy_activations(0);
  load_weights(0);
  store_weights(0);
  for (int step = 0; step < steps; ++step) {
    WaitCopies<0>();
    __syncthreads();  // tile `step` is complete, and nobody reads the one before any more
    const bool more = step + 1 < steps;
    if (more) {
      copy_activations(step + 1);
      load_weights(step + 1);
    }
    const __half* w = w_tile + (step & 1) * kTileRows * kPitch;
    const __half* x = x_tile + (step & 1) * kTile * kPitch;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        LoadMatrix4(a[m],
                    SharedAddress(w + (warp_row + m * 16 + (lane & 15)) * kPitch + k + (lane >> 4) * 8));
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[4];
        const int column = warp_column + n * 8 + (lane & 7) + (lane >> 4) * 8;
        LoadMatrix4(b, SharedAddress(x + column * kPitch + k + (lane >> 3 & 1) * 8));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          MmaF16(sum[m][n], a[m], b[0], b[1]);
          MmaF16(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (more) store_weights(step + 1);
  }
}

// The columns of the tile that this thread copies: pairs first + j below `count`, through `at`.
template <int kTile, typename At>
__device__ __forceinline__ void Sources(const uint16_t* (&source)[kTile / 32], int first, int count, At at) {
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) {
    const int j = first + (threadIdx.x >> 3) + 32 * i;
    source[i] = j < count ? at(j) : nullptr;
  }
}

// f(column, n, i) for each of this thread's columns: sum[*][n][i] and sum[*][n][2 + i] are its values.
template <int kTile, typename F>
__device__ __forceinline__ void EachColumn(int first, int count, F f) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int column = first + (warp >> 2) * (kTile / 2) + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < kTile / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = column + n * 8 + i;
      if (j < count) f(j, n, i);
    }
  }
}

// Grid: tiles of 64 rows, tiles of pairs, experts.
template <int kTile>
__global__ void __launch_bounds__(kThreads) GateUp(const __grid_constant__ GateUpParams p) {
  extern __shared__ __align__(16) __half shared[];
  const int expert = blockIdx.z, first = blockIdx.y * kTile;
  const int count = p.count[expert], begin = p.begin[expert];
  if (first >= count) return;
  const int first_row = blockIdx.x * (kTileRows / 2);
  const int w_row = threadIdx.x >> 1;
  const bool up = (w_row & 16) != 0;  // the same for a whole warp
  const int r = min(first_row + (w_row >> 5) * 16 + (w_row & 15), p.inner - 1);
  const GroupedWeights& w = up ? p.up : p.gate;
  const uint16_t* source[kTile / 32];
  Sources<kTile>(source, first, count,
                 [&](int j) { return p.h + static_cast<int64_t>(p.pair_token[begin + j]) * p.hidden; });
  float sum[2][kTile / 16][4] = {};
  MultiplyTile<kTile>(shared, w.type, w.data[expert] + r * w.row_bytes, p.hidden, source, sum);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = first_row + (warp & 3) * 16 + (lane >> 2);
  EachColumn<kTile>(first, count, [&](int j, int n, int i) {
    const float scale = __ldg(p.h_scale + p.pair_token[begin + j]);
    float* to = p.middle + static_cast<int64_t>(begin + j) * p.inner;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float gate = sum[0][n][half * 2 + i] * scale, value = sum[1][n][half * 2 + i] * scale;
      if (row + half * 8 < p.inner) to[row + half * 8] = gate / (1.0f + expf(-gate)) * value;
    }
  });
}

// Grid: tiles of 128 rows, tiles of pairs.
template <int kTile>
__global__ void __launch_bounds__(kThreads) Down(const __grid_constant__ DownParams p) {
  extern __shared__ __align__(16) __half shared[];
  const int first = blockIdx.y * kTile, first_row = blockIdx.x * kTileRows;
  const int r = min(first_row + static_cast<int>(threadIdx.x >> 1), p.hidden - 1);
  const uint16_t* source[kTile / 32];
  Sources<kTile>(source, first, p.count, [&](int j) { return p.h + static_cast<int64_t>(j) * p.inner; });
  float sum[2][kTile / 16][4] = {};
  MultiplyTile<kTile>(shared, p.type, p.data + r * p.row_bytes, p.inner, source, sum);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = first_row + (warp & 3) * 32 + (lane >> 2);
  EachColumn<kTile>(first, p.count, [&](int j, int n, int i) {
    const float scale = __ldg(p.h_scale + j) * __ldg(p.pair_weight + j);
    float* to = p.x + static_cast<int64_t>(p.pair_token[j]) * p.hidden;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + m * 16 + half * 8;
        if (at < p.hidden) to[at] = fmaf(sum[m][n][half * 2 + i], scale, to[at]);
      }
    }
  });
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

template <int kTile>
void LaunchTiles(const GateUpParams& p, int32_t most, cudaStream_t stream) {
  const dim3 grid(Tiles(p.inner, kTileRows / 2), Tiles(most, kTile), static_cast<unsigned>(p.experts));
  GateUp<kTile><<<grid, kThreads, SharedBytes<kTile>(), stream>>>(p);
}

template <int kTile>
void LaunchTiles(const DownParams& p, cudaStream_t stream) {
  const dim3 grid(Tiles(p.hidden, kTileRows), Tiles(p.count, kTile));
  Down<kTile><<<grid, kThreads, SharedBytes<kTile>(), stream>>>(p);
}

template <typename Kernel>
cudaError_t AllowShared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

cudaError_t PrepareGroupedProducts() {
  for (const cudaError_t e :
       {AllowShared(GateUp<kWide>, SharedBytes<kWide>()),
        AllowShared(GateUp<kNarrow>, SharedBytes<kNarrow>()), AllowShared(Down<kWide>, SharedBytes<kWide>()),
        AllowShared(Down<kNarrow>, SharedBytes<kNarrow>())}) {
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t LaunchSortPairs(const SortPairsParams& p, cudaStream_t stream) {
  if (p.experts <= 0) return cudaSuccess;
  if (p.k < 1 || p.n < 0 || p.n * p.k > INT32_MAX) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(p.experts);
  CountPairs<<<blocks, kSortThreads, 0, stream>>>(p);
  PlacePairs<<<blocks, kSortThreads, 0, stream>>>(p);
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
  if (most > kNarrow) {
    LaunchTiles<kWide>(p, most, stream);
  } else {
    LaunchTiles<kNarrow>(p, most, stream);
  }
  return cudaGetLastError();
}

cudaError_t LaunchDown(const DownParams& p, cudaStream_t stream) {
  if (p.hidden <= 0 || !Usable(p.type, p.inner)) return cudaErrorInvalidValue;
  if (p.count <= 0) return cudaSuccess;
  if (p.count > kNarrow) {
    LaunchTiles<kWide>(p, stream);
  } else {
    LaunchTiles<kNarrow>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
