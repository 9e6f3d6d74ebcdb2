// Absorbed MLA attention over the paged latent cache by warpgroups, for one stretch of positions a block.
//
// A block handles 64 heads of one token row. It goes through its positions in strips of 32, which are in
// shared memory once and serve as keys and as values, two at a time: warpgroups 0 and 1 have the scores of a
// strip each, and half of the latent each. After the softmax they exchange weights, and each multiplies those
// of both strips with its half of the values. Warpgroup 2 fetches: there is room for three strips, so that
// one is on its way while two are in use.
//
// Both halves of the sums are relative to the same score of a head (attention_stretch.cuh), so the strips'
// largest scores are exchanged before the weights are made.
//
// In shared memory queries and strips are pieces of 64 of a row's values, [pieces][rows][64], as warpgroups
// read them (SharedMatrix). The first pieces of the queries stay in registers: less is read for each strip,
// and the block keeps within 163 KB. More would leave too little of a processor's memory to the first cache,
// through which products of few columns have their weights on the way (with 227 KB a step takes 0.9 ms
// longer on an H100; the kernels in front and behind take over the division of this one). The last piece of a
// strip is the rotated part of its keys, no values: once the scores are there, the weights take its place on
// their way to the other warpgroup.
//
// Of bfloat16 caches. Those of bytes, which would have to be made float16 on the way, go through attention.cu
// everywhere.
#ifdef TANDEM_WARPGROUPS
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

#include "services/attention_gpu/backend/cuda/attention_stretch.cuh"
#include "services/attention_gpu/backend/cuda/dependent_launch.cuh"
#include "services/attention_gpu/backend/cuda/driver_function.h"
#include "services/attention_gpu/backend/cuda/mbarrier.cuh"
#include "services/attention_gpu/backend/cuda/mma.cuh"
#include "services/attention_gpu/backend/cuda/warpgroup_attention.h"
#include "services/attention_gpu/backend/cuda/warpgroup_mma.cuh"

namespace tandem::attention::cuda {

#ifdef TANDEM_WARPGROUPS
namespace {

constexpr int kLora = 512, kRope = 64, kWidth = kLora + kRope;
constexpr int kPieces = kWidth / 64, kHeldPieces = 3;
constexpr int kHeads = 64;
constexpr int kStrip = kAttentionTile, kStrips = 3;  // positions; strips in shared memory
constexpr int kGroupThreads = 128, kConsumers = 2 * kGroupThreads, kThreads = kConsumers + kGroupThreads;

// Shared memory, in bytes: queries, strips, largest scores and sums [2 warpgroups][heads], barriers.
constexpr int kQueryPiece = kHeads * 128, kStripPiece = kStrip * 128, kStripBytes = kPieces * kStripPiece;
constexpr int kStripsAt = (kPieces - kHeldPieces) * kQueryPiece;
constexpr int kLargestAt = kStripsAt + kStrips * kStripBytes, kSumsAt = kLargestAt + 2 * kHeads * 4;
constexpr int kBarriersAt = kSumsAt + 2 * kHeads * 4;
constexpr int kSharedBytes = kBarriersAt + 2 * kStrips * 8;
static_assert(kSharedBytes <= 163 * 1024);

#ifdef TANDEM_WARPGROUP_CODE

constexpr int kLatentPieces = kLora / 64;
constexpr int kFewRegisters = 24, kManyRegisters = 240;  // the three share what three of 168 would have

__device__ __forceinline__ void ConsumersBarrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Where sixteen bytes `part` of row r lie in pieces of kPieceBytes.
template <int kPieceBytes>
__device__ __forceinline__ uint32_t PlaceOf(int r, int part) {
  return (part >> 3) * kPieceBytes + r * 128 + ((part ^ r) & 7) * 16;
}

// What all threads of a block know.
struct Block {
  const AttentionParams& p;
  unsigned char* shared;
  uint32_t base;  // its address
  Stretch stretch;
  int strips;

