// RMSNorm without a look at the whole row: values times the norm's weights, their int8 form and sums of
// squares go out at once, the row's factor 1 / sqrt(mean of squares + eps) is multiplied by whoever reads
// them (RowFactors, kernels.h). Nobody waits for a row's sum between two products.
//
// The order of sums is that of a tree over neighbours within 32 values, whoever makes them, then that of
// FactorOf: a row has the same bits wherever it comes from.
#pragma once

#include "services/attention_gpu/backend/cuda/int8_form.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {

// What this lane, one of four neighbours that all call it, adds to the squares of a row.
__device__ __forceinline__ float PartOfSquares(const RowFactors& f, int64_t row) {
  const float* squares = f.squares + row * f.blocks;
  const int lane = threadIdx.x & 3;
  float sum = 0;
  if ((f.blocks & 3) == 0) {
    const float4* fours = reinterpret_cast<const float4*>(squares);
#pragma unroll 7
    for (int i = lane; i < f.blocks >> 2; i += 4) {
      const float4 v = fours[i];
      sum += (v.x + v.y) + (v.z + v.w);
    }
    return sum;
  }
  for (int i = lane; i < f.blocks; i += 4) sum += squares[i];
  return sum;
}
// From the four parts, for all four lanes.
__device__ __forceinline__ float FactorOf(const RowFactors& f, float part) {
  const unsigned lanes = 0xfu << (threadIdx.x & 28);
  part += __shfl_xor_sync(lanes, part, 1);
  part += __shfl_xor_sync(lanes, part, 2);
  return 1.0f / sqrtf(part / static_cast<float>(32 * f.blocks) + f.eps);
}

// Group i of four values, v, of a row; eight neighbouring lanes have 32 of them.
__device__ __forceinline__ void NormFour(const float4& v, const float4& weight, int64_t row, int64_t i,
                                         const NormFormParams& p) {
  const unsigned lanes = 0xffu << (threadIdx.x & 24);
  float sum = __fadd_rn(__fadd_rn(__fmul_rn(v.x, v.x), __fmul_rn(v.y, v.y)),
                        __fadd_rn(__fmul_rn(v.z, v.z), __fmul_rn(v.w, v.w)));
#pragma unroll
  for (int step = 1; step < 8; step <<= 1) sum = __fadd_rn(sum, __shfl_xor_sync(lanes, sum, step));
  if ((threadIdx.x & 7) == 0) p.squares[row * (p.cols >> 5) + (i >> 3)] = sum;
  const float4 out = make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w);
  if (p.y != nullptr) reinterpret_cast<float4*>(p.y + row * p.cols)[i] = out;
  if (p.q != nullptr) QuantizeFour(out, row, i, {p.q, p.q_meta, p.rows, p.cols, 1});
}

}  // namespace tandem::attention::cuda
