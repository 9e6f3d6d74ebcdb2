// Products of matrices in shared memory by warpgroups: four warps together, one instruction for 64 rows, 16
// inputs and up to 256 columns, done while the warps go on (PTX's wgmma). Devices of compute capability 9.0
// have it, in code built for "90a"; nothing else does.
#pragma once

#include <cstdint>

// CMake says with TANDEM_WARPGROUPS whether this build has code for 90a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TANDEM_WARPGROUP_CODE 1
#endif

namespace tandem::attention::cuda {

#ifdef TANDEM_WARPGROUP_CODE

// A matrix of two-byte values in shared memory, rows of 64 inputs (128 bytes) one after the other, sixteen
// bytes p of row r at place p ^ (r & 7) of the row; `address` is a multiple of 1024, plus 32 for each 16
// inputs further on. (PTX ISA, "Matrix-Descriptor Format": swizzle of 128 bytes, 1024 bytes from eight rows
// to the next eight.)
__device__ __forceinline__ uint64_t SharedMatrix(uint32_t address) {
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same memory with what lies along its rows as a product's columns, 64 of them, and its rows as inputs:
// `address` is a multiple of 1024, plus 2048 for each 16 inputs further on. The next 64 columns are kNext
// bytes behind it.
template <uint32_t kNext>
__device__ __forceinline__ uint64_t SharedMatrixOfColumns(uint32_t address) {
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{kNext >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// Ordinary writes of this thread to shared memory before it are seen by products that begin behind the next
// barrier, and come before what the copy engine writes there when it is told to behind one.
__device__ __forceinline__ void ShowToWarpgroups() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void BeginWarpgroupProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void CommitWarpgroupProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kLeft committed groups of this warpgroup are unfinished.
template <int kLeft>
__device__ __forceinline__ void AwaitWarpgroupProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Between products and whatever else reads or writes their sums, behind AwaitWarpgroupProducts: the compiler
// knows of a product as of any instruction, whose result is there at once.
template <int kColumnTiles>
__device__ __forceinline__ void HoldSums(float (&sums)[kColumnTiles][4]) {
#pragma unroll
  for (auto& tile : sums) {
    asm volatile("" : "+f"(tile[0]), "+f"(tile[1]), "+f"(tile[2]), "+f"(tile[3])::"memory");
  }
}

#define TANDEM_SUMS_4(s, n) "+f"((s)[n][0]), "+f"((s)[n][1]), "+f"((s)[n][2]), "+f"((s)[n][3])
#define TANDEM_SUMS_16(s, n) \
  TANDEM_SUMS_4(s, n), TANDEM_SUMS_4(s, n + 1), TANDEM_SUMS_4(s, n + 2), TANDEM_SUMS_4(s, n + 3)
#define TANDEM_SUMS_32(s, n) TANDEM_SUMS_16(s, n), TANDEM_SUMS_16(s, n + 4)
#define TANDEM_SUMS_64(s, n) TANDEM_SUMS_32(s, n), TANDEM_SUMS_32(s, n + 8)
#define TANDEM_NAMES_0_15 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define TANDEM_NAMES_0_31                                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%" \
  "28,"                                                                                                     \
  "%29,%30,%31"
#define TANDEM_NAMES_32_63                                                                               \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define TANDEM_NAMES_64_127                                                                                  \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,"     \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// sums[64, 8 kColumnTiles] += a[64, 16] b[16, 8 kColumnTiles]; both matrices have inputs along their rows.
// Warp w of the four holds rows 16 w to 16 w + 15, its lanes the places that MmaF16 gives them: sums[n] are
// columns 8 n to 8 n + 7. They may not be touched until AwaitWarpgroupProducts says that the product has
// ended.
template <int kColumnTiles>
__device__ __forceinline__ void WarpgroupMma(float (&sums)[kColumnTiles][4], uint64_t a, uint64_t b) {
  static_assert(kColumnTiles == 8 || kColumnTiles == 16 || kColumnTiles == 32);
  if constexpr (kColumnTiles == 8) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TANDEM_NAMES_0_31
        "}, %32, %33, add, 1, 1, 0, 0;\n}\n"
        : TANDEM_SUMS_32(sums, 0)
        : "l"(a), "l"(b));
  } else if constexpr (kColumnTiles == 16) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TANDEM_NAMES_0_31 "," TANDEM_NAMES_32_63
        "}, %64, %65, add, 1, 1, 0, 0;\n}\n"
        : TANDEM_SUMS_64(sums, 0)
        : "l"(a), "l"(b));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" TANDEM_NAMES_0_31 "," TANDEM_NAMES_32_63
        "," TANDEM_NAMES_64_127 "}, %128, %129, add, 1, 1, 0, 0;\n}\n"
        : TANDEM_SUMS_64(sums, 0), TANDEM_SUMS_64(sums, 16)
        : "l"(a), "l"(b));
  }
}

// sums[64, 32] += a[64, 16] b[16, 32] as above, in bfloat16.
__device__ __forceinline__ void WarpgroupScores(float (&sums)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" TANDEM_NAMES_0_15
      "}, %16, %17, add, 1, 1, 0, 0;\n}\n"
      : TANDEM_SUMS_16(sums, 0)
      : "l"(a), "l"(b));
}
// With a in registers, each warp's 16 rows as for MmaBf16.
__device__ __forceinline__ void WarpgroupScores(float (&sums)[4][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" TANDEM_NAMES_0_15
      "}, {%16,%17,%18,%19}, %20, add, 1, 1, 0;\n}\n"
      : TANDEM_SUMS_16(sums, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sums[64, 256] += a[64, 16] b[16, 256] in bfloat16: a in registers, b a SharedMatrixOfColumns.
__device__ __forceinline__ void WarpgroupValues(float (&sums)[32][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" TANDEM_NAMES_0_31 "," TANDEM_NAMES_32_63
      "," TANDEM_NAMES_64_127 "}, {%128,%129,%130,%131}, %132, add, 1, 1, 1;\n}\n"
      : TANDEM_SUMS_64(sums, 0), TANDEM_SUMS_64(sums, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef TANDEM_SUMS_4
#undef TANDEM_SUMS_16
#undef TANDEM_SUMS_32
#undef TANDEM_SUMS_64
#undef TANDEM_NAMES_0_15
#undef TANDEM_NAMES_0_31
#undef TANDEM_NAMES_32_63
#undef TANDEM_NAMES_64_127

#endif  // TANDEM_WARPGROUP_CODE

}  // namespace tandem::attention::cuda
