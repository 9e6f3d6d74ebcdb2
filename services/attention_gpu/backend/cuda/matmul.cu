// Products with many columns: a block computes kTileRows weight rows times kTile columns, 64 inputs at a
// time. Weights come as blocks, are decoded to float16 in registers while the tensor cores work on the tile
// before, and go to shared memory; activations come by asynchronous copies. One kernel for all types: the
// type is looked at once per 32 values.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/mma.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 128;
constexpr int kDepth = 64;
constexpr int kPitch = kDepth + 8;        // values; 144 bytes: eight rows of a matrix load meet all 32 banks
constexpr int kWide = 128, kNarrow = 64;  // columns of a tile

template <int kTile>
constexpr int SharedBytes() {
  return 2 * (kTileRows + kTile) * kPitch * static_cast<int>(sizeof(__half));
}

struct HalfRow {
  __device__ __forceinline__ void Put(int i, float a, float b) { values[i / 2] = __floats2half2_rn(a, b); }
  __half2 values[16];
};

template <int kTile>
__global__ void __launch_bounds__(kThreads) MatMul(const ProductParams p) {
  extern __shared__ __align__(16) __half shared[];
  __half* const w_tile = shared;                           // [2][kTileRows][kPitch]
  __half* const x_tile = shared + 2 * kTileRows * kPitch;  // [2][kTile][kPitch]
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int64_t batch = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int first_column = blockIdx.y * kTile;
  const int cols = static_cast<int>(p.w.cols);
  const int steps = (cols + kDepth - 1) / kDepth;

  // This thread's part of a weight tile: 32 values of one row.
  const int w_row = thread >> 1, w_half = thread & 1;
  const uint8_t* row = p.w.data + (batch * p.w.rows + min(first_row + w_row, p.w.rows - 1)) * p.w.row_bytes;
  Raw raw;
  auto load_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    if (chunk * 32 < cols) LoadRaw(p.w.type, row, cols, chunk, raw);
  };
  auto store_weights = [&](int step) {
    const int chunk = step * 2 + w_half;
    uint4* to = reinterpret_cast<uint4*>(w_tile + ((step & 1) * kTileRows + w_row) * kPitch + w_half * 32);
    if (chunk * 32 < cols) {
      HalfRow out;
      DecodeRaw(p.w.type, raw, chunk, out);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 v;
        v.x = *reinterpret_cast<const uint32_t*>(&out.values[4 * i]);
        v.y = *reinterpret_cast<const uint32_t*>(&out.values[4 * i + 1]);
        v.z = *reinterpret_cast<const uint32_t*>(&out.values[4 * i + 2]);
        v.w = *reinterpret_cast<const uint32_t*>(&out.values[4 * i + 3]);
        to[i] = v;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = make_uint4(0, 0, 0, 0);
    }
  };
  auto copy_activations = [&](int step) {
    constexpr int kParts = kDepth / 8;  // of 16 bytes a column
#pragma unroll
    for (int i = thread; i < kTile * kParts; i += kThreads) {
      const int j = i / kParts, part = i % kParts, k = step * kDepth + part * 8;
      const bool valid = first_column + j < p.columns && k < cols;
      const int64_t x_row = batch * p.x_batch + (first_column + j) * p.x_column;
      const uint16_t* from = valid ? p.x.h + x_row * cols + k : p.x.h;
      CopyAsync16(SharedAddress(x_tile + ((step & 1) * kTile + j) * kPitch + part * 8), from, valid);
    }
    CommitCopies();
  };

  // Warps: 4 over the rows, 2 over the columns; each 32 rows times kTile / 2 columns.
  constexpr int kColumnTiles = kTile / 16;  // of 8 columns, a warp
  const int warp_row = (warp & 3) * 32, warp_column = (warp >> 2) * (kTile / 2);
  float sum[2][kColumnTiles][4] = {};

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

#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first_column + warp_column + n * 8 + 2 * (lane & 3) + i;
      if (column >= p.columns) continue;
      const float scale = __ldg(p.x.h_scale + batch * p.x_batch + column * p.x_column);
      float* y = p.y + batch * p.y_batch + column * p.y_column;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = first_row + warp_row + m * 16 + half * 8 + (lane >> 2);
          if (r >= p.w.rows) continue;
          const float v = sum[m][n][half * 2 + i] * scale;
          y[r] = p.accumulate ? y[r] + v : v;
        }
      }
    }
  }
}

template <int kTile>
void Launch(const ProductParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.w.rows + kTileRows - 1) / kTileRows),
                  static_cast<unsigned>((p.columns + kTile - 1) / kTile), static_cast<unsigned>(p.batches));
  MatMul<kTile><<<grid, kThreads, SharedBytes<kTile>(), stream>>>(p);
}

}  // namespace

cudaError_t PrepareMatMul() {
  const cudaError_t e =
      cudaFuncSetAttribute(MatMul<kWide>, cudaFuncAttributeMaxDynamicSharedMemorySize, SharedBytes<kWide>());
  if (e != cudaSuccess) return e;
  return cudaFuncSetAttribute(MatMul<kNarrow>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              SharedBytes<kNarrow>());
}

cudaError_t LaunchMatMul(const ProductParams& p, cudaStream_t stream) {
  if (p.columns <= 0 || p.w.rows <= 0 || p.batches <= 0) return cudaSuccess;
  if (p.w.type == kF32 || ShapeOf(p.w.type).bytes == 0 || p.w.cols % 32 != 0) return cudaErrorInvalidValue;
  if (p.columns > kNarrow) {
    Launch<kWide>(p, stream);
  } else {
    Launch<kNarrow>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