  // Barriers of a strip's place: it is there; nobody needs it any more.
  __device__ __forceinline__ uint32_t Full(int strip) const {
    return base + kBarriersAt + strip % kStrips * 8;
  }
  __device__ __forceinline__ uint32_t Empty(int strip) const { return Full(strip) + kStrips * 8; }
  __device__ __forceinline__ static uint32_t PhaseOf(int strip) { return strip / kStrips; }
  __device__ __forceinline__ static int PlaceOfStrip(int strip) {
    return kStripsAt + strip % kStrips * kStripBytes;
  }
};

// Where strips are in the cache.
struct Strips {
  static constexpr int kRowBytes = 2 * kWidth;
  const Block& b;
  const int32_t* pages;

  // The page of a strip; 0 behind the last one. It is asked for well before it is used.
  __device__ __forceinline__ int PageOf(int strip) const {
    return strip < b.strips ? pages[(b.stretch.begin + strip * kStrip) / b.p.rows.page_tokens] : 0;
  }
  // The first of a strip's rows.
  __device__ __forceinline__ int64_t RowOf(int page, int strip) const {
    const int page_tokens = b.p.rows.page_tokens;
    return static_cast<int64_t>(page) * page_tokens + (b.stretch.begin + strip * kStrip) % page_tokens;
  }
  __device__ __forceinline__ void AskFor(int page, int strip) const {
    PrefetchToL2(static_cast<const unsigned char*>(b.p.cache) + RowOf(page, strip) * kRowBytes,
                 kStrip * kRowBytes);
  }
  // To the L2 cache, by threads 0, 1, ...: only that is allowed before what writes the rows has ended.
  __device__ __forceinline__ void AskForFirst(int thread) const {
    if (thread >= min(b.strips, kStrips)) return;
    AskFor(PageOf(thread), thread);
  }

  // All of them into shared memory, by one thread and the copy engine. `map`: of the cache (MapOf). Of those
  // whose place is not free yet, the block of the first or of the second heads asks, by turns, for the L2
  // cache: all blocks of a row read them.
  __device__ __forceinline__ void Fetch(const void* map) const {
    ShowToCopyEngine();
    const bool alone = gridDim.x == 1;
    int page = PageOf(0), next_page = PageOf(1), page_after = PageOf(2);
    for (int strip = 0; strip < b.strips; ++strip) {
      const int page_behind = PageOf(strip + 3);
      if (strip > 0 && strip + 2 < b.strips && (alone || ((strip ^ blockIdx.x) & 1) == 0)) {
        AskFor(page_after, strip + 2);
      }
      if (strip >= kStrips) AwaitPhase(b.Empty(strip), b.PhaseOf(strip) - 1);
      ArriveExpecting(b.Full(strip), kStripBytes);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        CopyBox(b.base + b.PlaceOfStrip(strip) + piece * kStripPiece, map, piece * 64,
                static_cast<int>(RowOf(page, strip)), b.Full(strip));
      }
      page = next_page, next_page = page_after, page_after = page_behind;
    }
  }
};

// Two warpgroups. Thread (warp, g, t) has of its warpgroup's products the heads 16 warp + g and that + 8, of
// every 8 columns 2 t and the next.
struct Multiply {
  const Block& b;
  int64_t t;
  int first_head, splits, split;
  int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  int row = thread / 32 * 16 + (thread & 31) / 4, lane4 = thread & 3;

  // The first pieces to this thread, as parts of products' operands, the others to shared memory.
  __device__ __forceinline__ void ReadQueries(uint32_t (&held)[kHeldPieces * 4][4]) const {
    const uint16_t* from = b.p.query + (t * b.p.heads + first_head) * kWidth;
    constexpr int kParts = (kPieces - kHeldPieces) * 8;
#pragma unroll 4
    for (int i = 0; i < kHeads * kParts / kConsumers; ++i) {
      const int at = i * kConsumers + threadIdx.x, r = at / kParts, part = at % kParts;
      const bool valid = first_head + r < b.p.heads;
      CopyAsync16(b.base + PlaceOf<kQueryPiece>(r, part),
                  from + (valid ? r * kWidth + kHeldPieces * 64 + part * 8 : 0), valid);
    }
    CommitCopies();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + (i & 1) * 8;
#pragma unroll
      for (int step = 0; step < kHeldPieces * 4; ++step) {
        held[step][i] =
            first_head + r < b.p.heads
                ? *reinterpret_cast<const uint32_t*>(from + r * kWidth + step * 16 + lane4 * 2 + (i >> 1) * 8)
                : 0;
      }
    }
    WaitCopies<0>();
    ShowToWarpgroups();
    ConsumersBarrier();
  }

