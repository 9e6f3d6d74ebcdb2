// Kernels over rows of values: norms, activation forms, SiLU, embedding, and the order of blocks in memory.

#include "services/attention_gpu/backend/cuda/blocks.cuh"
#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/int8_form.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/norm_form.cuh"
#include "services/attention_gpu/backend/cuda/reduce.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFetchThreads = 1024;  // 16 KB at once
unsigned Blocks(int64_t work) { return static_cast<unsigned>((work + kThreads - 1) / kThreads); }

__global__ void __launch_bounds__(kThreads) Quantize(const QuantizeParams p) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t fours = p.cols >> 2;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * fours) return;
  const int64_t row = i / fours, at = i % fours;
  const float4 v = reinterpret_cast<const float4*>(p.x + row * p.x_stride)[at];
  QuantizeFour(v, row, at, {p.q, p.q_meta, p.rows, p.cols, p.heads});
}

// Rows are scaled by the power of two that brings their largest value to [2^13, 2^14).
__global__ void __launch_bounds__(kThreads) ToHalf(const QuantizeParams p) {
  const int64_t row = blockIdx.x;
  const float4* x = reinterpret_cast<const float4*>(p.x + row * p.x_stride);
  const int64_t fours = p.cols >> 2;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < fours; i += kThreads) largest = fmaxf(largest, Magnitude(x[i]));
  largest = BlockReduce<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  const bool finite = largest <= FLT_MAX;
  int exponent = 0;
  if (finite && largest > kSmallest) frexpf(largest, &exponent);
  const float inverse = finite ? ldexpf(1.0f, 14 - exponent) : 0.0f;
  uint2* h = reinterpret_cast<uint2*>(p.h + row * p.cols);
  for (int64_t i = threadIdx.x; i < fours; i += kThreads) {
    const float4 v = x[i];
    const __half2 a = __floats2half2_rn(v.x * inverse, v.y * inverse);
    const __half2 b = __floats2half2_rn(v.z * inverse, v.w * inverse);
    h[i] = make_uint2(*reinterpret_cast<const uint32_t*>(&a), *reinterpret_cast<const uint32_t*>(&b));
  }
  if (threadIdx.x == 0) p.h_scale[row] = finite ? ldexpf(1.0f, exponent - 14) : NAN;
}

// A block for a row; its threads keep what they have read, but for long rows.
template <int kNormThreads>
__global__ void __launch_bounds__(kNormThreads) RmsNorm(const RmsNormParams p) {
  constexpr int kKept = 2;
  LetNextBegin();
  const int64_t fours = p.cols >> 2;
  const float4* weight = reinterpret_cast<const float4*>(p.weight);
  uint4 weights[kKept];  // as bits
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t i = threadIdx.x + k * kNormThreads;
    if (i < fours) weights[k] = Constant16(weight + i);
  }
  AwaitEarlier();
  const int64_t row = blockIdx.x;
  const int64_t from = p.row_ids != nullptr ? p.row_ids[row] : row;
  const float4* x = reinterpret_cast<const float4*>(p.x + from * p.x_stride);
  float sum = 0;
  auto first = [&](int64_t i) {
    const float4 v = x[i];
    sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum),
    sum = fmaf(v.w, v.w, sum);
    return v;
  };
  float4 kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t i = threadIdx.x + k * kNormThreads;
    if (i < fours) kept[k] = first(i);
  }
  for (int64_t i = threadIdx.x + kKept * kNormThreads; i < fours; i += kNormThreads) first(i);
  sum = BlockReduce<kNormThreads>(sum, [](float a, float b) { return a + b; });
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.cols) + p.eps);
  float4* y = reinterpret_cast<float4*>(p.y + row * p.cols);
  auto second = [&](int64_t i, const float4& v, const float4& w) {
    y[i] = make_float4(v.x * inverse * w.x, v.y * inverse * w.y, v.z * inverse * w.z, v.w * inverse * w.w);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t i = threadIdx.x + k * kNormThreads;
    if (i >= fours) continue;
    second(i, kept[k], FloatsOf(weights[k]));
  }
  for (int64_t i = threadIdx.x + kKept * kNormThreads; i < fours; i += kNormThreads) {
    second(i, x[i], __ldg(weight + i));
  }
}

