// Products with many columns, of one matrix or of one for each head.
#include <cstdlib>
#include <string_view>

#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/many_columns.cuh"

namespace tandem::attention::cuda {
namespace {

// The columns from `column` on, every 32nd; places in values, below 2^32 (LaunchMatMul).
struct Columns {
  __device__ __forceinline__ Columns(const ProductParams& p, int64_t batch, int column)
      : h(p.x.h + batch * p.x_batch * p.w.cols),
        left(p.columns - column),
        first(static_cast<uint32_t>(min(column, p.columns - 1) * p.x_column * p.w.cols)),
        apart(static_cast<uint32_t>(32 * p.x_column * p.w.cols)) {}
  __device__ __forceinline__ bool Has(int i) const { return 32 * i < left; }
  __device__ __forceinline__ const uint16_t* At(int i) const {
    return h + (Has(i) ? first + i * apart : first);
  }
  const uint16_t* h;
  int left;
  uint32_t first, apart;
};

// The block's part of the product by tile T, from column `first_column` on.
template <typename T>
__device__ __forceinline__ void MatMulTile(const ProductParams& p, unsigned char* shared, int first_column) {
  const int thread = threadIdx.x, lane = thread & 31;
  const int64_t batch = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int cols = static_cast<int>(p.w.cols);
  const uint8_t* row =
      p.w.data + (batch * p.w.rows + min(first_row + (thread >> 1), p.w.rows - 1)) * p.w.row_bytes;
  const Columns source(p, batch, first_column + (thread >> 3));
  typename T::Sums sum = {};
  MultiplyTile<T>(shared, p.w.type, row, cols, source, sum);

  const float* scale = OfColumns<T, float>(shared, [&](int c) {
    const int j = first_column + c;
    if (p.x.h_scale == nullptr || j >= p.columns) return 1.0f;
    return __ldg(p.x.h_scale + batch * p.x_batch + j * p.x_column);
  });
  if (p.y_half != nullptr) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      const int block = T::WarpColumn() + n * 8, mine = block + 2 * (lane & 3);
      const int j = first_column + block + (lane >> 2);  // after the transposition
      uint16_t* to = p.y_half + batch * p.y_batch + j * p.y_column;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const __half2 pair =
              __floats2half2_rn(sum[m][n][half * 2] * scale[mine], sum[m][n][half * 2 + 1] * scale[mine + 1]);
          const uint32_t rows = Transposed(*reinterpret_cast<const uint32_t*>(&pair));
          const int64_t r = first_row + T::WarpRow() + m * 16 + half * 8 + 2 * (lane & 3);
          if (r < p.w.rows && j < p.columns) *reinterpret_cast<uint32_t*>(to + r) = rows;
        }
      }
    }
    return;
  }
  const int64_t at = first_row + T::WarpRow() + (lane >> 2);
  EachColumn<T>(p.columns - first_column, [&](int c, int n, int i) {
    float* y = p.y + batch * p.y_batch + (first_column + c) * p.y_column;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = at + m * 16 + half * 8;
        if (r >= p.w.rows) continue;
        const float v = sum[m][n][half * 2 + i] * scale[c];
        if (p.accumulate) {
          AddTo(y + r, v);
        } else {
          y[r] = v;
        }
      }
    }
  });
}

// By warpgroups one block of 128 columns or more a processor: two leave too few registers, and tiles that are
// not the widest are for few blocks.
template <typename T>
__global__ void __launch_bounds__(kProductThreads, T::kWarpgroups&& T::kTile > 64 ? 1 : T::kBlocks)
    MatMul(const __grid_constant__ ProductParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int first = blockIdx.y * T::kTile;
  WithTileFor<T::kTile, T::kWarpgroups>(p.columns - first,
                                        [&](auto tile) { MatMulTile<decltype(tile)>(p, shared, first); });
}

int64_t Tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

}  // namespace

bool CanUseWarpgroups() {
#ifdef TANDEM_WARPGROUPS
  static const bool can = [] {
    const char* without = std::getenv("TANDEM_NO_WARPGROUPS");
    int device = 0, major = 0, minor = 0;
    return (without == nullptr || std::string_view(without) != "1") &&
           cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0;
  }();
  return can;
#else
  return false;
#endif
}

cudaError_t PrepareMatMul() {
  return ForEachTile([](auto tile) { return AllowShared(MatMul<decltype(tile)>, tile.kBytes); });
}

cudaError_t LaunchMatMul(const ProductParams& p, cudaStream_t stream) {
  if (p.columns <= 0 || p.w.rows <= 0 || p.batches <= 0) return cudaSuccess;
  if (p.w.type == kF32 || ShapeOf(p.w.type).bytes == 0 || p.w.cols % 32 != 0) return cudaErrorInvalidValue;
  if (p.columns * p.x_column * p.w.cols > UINT32_MAX) return cudaErrorInvalidValue;
  if (p.y_half != nullptr && (p.accumulate || (p.w.rows | p.y_batch | p.y_column) % 2 != 0)) {
    return cudaErrorInvalidValue;
  }
  const int tile = p.tile != 0 ? p.tile : TileFor(p.columns, [&](int columns) {
    return Tiles(p.w.rows, kTileRows) * Tiles(p.columns, columns) * p.batches;
  });
  WithTile(tile, [&](auto t) {
    const dim3 grid(static_cast<unsigned>(Tiles(p.w.rows, kTileRows)),
                    static_cast<unsigned>(Tiles(p.columns, t.kTile)), static_cast<unsigned>(p.batches));
    MatMul<decltype(t)><<<grid, kProductThreads, t.kBytes, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
