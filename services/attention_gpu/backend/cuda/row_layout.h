// How a row of weights lies in device memory. The values and their bits are those of the GGUF blocks
// (common/quant/blocks.h); only their order differs, so that every access can be 16 bytes wide:
//   Q4_K, Q5_K         as in the file: blocks of 144 and 176 bytes, multiples of 16
//   F32, F16, BF16     as in the file
//   Q4_0, Q5_0, Q8_0, Q6_K   the fields of all blocks of the row, one after the other:
//     Q4_0  qs [16 a block], d [2]          Q5_0  qs [16], qh [4], d [2]
//     Q8_0  qs [32], d [2]                  Q6_K  ql [128], qh [64], scales [16], d [2]
// Rows are padded to 16 bytes. Read by the host compiler and by nvcc.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TANDEM_HOST_DEVICE __host__ __device__
#else
#define TANDEM_HOST_DEVICE
#endif

namespace tandem::attention::cuda {

// GGUF ids (gguf::TensorType) of the types that lie in device memory.
enum : int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ5_0 = 6,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

// A field of a block: `bytes` of it, `offset` into the file's block.
struct BlockField {
  int32_t offset;
  int32_t bytes;
};

// Bytes of a block in the file, its values, and its fields in the order of device memory.
struct BlockShape {
  int32_t bytes = 0;  // 0: not a type that lies in device memory
  int32_t values = 0;
  int32_t fields = 0;
  BlockField field[4] = {};
};

TANDEM_HOST_DEVICE constexpr BlockShape ShapeOf(int32_t type) {
  switch (type) {
    case kF32:
      return {4, 1, 1, {{0, 4}}};
    case kF16:
    case kBF16:
      return {2, 1, 1, {{0, 2}}};
    case kQ4_0:
      return {18, 32, 2, {{2, 16}, {0, 2}}};
    case kQ5_0:
      return {22, 32, 3, {{6, 16}, {2, 4}, {0, 2}}};
    case kQ8_0:
      return {34, 32, 2, {{2, 32}, {0, 2}}};
    case kQ4_K:
      return {144, 256, 1, {{0, 144}}};
    case kQ5_K:
      return {176, 256, 1, {{0, 176}}};
    case kQ6_K:
      return {210, 256, 4, {{0, 128}, {128, 64}, {192, 16}, {208, 2}}};
    default:
      return {};
  }
}

// Bytes of a row of `cols` values in device memory.
TANDEM_HOST_DEVICE constexpr int64_t DeviceRowBytes(int32_t type, int64_t cols) {
  const BlockShape s = ShapeOf(type);
  return (cols / s.values * s.bytes + 15) / 16 * 16;
}

TANDEM_HOST_DEVICE constexpr bool IsDeviceType(int32_t type) { return ShapeOf(type).bytes > 0; }
TANDEM_HOST_DEVICE constexpr bool IsFloatType(int32_t type) {
  return type == kF32 || type == kF16 || type == kBF16;
}

}  // namespace tandem::attention::cuda