__global__ void __launch_bounds__(kThreads) NormForm(const NormFormParams p) {
  LetNextBegin();
  const int64_t fours = p.cols >> 2;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / fours, at = i % fours;
  const uint4 w = Constant16(reinterpret_cast<const uint4*>(p.weight) + at);
  AwaitEarlier();
  if (row >= p.rows) return;
  const int64_t from = p.row_ids != nullptr ? p.row_ids[row] : row;
  const float4 v = reinterpret_cast<const float4*>(p.x + from * p.x_stride)[at];
  NormFour(v, FloatsOf(w), row, at, p);
}

__global__ void __launch_bounds__(kThreads)
    ScaleRows(const float* x, const RowFactors factors, float* y, int64_t rows, int64_t cols) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / (cols >> 2);
  if (row >= rows) return;
  const float f = FactorOf(factors, PartOfSquares(factors, row));
  const float4 v = reinterpret_cast<const float4*>(x)[i];
  reinterpret_cast<float4*>(y)[i] = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
}

__device__ __forceinline__ float Silu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

__global__ void __launch_bounds__(kThreads) SiluMul(const SiluMulParams p) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.cols >> 2) return;
  const float4 g = reinterpret_cast<const float4*>(p.gate)[i], u = reinterpret_cast<const float4*>(p.up)[i];
  const float4 out = make_float4(Silu(g.x, u.x), Silu(g.y, u.y), Silu(g.z, u.z), Silu(g.w, u.w));
  reinterpret_cast<float4*>(p.y)[i] = out;
  if (p.q != nullptr) {
    const int64_t fours = p.cols >> 2;
    QuantizeFour(out, i / fours, i % fours, {p.q, p.q_meta, p.rows, p.cols, 1});
  }
}

__global__ void __launch_bounds__(kThreads) Add(float* x, const float* delta, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] += delta[i];
}

struct FloatRow {
  float* to;
  __device__ __forceinline__ void Put(int i, float a, float b) { to[i] = a, to[i + 1] = b; }
};

__global__ void Probe() {}

// One block: many that read the same page-locked memory wait for each other. What is in its first reach is on
// its way together with the word that says how much there is.
__global__ void __launch_bounds__(kFetchThreads) Fetch(const FetchParams p) {
  __shared__ uint32_t more;
  const auto read = [&](int64_t i) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p.from + 4 * i));
    return v;
  };
  const int64_t room = p.room / 4;
  int64_t i = threadIdx.x;
  uint4 first = {};
  if (i < room) first = read(i);
  if (i == 0) more = *(static_cast<const volatile uint32_t*>(p.from) + p.more);
  if (i < room) reinterpret_cast<uint4*>(p.to)[i] = first;
  __syncthreads();
  const int64_t all = (p.words + more + 3) / 4, end = all < room ? all : room;
#pragma unroll 4
  for (i += kFetchThreads; i < end; i += kFetchThreads) reinterpret_cast<uint4*>(p.to)[i] = read(i);
}

__global__ void __launch_bounds__(kThreads) Embed(const EmbedParams p) {
  const int64_t chunks = p.w.cols >> 5;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.n * chunks) return;
  const int64_t token = i / chunks;
  const int chunk = static_cast<int>(i % chunks);
  const uint8_t* row = p.w.data + p.ids[token] * p.w.row_bytes;
  FloatRow out{p.out + token * p.w.cols + chunk * 32};
  if (p.w.type == kF32) {
    for (int k = 0; k < 32; ++k) out.to[k] = reinterpret_cast<const float*>(row)[chunk * 32 + k];
    return;
  }
  Raw raw;
  LoadRaw(p.w.type, row, static_cast<int>(p.w.cols), chunk, raw);
  DecodeRaw(p.w.type, raw, chunk, out);
}

// Two bytes a thread, a row for each x of the grid; every field of every block has an even size and offset.
template <int32_t kType>
__global__ void __launch_bounds__(kThreads) Repack(const RepackParams p, int64_t row_bytes) {
  constexpr BlockShape kShape = ShapeOf(kType);
  constexpr int kUnits = kShape.bytes / 2;  // of a block
  const int blocks = static_cast<int>(p.cols / kShape.values);
  const int unit = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (unit >= blocks * kUnits) return;
  const int64_t row = blockIdx.x;
  const int block = unit / kUnits, byte = unit % kUnits * 2;
  const uint16_t v = reinterpret_cast<const uint16_t*>(p.src)[row * blocks * kUnits + unit];
  uint8_t* const to = p.dst + row * row_bytes;
  int plane = 0;
#pragma unroll
  for (int f = 0; f < kShape.fields; ++f) {
    const BlockField field = kShape.field[f];
    if (byte >= field.offset && byte < field.offset + field.bytes) {
      *reinterpret_cast<uint16_t*>(to + plane + block * field.bytes + byte - field.offset) = v;
    }
    plane += blocks * field.bytes;
  }
}

