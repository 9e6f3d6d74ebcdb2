// Requests into shared memory, answers out of it.
//
// Order. A block's writes to host memory, then a fence of system scope, then the count of blocks that are
// done; the last block raises the bells with release (which is a fence of its own). Where a stream operation
// raises them, the kernel's end orders the writes before it. The waiting side is one thread, which reads the
// flag and then fences (acquire, of system scope), and tells the other blocks with release; those read that
// and fence. The answer itself is read past the caches, since the GPU's do not see what the host writes.
#include <cuda_bf16.h>

#include "services/attention_gpu/backend/cuda/bell_kernels.h"
#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/norm_form.cuh"
#include "services/attention_gpu/backend/cuda/route.cuh"
#include "services/attention_gpu/experts/deferral_rule.h"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 64;
constexpr unsigned kPause = 100;  // nanoseconds between two looks over the bus, or at device memory
constexpr int kLooks = 16;        // at a flag, for one at whether to stop
constexpr int kIndexBits = 24;    // of AnswerParams::seen: the run, the call's index, whether all is there

__device__ __forceinline__ void StoreRelease(uint8_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t LoadRelaxed(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void ReleaseOnDevice(uint64_t* p, uint64_t v) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ uint64_t RelaxedOnDevice(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
template <typename T>
__device__ __forceinline__ T LoadOnce(const T* p) {
  return *const_cast<const volatile T*>(p);
}

__device__ __forceinline__ uint32_t PackBf16(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The slot of the run's call `index`.
__device__ __forceinline__ uint8_t* SlotOf(const RingState& ring, const SlotOffsets& at, uint32_t index) {
  return ring.slot + ((ring.first + index) & (at.slots - 1)) * at.slot_bytes;
}

// Whether pair i is of the part that is asked for.
__device__ __forceinline__ bool Asked(const AskParams& p, int64_t i) {
  if (p.part == AskPart::kAll) return true;
  const int64_t t = i / p.k;
  const bool deferred =
      p.defers[t] != 0 && IsDeferred(p.weights + t * p.k, p.k, static_cast<int32_t>(i % p.k), p.defer);
  return deferred == (p.part == AskPart::kDeferred);
}

// The rings as they are now, not as a cache may still have them. For all threads.
__device__ __forceinline__ const RingState* ReadRings(const RingState* from, int count, RingState* keep) {
  constexpr int kWords = sizeof(RingState) / 8;
  __shared__ uint64_t rings[kMostRings * kWords];
  for (int i = static_cast<int>(threadIdx.x); i < count * kWords; i += kThreads) {
    rings[i] = LoadOnce(reinterpret_cast<const uint64_t*>(from) + i);
    if (keep != nullptr && blockIdx.x == 0) reinterpret_cast<uint64_t*>(keep)[i] = rings[i];
  }
  __syncthreads();
  return reinterpret_cast<const RingState*>(rings);
}

// What comes behind it begins only with its end: its first weights would stand in the way of what the routing
// reads, and nobody waits for what is computed beside the experts. With kPerLane, experts a lane of
// RouteToken, the last n blocks route a token each while the others write activations.
template <int kPerLane>
__global__ void __launch_bounds__(kThreads) Ask(const AskParams p) {
  const int64_t routing = kPerLane > 0 ? p.n : 0;
  const int64_t t = static_cast<int64_t>(blockIdx.x) - (gridDim.x - routing);  // to route, if not below 0
  if (kPerLane == 0 || t < 0 || p.keep != nullptr) AwaitEarlier();
  const RingState* const rings = p.keep != nullptr ? ReadRings(p.rings, p.count, p.keep) : p.rings;
  if constexpr (kPerLane > 0) {
    if (t >= 0 && threadIdx.x < 32) {
      RouteToken<kPerLane>(p.route, t, [&](int k, int32_t id, float weight) {
        const int64_t i = t * p.k + k;
        for (int r = 0; r < p.count; ++r) {
          uint8_t* slot = SlotOf(rings[r], p.at, p.index);
          reinterpret_cast<int32_t*>(slot + p.at.ids)[i] = id;
          reinterpret_cast<float*>(slot + p.at.weights)[i] = weight;
        }
      });
    }
  }
  const int64_t values = t >= 0 ? 0 : static_cast<int64_t>(p.n) * p.hidden / 4;
  const int64_t pairs = kPerLane > 0 ? 0 : static_cast<int64_t>(p.n) * p.k;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = (gridDim.x - routing) * kThreads;
  for (int64_t i = thread; i < values; i += threads) {
    float4 v = reinterpret_cast<const float4*>(p.normed)[i];
    if (p.factors.squares != nullptr) {
      const float f = FactorOf(p.factors, PartOfSquares(p.factors, 4 * i / p.hidden));
      v = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
    }
    for (int r = 0; r < p.count; ++r) {
      uint8_t* to = SlotOf(rings[r], p.at, p.index) + p.at.input;
      if (p.float_input) {
        reinterpret_cast<float4*>(to)[i] = v;
      } else {
        reinterpret_cast<uint2*>(to)[i] = make_uint2(PackBf16(v.x, v.y), PackBf16(v.z, v.w));
      }
    }
  }
  for (int64_t i = thread; i < pairs; i += threads) {
    const bool asked = Asked(p, i);
    for (int r = 0; r < p.count; ++r) {
      uint8_t* slot = SlotOf(rings[r], p.at, p.index);
      reinterpret_cast<int32_t*>(slot + p.at.ids)[i] = asked ? p.ids[i] : -1;
      reinterpret_cast<float*>(slot + p.at.weights)[i] = asked ? p.weights[i] : 0.0f;
    }
  }
  if (thread < p.count) {
    const RingState& ring = rings[thread];
    WireRequest& to = *reinterpret_cast<WireRequest*>(SlotOf(ring, p.at, p.index) + p.at.request);
    to.sequence = ring.first + p.index;
    to.epoch = ring.epoch;
    to.layer = p.layer;
    to.rows = static_cast<uint32_t>(p.n);
    to.pairs = static_cast<uint32_t>(p.k);
    to.input_type = p.input_type;
    to.output_type = p.output_type;
    to.precision = p.precision;
  }
  if (!p.ring) return;
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(p.blocks_done, 1) != gridDim.x - 1) return;
  *p.blocks_done = 0;
  for (int r = 0; r < p.count; ++r) {
    StoreRelease(SlotOf(rings[r], p.at, p.index) + p.at.bell,
                 static_cast<uint32_t>(rings[r].first) + p.index);
  }
}

__device__ __forceinline__ bool Stopped(const AnswerParams& p) { return p.wait && LoadOnce(p.stop) != 0; }

// Waits for ring r's flag of the call; false: not there, or stopped.
__device__ bool Flagged(const AnswerParams& p, const RingState& ring) {
  const uint8_t* flag = SlotOf(ring, p.at, p.index) + p.at.answered;
  const auto number = static_cast<uint32_t>(ring.first) + p.index;
  for (int look = 0; static_cast<int32_t>(LoadRelaxed(flag) - number) < 0; ++look) {
    if (!p.wait || (look % kLooks == 0 && Stopped(p))) return false;
    __nanosleep(kPause);
  }
  return true;
}

// Whether ring r, whose flag has been seen, has answered the call, and with success.
__device__ bool Answered(const AnswerParams& p, const RingState& ring) {
  // All on their way over the bus together.
  const auto* answer = reinterpret_cast<const WireAnswer*>(SlotOf(ring, p.at, p.index) + p.at.answer);
  const uint64_t sequence = LoadOnce(&answer->sequence), epoch = LoadOnce(&answer->epoch);
  const uint32_t status = LoadOnce(&answer->status);
  return sequence == ring.first + p.index && epoch == ring.epoch && status == 0;
}

// Values 4 i to 4 i + 3 of the answers' sum.
__device__ __forceinline__ float4 AnswerAt(const AnswerParams& p, const RingState* rings, int64_t i) {
  if (!p.double_output) {
    const uint8_t* slot = SlotOf(rings[0], p.at, p.index);
    return __ldcv(reinterpret_cast<const float4*>(slot + p.at.output) + i);
  }
  double2 low = {0, 0}, high = {0, 0};
  for (int r = 0; r < p.count; ++r) {
    const uint8_t* slot = SlotOf(rings[r], p.at, p.index);
    const auto* from = reinterpret_cast<const double2*>(slot + p.at.output) + 2 * i;
    const double2 a = __ldcv(from), b = __ldcv(from + 1);
    low.x += a.x, low.y += a.y, high.x += b.x, high.y += b.y;
  }
  return make_float4(static_cast<float>(low.x), static_cast<float>(low.y), static_cast<float>(high.x),
                     static_cast<float>(high.y));
}

// What p.seen[0] and p.seen[GoodOf] become, but for the lowest bit: in [0] it says that all flags have been
// seen, in the other that all answers are good. That one is not read before what comes next may begin, which
// may be the answer to the call behind this one (deferred experts), but none later: a request ends before.
__device__ __forceinline__ uint64_t SeenOf(const AnswerParams& p, const RingState* rings) {
  return (rings[0].run << kIndexBits | p.index) << 1;
}

__device__ __forceinline__ int GoodOf(const AnswerParams& p) { return 1 + (p.index & 1); }

// For thread 0 of a block but the first: the lowest bit, once it has been told.
__device__ bool Told(const AnswerParams& p, const RingState* rings, int which) {
  const uint64_t call = SeenOf(p, rings);
  for (;;) {
    const uint64_t seen = RelaxedOnDevice(p.seen + which);
    if ((seen ^ call) <= 1) {
      __threadfence();  // with the look that saw it: acquire
      return (seen & 1) != 0;
    }
    __nanosleep(kPause);
  }
}

// For thread 0 of each block: whether all flags have been raised. One block looks over the bus and tells the
// others, which look at device memory: many that read over the bus keep the kernels in front from ending
// (seen: 25 us for a SiLU of 1 us beside 28 blocks).
__device__ bool AllFlagged(const AnswerParams& p, const RingState* rings) {
  if (blockIdx.x != 0) return Told(p, rings, 0);
  bool all = true;
  for (int r = 0; r < p.count; ++r) all = Flagged(p, rings[r]) && all;
  __threadfence_system();  // with the looks that saw the numbers: acquire
  ReleaseOnDevice(p.seen, SeenOf(p, rings) | (all ? 1 : 0));
  return all;
}

// Then: whether all answers are good. It takes another way over the bus, during which the answers themselves
// are fetched.
__device__ bool AllAnswered(const AnswerParams& p, const RingState* rings, bool flagged) {
  if (blockIdx.x != 0) return flagged && Told(p, rings, GoodOf(p));
  bool all = flagged;
  if (flagged) {
    for (int r = 0; r < p.count; ++r) all = Answered(p, rings[r]) && all;
  }
  if (!all && LoadOnce(p.failed) == 0) *p.failed = p.index + 1;
  ReleaseOnDevice(p.seen + GoodOf(p), SeenOf(p, rings) | (all ? 1 : 0));
  return all;
}

// Answers are waited for and fetched while the kernels in front are still at work: nothing on the device
// writes them, nor, but for the run's first call, `rings` (what wrote those has ended before the last Ask
// did). What comes next begins only when they are there: until then the device's processors are for
// others; and all blocks have read seen[0] then.
__global__ void __launch_bounds__(kThreads) Add(const AnswerParams p) {
  __shared__ int flagged, good;
  const bool early = p.wait && p.index > 0;  // without `wait` somebody in front has waited
  if (!early) AwaitEarlier();
  const RingState* const rings = ReadRings(p.rings, p.count, nullptr);
  if (threadIdx.x == 0) flagged = AllFlagged(p, rings) ? 1 : 0;
  __syncthreads();
  LetNextBegin();
  int64_t values = flagged == 0 ? 0 : static_cast<int64_t>(p.n) * p.hidden / 4;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool norms = p.next.weight != nullptr;
  const int64_t fours = p.hidden / 4;
  const auto weight = [&](int64_t i) {
    return Constant16(reinterpret_cast<const uint4*>(p.next.weight) + i % fours);
  };
  float4 ahead = make_float4(0, 0, 0, 0);
  uint4 weight_ahead = {};
  if (thread < values) {
    ahead = AnswerAt(p, rings, thread);
    if (norms) weight_ahead = weight(thread);
  }
  if (threadIdx.x == 0) good = AllAnswered(p, rings, flagged != 0) ? 1 : 0;
  __syncthreads();
  if (good == 0) values = 0;
  if (early) AwaitEarlier();
  for (int64_t i = thread; i < values; i += threads) {
    const float4 sum = i == thread ? ahead : AnswerAt(p, rings, i);
    float4& x = reinterpret_cast<float4*>(p.x)[i];
    const float4 v = make_float4(x.x + sum.x, x.y + sum.y, x.z + sum.z, x.w + sum.w);
    x = v;
    if (norms) NormFour(v, FloatsOf(i == thread ? weight_ahead : weight(i)), i / fours, i % fours, p.next);
  }
}

unsigned Blocks(int64_t n, int64_t hidden, int most) {
  const int64_t blocks = (n * hidden / 4 + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

}  // namespace

cudaError_t LaunchAsk(const AskParams& p, cudaStream_t stream) {
  if (p.count < 1 || p.count > kMostRings || p.n < 0 || p.hidden % 4 != 0) return cudaErrorInvalidValue;
  if (p.factors.squares != nullptr && p.factors.blocks * 32 != p.hidden) return cudaErrorInvalidValue;
  const unsigned blocks = Blocks(p.n, p.hidden, 4 * kMostBlocks);
  if (p.route.experts == 0) return LaunchEarly(Ask<0>, blocks, kThreads, 0, stream, p);
  if (!CanRoute(p.route) || p.part != AskPart::kAll || p.route.n != p.n || p.route.top_k != p.k ||
      p.route.ids != p.ids || p.route.weights != p.weights) {
    return cudaErrorInvalidValue;
  }
  return LaunchEarly(FewExperts(p.route) ? Ask<kFewPerLane> : Ask<kMostPerLane>,
                     blocks + static_cast<unsigned>(p.n), kThreads, 0, stream, p);
}

cudaError_t LaunchAddAnswers(const AnswerParams& p, cudaStream_t stream) {
  if (p.count < 1 || p.count > kMostRings || p.n < 0 || p.hidden % 4 != 0) return cudaErrorInvalidValue;
  if (!p.double_output && p.count != 1) return cudaErrorInvalidValue;
  if (p.next.weight != nullptr &&
      (p.hidden % 32 != 0 || p.next.x != p.x || p.next.rows != p.n || p.next.cols != p.hidden ||
       p.next.x_stride != p.hidden || p.next.row_ids != nullptr)) {
    return cudaErrorInvalidValue;
  }
  // Few blocks read over the bus; the rest of the GPU stays free.
  return LaunchEarly(Add, Blocks(p.n, p.hidden, kMostBlocks), kThreads, 0, stream, p);
}

}  // namespace tandem::attention::cuda