  // This thread's float of one of the two arrays [2 warpgroups][heads], of row `row` or 8 further.
  __device__ __forceinline__ float* OfHeads(int at, int of_group, int half) const {
    return reinterpret_cast<float*>(b.shared + at) + of_group * kHeads + row + half * 8;
  }
  // This thread's weights of a strip: 32 bytes, half of them kGroupThreads * 16 further.
  __device__ __forceinline__ uint4* Exchange(int strip) const {
    return reinterpret_cast<uint4*>(b.shared + b.PlaceOfStrip(strip) + kLatentPieces * kStripPiece) + thread;
  }

  // score = queries times the keys of a strip.
  __device__ __forceinline__ void Scores(const uint32_t (&held)[kHeldPieces * 4][4], int strip,
                                         float (&score)[4][4]) const {
#pragma unroll
    for (auto& s : score) s[0] = s[1] = s[2] = s[3] = 0;
    const uint64_t query = SharedMatrix(b.base), key = SharedMatrix(b.base + b.PlaceOfStrip(strip));
    BeginWarpgroupProducts();
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // addresses are counted in sixteens
        const uint64_t keys = key + piece * (kStripPiece / 16) + 2 * k;
        if (piece < kHeldPieces) {
          WarpgroupScores(score, held[piece * 4 + k], keys);
        } else {
          WarpgroupScores(score, query + (piece - kHeldPieces) * (kQueryPiece / 16) + 2 * k, keys);
        }
      }
    }
    CommitWarpgroupProducts();
    AwaitWarpgroupProducts<0>();
    HoldSums(score);
  }

  // A strip's values from row `first` on: what lies behind the stretch may be anything, and its weight of
  // zero times that NaN. Other warps of this warpgroup may still multiply the keys there, whose scores nobody
  // uses.
  __device__ __forceinline__ void Clear(int strip, int first) const {
    constexpr int kParts = kLora / 8;
    for (int i = thread; i < (kStrip - first) * kParts; i += kGroupThreads) {
      *reinterpret_cast<uint4*>(b.shared + b.PlaceOfStrip(strip) +
                                PlaceOf<kStripPiece>(first + i / kParts, i % kParts)) =
          make_uint4(0, 0, 0, 0);
    }
    ShowToWarpgroups();
  }

  // Of this thread's two heads.
  __device__ __forceinline__ static void Largest(const float (&score)[4][4], float (&largest)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        largest[h] = fmaxf(largest[h], fmaxf(score[n][2 * h], score[n][2 * h + 1]));
      }
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], 2));
    }
  }

  // out += a strip's weights times its values.
  __device__ __forceinline__ void Values(int strip, const uint32_t (&weights)[2][4],
                                         float (&out)[32][4]) const {
    const uint32_t at = b.base + b.PlaceOfStrip(strip) + group * (kLatentPieces / 2) * kStripPiece;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      WarpgroupValues(out, weights[k], SharedMatrixOfColumns<kStripPiece>(at + k * 16 * 128));
    }
    CommitWarpgroupProducts();
  }
  __device__ __forceinline__ void Free(int strip) const {
    __syncwarp();  // all lanes have read it
    if ((threadIdx.x & 31) == 0) Arrive(b.Empty(strip));
  }

  // A warpgroup awaits its own strips alone: that the other's is there, it knows from the barrier behind
  // which the other's weights are.
  __device__ __forceinline__ void Run() const {
    uint32_t held[kHeldPieces * 4][4];
    ReadQueries(held);
    float out[32][4] = {};
    float reference[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int first = 0; first < b.strips; first += 2) {
      const int strip = first + group;
      const bool mine = strip < b.strips;
      float score[4][4];
      float largest[2] = {-INFINITY, -INFINITY};
      if (mine) {
        AwaitPhase(b.Full(strip), b.PhaseOf(strip));
        Scores(held, strip, score);
        const int left = b.stretch.end - (b.stretch.begin + strip * kStrip);
        if (left < kStrip) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (n * 8 + lane4 * 2 + (i & 1) >= left) score[n][i] = -INFINITY;
            }
          }
          Clear(strip, left);
        }
        Largest(score, largest);
      }
      if (lane4 == 0) {
        *OfHeads(kLargestAt, group, 0) = largest[0];
        *OfHeads(kLargestAt, group, 1) = largest[1];
      }
      ConsumersBarrier();
      float kept[2] = {1, 1};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float both = fmaxf(largest[h], *OfHeads(kLargestAt, 1 - group, h));
        if (both > reference[h] + kSlack) {
          kept[h] = Exp2((reference[h] - both) * kLog2E);
          reference[h] = both;
        }
      }
      if (__any_sync(0xffffffffu, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          out[n][0] *= kept[0], out[n][1] *= kept[0], out[n][2] *= kept[1], out[n][3] *= kept[1];
        }
      }
      sum[0] *= kept[0], sum[1] *= kept[1];
      if (mine) {
        uint32_t made[2][4];  // [16 positions]
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // A head whose scores are all -infinity or NaN gets NaN for weights: broken input stays visible.
          const float offset = -reference[h] * kLog2E;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float a = Exp2(fmaf(score[n][2 * h], kLog2E, offset)),
                        c = Exp2(fmaf(score[n][2 * h + 1], kLog2E, offset));
            uint32_t& packed = made[n >> 1][(n & 1) * 2 + h];
            packed = Pack<false>(a, c);
            sum[h] += SumOfBf16(packed);
          }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          Exchange(strip)[k * kGroupThreads] = make_uint4(made[k][0], made[k][1], made[k][2], made[k][3]);
        }
      }
      ConsumersBarrier();
      uint32_t weights[2][2][4];  // [strip][16 positions]
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        if (first + of >= b.strips) break;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint4 v = Exchange(first + of)[k * kGroupThreads];
          weights[of][k][0] = v.x, weights[of][k][1] = v.y, weights[of][k][2] = v.z, weights[of][k][3] = v.w;
        }
      }
      BeginWarpgroupProducts();
      Values(first, weights[0], out);
      if (first + 1 < b.strips) {
        BeginWarpgroupProducts();
        Values(first + 1, weights[1], out);
      }
      ShowToWarpgroups();  // weights were here: the copy engine writes there next
      if (first + 1 < b.strips) {
        AwaitWarpgroupProducts<1>();
        Free(first);
      }
      AwaitWarpgroupProducts<0>();
      HoldSums(out);
      Free(min(first + 1, b.strips - 1));
    }
    Store(out, reference, sum);
  }

  __device__ __forceinline__ void Store(const float (&out)[32][4], const float (&reference)[2],
                                        float (&sum)[2]) const {
    const AttentionParams& p = b.p;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      if (lane4 == 0) *OfHeads(kSumsAt, group, h) = sum[h];
    }
    ConsumersBarrier();
    const int64_t part = splits > 1 ? p.first_partial[t] + split : 0;
    float* const to = splits > 1 ? p.partial + part * p.heads * kLora : p.out + t * p.heads * kLora;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = first_head + row + h * 8;
      if (head >= p.heads) continue;
      const float total = *OfHeads(kSumsAt, 0, h) + *OfHeads(kSumsAt, 1, h);
      if (splits > 1 && group == 0 && lane4 == 0) {
        p.partial_state[part * p.heads + head] = make_float2(reference[h], total);
      }
      const float scale = splits > 1 ? 1.0f : 1.0f / total;
      float* y = to + static_cast<int64_t>(head) * kLora + group * (kLora / 2) + lane4 * 2;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        *reinterpret_cast<float2*>(y + n * 8) = make_float2(out[n][2 * h] * scale, out[n][2 * h + 1] * scale);
      }
    }
  }
};