template <int32_t kType>
void LaunchRepackOf(const RepackParams& p, cudaStream_t stream) {
  const int64_t units = p.cols / ShapeOf(kType).values * ShapeOf(kType).bytes / 2;
  Repack<kType><<<dim3(static_cast<unsigned>(p.rows), Blocks(units)), kThreads, 0, stream>>>(
      p, DeviceRowBytes(kType, p.cols));
}

}  // namespace

bool CanLaunchEarly() {
  static const bool can = [] {
    constexpr int kInGraphs = 12030;  // the driver's version from which on graphs can have it
    int device = 0, major = 0, driver = 0;
    cudaFuncAttributes code;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kInGraphs &&
           cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           major >= 9 && cudaFuncGetAttributes(&code, Probe) == cudaSuccess && code.ptxVersion >= 90;
  }();
  return can;
}

cudaError_t LaunchQuantize(const QuantizeParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  return LaunchEarly(Quantize, Blocks(p.rows * p.cols / 4), kThreads, 0, stream, p);
}

cudaError_t LaunchToHalf(const QuantizeParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  ToHalf<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  // By the width alone: the order of the sum must not depend on the batch.
  const bool wide = p.cols > 4096;
  return LaunchEarly(wide ? RmsNorm<1024> : RmsNorm<kThreads>, static_cast<unsigned>(p.rows),
                     wide ? 1024 : kThreads, 0, stream, p);
}

cudaError_t LaunchNormForm(const NormFormParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  return LaunchEarly(NormForm, Blocks(p.rows * p.cols / 4), kThreads, 0, stream, p);
}

cudaError_t LaunchScaleRows(const float* x, const RowFactors& factors, float* y, int64_t rows, int64_t cols,
                            cudaStream_t stream) {
  if (rows <= 0) return cudaSuccess;
  ScaleRows<<<Blocks(rows * cols / 4), kThreads, 0, stream>>>(x, factors, y, rows, cols);
  return cudaGetLastError();
}

cudaError_t LaunchSiluMul(const SiluMulParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  return LaunchEarly(SiluMul, Blocks(p.rows * p.cols / 4), kThreads, 0, stream, p);
}

cudaError_t LaunchAdd(float* x, const float* delta, int64_t n, cudaStream_t stream) {
  if (n <= 0) return cudaSuccess;
  Add<<<Blocks(n), kThreads, 0, stream>>>(x, delta, n);
  return cudaGetLastError();
}

cudaError_t LaunchFetch(const FetchParams& p, cudaStream_t stream) {
  if (p.words < 0 || p.more < 0 || p.more >= p.room || p.words > p.room || p.room % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  Fetch<<<1, kFetchThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchEmbed(const EmbedParams& p, cudaStream_t stream) {
  if (p.n <= 0) return cudaSuccess;
  Embed<<<Blocks(p.n * p.w.cols / 32), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchRepack(const RepackParams& p, cudaStream_t stream) {
  const BlockShape shape = ShapeOf(p.type);
  if (shape.bytes == 0 || p.cols % shape.values != 0) return cudaErrorInvalidValue;
  if (p.rows <= 0) return cudaSuccess;
  switch (p.type) {
    case kF32:
      LaunchRepackOf<kF32>(p, stream);
      break;
    case kF16:
    case kBF16:
      LaunchRepackOf<kF16>(p, stream);
      break;
    case kQ4_0:
      LaunchRepackOf<kQ4_0>(p, stream);
      break;
    case kQ5_0:
      LaunchRepackOf<kQ5_0>(p, stream);
      break;
    case kQ8_0:
      LaunchRepackOf<kQ8_0>(p, stream);
      break;
    case kQ4_K:
      LaunchRepackOf<kQ4_K>(p, stream);
      break;
    case kQ5_K:
      LaunchRepackOf<kQ5_K>(p, stream);
      break;
    default:
      LaunchRepackOf<kQ6_K>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
