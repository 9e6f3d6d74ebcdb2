// Products with few columns: float weights, and the choice of the kernel.
//
// F16, BF16 and F32 weights meet float32 activations on tensor cores in tf32, which has 11 bits: an
// activation is cut into its first 11 bits and the next 11, an F32 weight too. What is left out is below
// 2^-21 of a product.
//
// F32 matrices of few rows (a router) would give most of the device nothing to do that way: with few columns,
// a block multiplies one row with one, two or four columns.
#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/few_columns.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/reduce.cuh"

namespace tandem::attention::cuda {
namespace {

// The first 11 bits of v, and what is left (NaN for infinity).
__device__ __forceinline__ void Cut(float v, uint32_t* first, uint32_t* rest) {
  *first = __float_as_uint(v) & 0xffffe000u;
  *rest = __float_as_uint(v - __uint_as_float(*first));
}

// Lane (g, t): column g; null where there is none.
struct FloatColumns {
  static constexpr int kBytes = 0;
  const float* x;

  __device__ __forceinline__ FloatColumns(const FewColumns& p, int64_t batch, int first, int lane) {
    const int column = first + (lane >> 2);
    x = column < p.columns ? p.x.x + (batch * p.x_batch + column * p.x_column) * p.x.x_stride : nullptr;
  }
};

// 128 values (F32: 64) of a row, 32 at a time. Lane (g, t) holds values 8 t to 8 t + 7 of the 32; product j
// of four takes values 8 t + 2 j and the next.
template <int kType>
struct FloatUnit {
  using Columns = FloatColumns;
  using One = void;
  static constexpr bool kWide = kType == kF32;
  static constexpr int kChunks = kWide ? 2 : 4;
  static constexpr int kLoads = kWide ? 2 : 1;  // of 16 bytes, for 8 values
  uint4 v[2][kChunks][kLoads];

  static TANDEM_HOST_DEVICE int Count(int cols) { return ((cols >> 5) + kChunks - 1) / kChunks; }

  __device__ __forceinline__ void Load(const uint8_t* const (&row)[2], int cols, int unit, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = min(unit * kChunks + c, (cols >> 5) - 1);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          v[r][c][i] = Constant16(row[r] + ((chunk * 4 + (lane & 3)) * kLoads + i) * 16);
        }
      }
    }
  }

  // Value i of the eight.
  __device__ __forceinline__ float Value(int r, int c, int i) const {
    if constexpr (kWide) {
      return __uint_as_float(WordOf(v[r][c][0], v[r][c][kLoads - 1], i));
    } else {
      const uint32_t word = WordOf(v[r][c][0], v[r][c][0], i >> 1);
      if (kType == kF16) return HalfBits(i & 1 ? word >> 16 : word & 0xffff);
      return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
    }
  }

  __device__ __forceinline__ void Add(int cols, int unit, int lane, const Columns& x, float (&sum)[4]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = unit * kChunks + c;
      const bool valid = chunk < cols >> 5;  // else the activations are zeros
      float4 values[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
      if (valid && x.x != nullptr) {
        const float4* from = reinterpret_cast<const float4*>(x.x) + (chunk * 4 + (lane & 3)) * 2;
        values[0] = from[0];
        values[1] = from[1];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[4], a_rest[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float w = Value(i & 1, c, 2 * j + (i >> 1));
          if (kWide) {
            Cut(w, &a[i], &a_rest[i]);
          } else {
            a[i] = __float_as_uint(w);
          }
        }
        const float4& four = values[j >> 1];
        uint32_t b[2], b_rest[2];
        Cut(j & 1 ? four.z : four.x, &b[0], &b_rest[0]);
        Cut(j & 1 ? four.w : four.y, &b[1], &b_rest[1]);
        if (kWide) MmaTf32(sum, a_rest, b[0], b[1]);
        MmaTf32(sum, a, b_rest[0], b_rest[1]);
        MmaTf32(sum, a, b[0], b[1]);
      }
    }
  }
};

constexpr int kRowThreads = 128;
constexpr int64_t kFewRows = 1024;

// The weights of a row are read before the activations are there, as far as they fit; then kTogether values
// of each column at a time.
template <int kColumns>
__global__ void __launch_bounds__(kRowThreads) RowProduct(const __grid_constant__ ProductParams p) {
  constexpr int kAhead = 16, kTogether = 4;  // of a thread, four values each
  LetNextBegin();
  const int64_t row = blockIdx.y, batch = blockIdx.z;
  const int first_column = blockIdx.x * kColumns;
  const float4* w = reinterpret_cast<const float4*>(p.w.data + (batch * p.w.rows + row) * p.w.row_bytes);
  const int fours = static_cast<int>(p.w.cols) >> 2;
  auto weight = [&](int k) {
    const int i = threadIdx.x + k * kRowThreads;
    const uint4 v = i < fours ? Constant16(w + i) : make_uint4(0, 0, 0, 0);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
  };
  float4 ahead[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) ahead[k] = weight(k);
  AwaitEarlier();
  const float4* x[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = min(first_column + j, p.columns - 1);
    x[j] = reinterpret_cast<const float4*>(p.x.x + (batch * p.x_batch + column * p.x_column) * p.x.x_stride);
  }
  const bool scaled = p.x.factors.squares != nullptr && threadIdx.x < 32;
  float squares = 0;  // of the column that four lanes have, up to column kColumns - 1
  if (scaled) {
    const int column =
        min(first_column + min(static_cast<int>(threadIdx.x) >> 2, kColumns - 1), p.columns - 1);
    squares = PartOfSquares(p.x.factors, column);
  }
  float sum[kColumns] = {};
  auto add = [&](int first, const float4* a) {
    float4 b[kTogether][kColumns];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = threadIdx.x + (first + k) * kRowThreads;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) b[k][j] = i < fours ? x[j][i] : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[j] = fmaf(a[k].x, b[k][j].x, sum[j]), sum[j] = fmaf(a[k].y, b[k][j].y, sum[j]);
        sum[j] = fmaf(a[k].z, b[k][j].z, sum[j]), sum[j] = fmaf(a[k].w, b[k][j].w, sum[j]);
      }
    }
  };
