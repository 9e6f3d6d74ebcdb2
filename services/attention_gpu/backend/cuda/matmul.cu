// Products with many columns, of one matrix or of one for each head.
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/many_columns.cuh"

namespace tandem::attention::cuda {
namespace {

// The columns from `column` on, every 32nd.
struct Columns {
  __device__ __forceinline__ Columns(const ProductParams& p, int64_t batch, int column)
      : left(p.columns - column),
        first(p.x.h + (batch * p.x_batch + min(column, p.columns - 1) * p.x_column) * p.w.cols),
        apart(32 * p.x_column * p.w.cols) {}
  __device__ __forceinline__ bool Has(int i) const { return 32 * i < left; }
  __device__ __forceinline__ const uint16_t* At(int i) const { return Has(i) ? first + i * apart : first; }
  int left;
  const uint16_t* first;
  int64_t apart;
};

template <int kTile>
__global__ void __launch_bounds__(kProductThreads, ProductTile<kTile>::kBlocks)
    MatMul(const __grid_constant__ ProductParams p) {
  using T = ProductTile<kTile>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread & 31;
  const int64_t batch = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int first_column = blockIdx.y * kTile;
  const int cols = static_cast<int>(p.w.cols);
  const uint8_t* row =
      p.w.data + (batch * p.w.rows + min(first_row + (thread >> 1), p.w.rows - 1)) * p.w.row_bytes;
  const Columns source(p, batch, first_column + (thread >> 3));
  typename T::Sums sum = {};
  MultiplyTile<kTile>(shared, p.w.type, row, cols, source, sum);

  auto scale_of = [&](int j) {
    return p.x.h_scale != nullptr ? __ldg(p.x.h_scale + batch * p.x_batch + j * p.x_column) : 1.0f;
  };
  if (p.y_half != nullptr) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      const int block = first_column + T::WarpColumn() + n * 8, mine = block + 2 * (lane & 3);
      const float scale[2] = {scale_of(min(mine, p.columns - 1)), scale_of(min(mine + 1, p.columns - 1))};
      const int j = block + (lane >> 2);  // after the transposition
      uint16_t* to = p.y_half + batch * p.y_batch + j * p.y_column;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const __half2 pair =
              __floats2half2_rn(sum[m][n][half * 2] * scale[0], sum[m][n][half * 2 + 1] * scale[1]);
          const uint32_t rows = Transposed(*reinterpret_cast<const uint32_t*>(&pair));
          const int64_t r = first_row + T::WarpRow() + m * 16 + half * 8 + 2 * (lane & 3);
          if (r < p.w.rows && j < p.columns) *reinterpret_cast<uint32_t*>(to + r) = rows;
        }
      }
    }
    return;
  }
  // All that is added to is read before anything is written, so that the reads need not wait for each other.
  const int64_t at = first_row + T::WarpRow() + (lane >> 2);
  auto each = [&](const auto& f) {
    EachColumn<kTile>(first_column, p.columns, [&](int j, int n, int i) {
      float* y = p.y + batch * p.y_batch + j * p.y_column;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = at + m * 16 + half * 8;
          if (r < p.w.rows) f(j, y[r], sum[m][n][half * 2 + i]);
        }
      }
    });
  };
  if (p.accumulate) {
    each([&](int j, float& y, float& v) { v = fmaf(v, scale_of(j), y); });
    each([&](int, float& y, float& v) { y = v; });
  } else {
    each([&](int j, float& y, float& v) { y = v * scale_of(j); });
  }
}

int64_t Tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

template <int kTile>
void Launch(const ProductParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(Tiles(p.w.rows, kTileRows)),
                  static_cast<unsigned>(Tiles(p.columns, kTile)), static_cast<unsigned>(p.batches));
  MatMul<kTile><<<grid, kProductThreads, ProductTile<kTile>::kBytes, stream>>>(p);
}

template <int kTile>
cudaError_t AllowShared() {
  return cudaFuncSetAttribute(MatMul<kTile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              ProductTile<kTile>::kBytes);
}

}  // namespace

cudaError_t PrepareMatMul() {
  for (const cudaError_t e : {AllowShared<256>(), AllowShared<128>(), AllowShared<64>()}) {
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t LaunchMatMul(const ProductParams& p, cudaStream_t stream) {
  if (p.columns <= 0 || p.w.rows <= 0 || p.batches <= 0) return cudaSuccess;
  if (p.w.type == kF32 || ShapeOf(p.w.type).bytes == 0 || p.w.cols % 32 != 0) return cudaErrorInvalidValue;
  if (p.y_half != nullptr && (p.accumulate || (p.w.rows | p.y_batch | p.y_column) % 2 != 0)) {
    return cudaErrorInvalidValue;
  }
  const int tile = p.tile != 0 ? p.tile : TileFor(p.columns, [&](int columns) {
    return Tiles(p.w.rows, kTileRows) * Tiles(p.columns, columns) * p.batches;
  });
  if (tile == 256) {
    Launch<256>(p, stream);
  } else if (tile == 128) {
    Launch<128>(p, stream);
  } else {
    Launch<64>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