#endif  // TANDEM_WARPGROUP_CODE

__global__ void __launch_bounds__(kThreads, 1)
    AttendByWarpgroups(const __grid_constant__ AttentionParams p, const __grid_constant__ CUtensorMap map) {
#ifdef TANDEM_WARPGROUP_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  LetNextBegin();
  const int64_t t = blockIdx.y;
  const int split = blockIdx.z;
  const Stretch stretch = StretchOf(p, t, split);
  if (stretch.end == stretch.begin) {
    AwaitEarlier();
    return;
  }
  const Block b{p, shared, SharedAddress(shared), stretch,
                (stretch.end - stretch.begin + kStrip - 1) / kStrip};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStrips; ++i) {
      InitBarrier(b.Full(i), 1);
      InitBarrier(b.Empty(i), kConsumers / 32);
    }
    ShowToWarpgroups();  // and to the copy engine
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    GiveRegisters<kFewRegisters>();
    const int thread = threadIdx.x - kConsumers;
    const Strips strips{b, p.rows.pages + p.rows.first_page[t]};
    strips.AskForFirst(thread);
    AwaitEarlier();
    if (thread == 0) strips.Fetch(&map);
  } else {
    TakeRegisters<kManyRegisters>();
    const Multiply multiply{b, t, static_cast<int>(blockIdx.x) * kHeads, p.splits[t], split};
    AwaitEarlier();
    multiply.Run();
  }
