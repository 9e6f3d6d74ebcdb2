// Products with few columns. A group of lanes shares the inputs of kRows rows, lane l taking chunks l, l +
// lanes,
// ...; the lanes' sums are then added as a tree. The order of additions depends on the shape of the weight
// alone.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 128;

// 8 values of a float row.
template <int kType>
__device__ __forceinline__ void LoadFloats(const uint8_t* row, int c, float* w) {
  if constexpr (kType == kF32) {
    const uint4 a = Load16(row + c * 32), b = Load16(row + c * 32 + 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = __uint_as_float(WordOf(a, b, i));
  } else {
    const uint4 v = Load16(row + c * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = WordOf(v, v, i);
      w[2 * i] = kType == kF16 ? HalfBits(word & 0xffff) : __uint_as_float(word << 16);
      w[2 * i + 1] = kType == kF16 ? HalfBits(word >> 16) : __uint_as_float(word & 0xffff0000u);
    }
  }
}

template <int kType, int kColumns, int kRows>
__device__ __forceinline__ void FloatRows(const ProductParams& p, const uint8_t* const (&row)[kRows],
                                          const int64_t (&x_row)[kColumns], int lane, int lanes,
                                          float (&sum)[kRows][kColumns]) {
  const int chunks = static_cast<int>(p.w.cols) >> 3;
#pragma unroll(kColumns <= 2 ? 4 : 1)
  for (int c = lane; c < chunks; c += lanes) {
    float w[kRows][8];
#pragma unroll
    for (int r = 0; r < kRows; ++r) LoadFloats<kType>(row[r], c, w[r]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float4* x = reinterpret_cast<const float4*>(p.x.x + x_row[j] * p.x.x_stride) + 2 * c;
      const float4 a = __ldg(x), b = __ldg(x + 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float s = sum[r][j];
        s = fmaf(w[r][0], a.x, s), s = fmaf(w[r][1], a.y, s), s = fmaf(w[r][2], a.z, s),
        s = fmaf(w[r][3], a.w, s);
        s = fmaf(w[r][4], b.x, s), s = fmaf(w[r][5], b.y, s), s = fmaf(w[r][6], b.z, s),
        s = fmaf(w[r][7], b.w, s);
        sum[r][j] = s;
      }
    }
  }
}

template <int kType, int kColumns, int kRows>
__global__ void __launch_bounds__(kThreads) MatVec(const ProductParams p, int lanes, int first_column) {
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t first = group * kRows;
  const int64_t batch = blockIdx.y;
  const uint8_t* row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Lanes without a row work on the last one, so that all take part in the shuffles.
    row[r] = p.w.data + (batch * p.w.rows + min(first + r, p.w.rows - 1)) * p.w.row_bytes;
  }
  int64_t x_row[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    x_row[j] = batch * p.x_batch + min(first_column + j, p.columns - 1) * p.x_column;
  }
  float sum[kRows][kColumns] = {};
  FloatRows<kType, kColumns, kRows>(p, row, x_row, lane, lanes, sum);
  __shared__ float parts[kThreads / 32][kRows * kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      for (int step = min(lanes, 32) >> 1; step > 0; step >>= 1) {
        sum[r][j] += __shfl_xor_sync(0xffffffffu, sum[r][j], step);
      }
      if (lanes > 32 && (lane & 31) == 0) parts[lane >> 5][r * kColumns + j] = sum[r][j];
    }
  }
  if (lanes > 32) __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = first_column + j;
      if (lane != (r * kColumns + j) % lanes || first + r >= p.w.rows || column >= p.columns) continue;
      float s = sum[r][j];
      if (lanes > 32) {
        s = 0;
        for (int warp = 0; warp < lanes / 32; ++warp) s += parts[warp][r * kColumns + j];
      }
      float* y = p.y + batch * p.y_batch + column * p.y_column + first + r;
      *y = p.accumulate ? *y + s : s;
    }
  }
}

template <int kType, int kColumns>
void Launch(const ProductParams& p, int first_column, cudaStream_t stream) {
  constexpr int kRows = kColumns >= 4 ? 2 : 1;
  const int64_t chunks = p.w.cols / 8;
  int lanes = p.w.rows <= 4096 && chunks >= 4 * kThreads ? kThreads : 32;  // few rows, all of them long
  while (lanes > 4 && chunks < lanes) lanes /= 2;
  const int64_t groups = (p.w.rows + kRows - 1) / kRows;
  const int64_t per_block = kThreads / lanes;
  const dim3 grid(static_cast<unsigned>((groups + per_block - 1) / per_block),
                  static_cast<unsigned>(p.batches));
  MatVec<kType, kColumns, kRows><<<grid, kThreads, 0, stream>>>(p, lanes, first_column);
}

template <int kType>
cudaError_t ForColumns(const ProductParams& p, cudaStream_t stream) {
  for (int first = 0; first < p.columns; first += 16) {
    const int n = p.columns - first;
    if (n == 1) {
      Launch<kType, 1>(p, first, stream);
    } else if (n == 2) {
      Launch<kType, 2>(p, first, stream);
    } else if (n <= 4) {
      Launch<kType, 4>(p, first, stream);
    } else if (n <= 8) {
      Launch<kType, 8>(p, first, stream);
    } else {
      Launch<kType, 16>(p, first, stream);
    }
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchMatVec(const ProductParams& p, cudaStream_t stream) {
  if (p.columns <= 0 || p.w.rows <= 0 || p.batches <= 0) return cudaSuccess;
  if (p.columns > kMaxColumns && p.w.type != kF32) return cudaErrorInvalidValue;
  switch (p.w.type) {
    case kF32:
      return ForColumns<kF32>(p, stream);
    case kF16:
      return ForColumns<kF16>(p, stream);
    case kBF16:
      return ForColumns<kBF16>(p, stream);
    default:
      return LaunchInt8Product(p, stream);
  }
}

}  // namespace tandem::attention::cuda
