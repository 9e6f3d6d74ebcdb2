// Routing: which experts a token goes to (the definition is backend/cpu/router.h), by one warp, for the
// kernel that does nothing else and for the one that asks the experts.
#pragma once

#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/reduce.cuh"

namespace tandem::attention::cuda {

constexpr int kMostExperts = 1024;
constexpr float kOut = -INFINITY;

// The largest value and its index; the lower index of equal ones.
struct Best {
  float value;
  int32_t index;
};
__device__ __forceinline__ Best Better(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
__device__ __forceinline__ Best WarpBest(Best v) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    v = Better(v, {__shfl_xor_sync(0xffffffffu, v.value, step), __shfl_xor_sync(0xffffffffu, v.index, step)});
  }
  return v;
}

// The best of values[0, n) over a warp.
__device__ __forceinline__ Best BestOf(const float* values, int n, int lane) {
  Best best{kOut, n};
  for (int i = lane; i < n; i += 32) best = Better(best, {values[i], i});
  return WarpBest(best);
}

// Floats as integers of the same order, above 0; -infinity is the least of them.
__device__ __forceinline__ uint32_t Ordered(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The routing of token t by a warp; lane l has kPerLane experts, from l * kPerLane on. It waits for what is
// earlier on the stream by itself. out(k, id, weight) is called for each of the token's experts by some lane.
template <int kPerLane, typename Out>
__device__ __forceinline__ void RouteToken(const RouteParams& p, int64_t t, const Out& out) {
  __shared__ float selection[32 * kPerLane], group[32 * kPerLane];
  const int lane = threadIdx.x, n = p.experts, first = lane * kPerLane;
  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    bias[i] = p.bias != nullptr && first + i < n ? __uint_as_float(Constant4(p.bias + first + i)) : 0.0f;
  }
  AwaitEarlier();
  if (p.position != nullptr && p.position[t] < 0) {
    for (int k = lane; k < p.top_k; k += 32) {
      p.ids[t * p.top_k + k] = -1;
      p.weights[t * p.top_k + k] = 0;
      out(k, -1, 0.0f);
    }
    return;
  }
  const float* logits = p.logits + t * n;
  float score[kPerLane], chosen_by[kPerLane], top = kOut, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) score[i] = first + i < n ? logits[first + i] : kOut;
  if (!p.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, score[i]);
    top = WarpReduce(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < n) sum += expf(score[i] - top);
    }
    sum = WarpReduce(sum, [](float a, float b) { return a + b; });
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    score[i] = p.sigmoid ? 1.0f / (1.0f + expf(-score[i])) : expf(score[i] - top) / sum;
    const float by = score[i] + bias[i];
    chosen_by[i] = isnan(by) ? -3.402823466e38f : by;  // loses, but is in range
  }

  const int size = n / p.groups, lanes = size / kPerLane;  // of a group
  if (p.groups > 1 && n == 32 * kPerLane && size == lanes * kPerLane && (lanes & (lanes - 1)) == 0) {
    // A group is that of whole neighbouring lanes: it stays in registers.
    float best = kOut, second = kOut;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      second = fmaxf(second, fminf(best, chosen_by[i]));
      best = fmaxf(best, chosen_by[i]);
    }
    for (int step = 1; step < lanes; step <<= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const float other_second = __shfl_xor_sync(0xffffffffu, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(best, other));
      best = fmaxf(best, other);
    }
    const float mine = p.sigmoid && size > 1 ? best + second : best;
    const int g = lane / lanes;
    int before = 0;  // groups that come before this one
    for (int k = 0; k < p.groups; ++k) {
      const float other = __shfl_sync(0xffffffffu, mine, k * lanes);
      if (other > mine || (other == mine && k < g)) ++before;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (before >= p.top_groups) chosen_by[i] = kOut;
    }
  } else if (p.groups > 1) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) selection[first + i] = chosen_by[i];
    __syncwarp();
    for (int g = lane; g < p.groups; g += 32) {
      float best = kOut, second = kOut;
#pragma unroll 8
      for (int i = 0; i < size; ++i) {
        const float s = selection[g * size + i];
        second = fmaxf(second, fminf(best, s));
        best = fmaxf(best, s);
      }
      group[g] = p.sigmoid && size > 1 ? best + second : best;
    }
    __syncwarp();
    // The groups that are kept are marked with NaN, which no later comparison takes for the best.
    for (int k = 0; k < p.top_groups; ++k) {
      const Best best = BestOf(group, p.groups, lane);
      __syncwarp();
      if (lane == 0 && best.index < p.groups) group[best.index] = NAN;
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int g = (first + i) / size;
      if (g < p.groups && !isnan(group[g])) chosen_by[i] = kOut;
    }
  }

  // The best of this lane, again after one of its experts was taken.
  uint32_t best = 0;
  int at = 0;
  auto look = [&] {
    best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t key = first + i < n ? Ordered(chosen_by[i]) : 0;
      if (key > best) best = key, at = i;
    }
  };
  look();
  float total = 0, kept = 0;  // the last that this lane has taken
  int32_t kept_id = 0;
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t largest = __reduce_max_sync(0xffffffffu, best);
    const int owner = __ffs(__ballot_sync(0xffffffffu, best == largest)) - 1;  // the lowest id of equal ones
    float mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i == at) mine = score[i];
    }
    const int e = __shfl_sync(0xffffffffu, first + at, owner);
    const float s = __shfl_sync(0xffffffffu, mine, owner);
    total += s;
    if ((k & 31) == lane) {
      if (k + 32 < p.top_k) {
        p.ids[t * p.top_k + k] = e;
        p.weights[t * p.top_k + k] = s;
      }
      kept = s;
      kept_id = e;
    }
    if (lane == owner) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i == at) chosen_by[i] = kOut;
      }
      look();
    }
  }
  for (int k = lane; k < p.top_k; k += 32) {
    const int64_t place = t * p.top_k + k;
    const bool last = k + 32 >= p.top_k;
    const int32_t e = last ? kept_id : p.ids[place];
    float w = last ? kept : p.weights[place];
    if (p.normalize) w /= fmaxf(total, 6.103515625e-5f);
    w *= p.scale;
    p.ids[place] = e;
    p.weights[place] = w;
    out(k, e, w);
  }
}

// Whether RouteToken is for it, and with how many experts a lane.
inline bool CanRoute(const RouteParams& p) {
  return p.experts >= 1 && p.experts <= kMostExperts && p.top_k >= 1 && p.top_k <= p.experts &&
         p.groups >= 1 && p.groups <= p.experts;
}
constexpr int kFewPerLane = 8, kMostPerLane = kMostExperts / 32;
inline bool FewExperts(const RouteParams& p) { return p.experts <= 32 * kFewPerLane; }

}  // namespace tandem::attention::cuda