#else
  __trap();  // never launched: WarpgroupsAttend
#endif
}

// The driver's function that describes a tensor to the copy engine; null where it has none.
PFN_cuTensorMapEncodeTiled_v12000 Encoder() {
  static const auto encoder =
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(DriverFunction("cuTensorMapEncodeTiled"));
  return encoder;
}

// The cache as boxes of 64 values of 32 rows, which lie in shared memory as warpgroups read them. How many
// rows there are is not known here; none is asked for that does not exist.
cudaError_t MapOf(const AttentionParams& p, CUtensorMap* map) {
  const cuuint64_t size[] = {kWidth, INT32_MAX}, apart[] = {2 * kWidth};
  const cuuint32_t box[] = {64, kStrip}, step[] = {1, 1};
  const CUresult e = Encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(p.cache), size,
                               apart, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return e == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace
#endif  // TANDEM_WARPGROUPS

bool WarpgroupsAttend([[maybe_unused]] CacheType type, [[maybe_unused]] int64_t heads,
                      [[maybe_unused]] int64_t lora, [[maybe_unused]] int64_t rope) {
#ifdef TANDEM_WARPGROUPS
  return CanUseWarpgroups() && Encoder() != nullptr && type == kCacheBf16 && heads > kHeads / 2 &&
         lora == kLora && rope == kRope;
#else
  return false;
#endif
}

cudaError_t PrepareWarpgroupAttention() {
#ifdef TANDEM_WARPGROUPS
  if (CanUseWarpgroups()) {
    return cudaFuncSetAttribute(AttendByWarpgroups, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kSharedBytes);
  }
#endif
  return cudaSuccess;
}

cudaError_t LaunchWarpgroupAttention([[maybe_unused]] const AttentionParams& p,
                                     [[maybe_unused]] cudaStream_t stream) {
#ifdef TANDEM_WARPGROUPS
  CUtensorMap map = {};
  const cudaError_t e = MapOf(p, &map);
  if (e != cudaSuccess) return e;
  const dim3 grid(static_cast<unsigned>((p.heads + kHeads - 1) / kHeads), static_cast<unsigned>(p.n),
                  static_cast<unsigned>(p.most_splits));
  return LaunchEarly(AttendByWarpgroups, grid, kThreads, kSharedBytes, stream, p, map);
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace tandem::attention::cuda