#pragma unroll
  for (int k = 0; k < kAhead; k += kTogether) add(k, ahead + k);
  for (int k = kAhead; k * kRowThreads < fours; k += kTogether) {
    const float4 a[kTogether] = {weight(k), weight(k + 1), weight(k + 2), weight(k + 3)};
    add(k, a);
  }
  const float factors = scaled ? FactorOf(p.x.factors, squares) : 1.0f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    float total = BlockReduce<kRowThreads>(sum[j], [](float a, float b) { return a + b; });
    if (scaled) total *= __shfl_sync(0xffffffffu, factors, 4 * j);
    if (threadIdx.x != 0 || first_column + j >= p.columns) continue;
    float* y = p.y + batch * p.y_batch + (first_column + j) * p.y_column + row;
    *y = p.accumulate ? *y + total : total;
  }
}

// By the shape alone, for up to kMaxColumns columns.
bool OneRowABlock(const ProductParams& p) {
  return p.w.type == kF32 && p.w.rows * p.batches <= kFewRows && p.columns <= kMaxColumns;
}

cudaError_t LaunchRowProduct(const ProductParams& p, cudaStream_t stream) {
  const int columns = p.columns > 2 ? 4 : p.columns;
  // Blocks of the same row are neighbours: it is read from memory once.
  const dim3 grid(static_cast<unsigned>((p.columns + columns - 1) / columns), static_cast<unsigned>(p.w.rows),
                  static_cast<unsigned>(p.batches));
  return LaunchEarly(columns == 1   ? RowProduct<1>
                     : columns == 2 ? RowProduct<2>
                                    : RowProduct<4>,
                     grid, kRowThreads, 0, stream, p);
}

bool SameActivations(const ProductParams& a, const ProductParams& b) {
  return a.x.x == b.x.x && a.x.x_stride == b.x.x_stride && a.x.q == b.x.q &&
         a.x.factors.squares == b.x.factors.squares && a.x_batch == b.x_batch && a.x_column == b.x_column &&
         a.columns == b.columns && a.batches == b.batches;
}

// Of one type, width and activations.
cudaError_t LaunchSome(const ProductParams* p, int count, cudaStream_t stream) {
  switch (p->w.type) {
    case kF32:
      return LaunchFewColumns<FloatUnit<kF32>>(p, count, stream);
    case kF16:
      return LaunchFewColumns<FloatUnit<kF16>>(p, count, stream);
    case kBF16:
      return LaunchFewColumns<FloatUnit<kBF16>>(p, count, stream);
    default:
      return LaunchInt8Products(p, count, stream);
  }
}

}  // namespace

int ProcessorsOfDevice() {
  static const int processors = [] {
    int device = 0, count = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? count
               : 1;
  }();
  return processors;
}

bool CanForm(const ProductParams& p) {
  if (OneRowABlock(p) || p.w.rows % 32 != 0) return false;
  const auto cols = static_cast<int>(p.w.cols);
  int units = 0;
  switch (p.w.type) {
    case kF32:
      units = FloatUnit<kF32>::Count(cols);
      break;
    case kF16:
    case kBF16:
      units = FloatUnit<kF16>::Count(cols);
      break;
    default:
      units = Int8UnitsOf(p.w.type, cols);
  }
  return SharesOf(p, units) <= 4;
}

cudaError_t LaunchMatVec(const ProductParams& p, cudaStream_t stream) { return LaunchMatVecs(&p, 1, stream); }

cudaError_t LaunchMatVecs(const ProductParams* p, int count, cudaStream_t stream) {
  for (int at = 0; at < count;) {
    const ProductParams& first = p[at];
    if (first.columns > kMaxColumns && first.w.type != kF32) return cudaErrorInvalidValue;
    if (first.form.q != nullptr && !CanForm(first)) return cudaErrorInvalidValue;
    if (first.x.factors.squares != nullptr && (first.batches != 1 || first.x_column != 1)) {
      return cudaErrorInvalidValue;
    }
    int some = 1;
    cudaError_t e = cudaSuccess;
    if (first.columns > 0 && first.w.rows > 0 && first.batches > 0) {
      const bool rows = OneRowABlock(first);
      while (!rows && at + some < count && some < kMostParts && first.form.q == nullptr) {
        const ProductParams& next = p[at + some];
        if (next.form.q != nullptr || next.w.type != first.w.type || next.w.cols != first.w.cols ||
            next.w.rows <= 0 || !SameActivations(first, next) || OneRowABlock(next)) {
          break;
        }
        ++some;
      }
      e = rows ? LaunchRowProduct(first, stream) : LaunchSome(&first, some, stream);
    }
    if (e != cudaSuccess) return e;
    at += some;
  }
  return cudaSuccess;
}

}  // namespace tandem::attention::cuda
