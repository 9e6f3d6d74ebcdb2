// Decoding weights in device memory (row_layout.h): scales and bits, and 32 consecutive values at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/row_layout.h"

namespace tandem::attention::cuda {

__device__ __forceinline__ uint4 Load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

__device__ __forceinline__ float HalfBits(uint32_t h) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(h)));
}

__device__ __forceinline__ float HalfAt(const uint8_t* p) {
  return HalfBits(__ldg(reinterpret_cast<const unsigned short*>(p)));
}

__device__ __forceinline__ uint32_t ByteOf(uint32_t word, int i) { return word >> (8 * i) & 255; }

// Scale and minimum of sub-block s of a Q4_K or Q5_K block whose first 16 bytes are `head`.
__device__ __forceinline__ void ScaleMinOf(const uint4& head, int s, float* scale, float* min) {
  const int i = s & 3;
  const uint32_t a = ByteOf(head.y, i), b = ByteOf(head.z, i), c = ByteOf(head.w, i);
  const uint32_t sc = s < 4 ? a & 63 : (c & 15) | (a >> 6) << 4;
  const uint32_t mn = s < 4 ? b & 63 : (c >> 4) | (b >> 6) << 4;
  *scale = HalfBits(head.x & 0xffff) * static_cast<float>(sc);
  *min = HalfBits(head.x >> 16) * static_cast<float>(mn);
}

// Bit i of the last four bits of `word` as the lowest bit of byte i.
__device__ __forceinline__ uint32_t SpreadBits(uint32_t word) {
  return (word & 15) * 0x00204081u & 0x01010101u;
}

// Four values of 0..63 in the bytes of `q`, minus 32 each, as int8.
__device__ __forceinline__ uint32_t Minus32(uint32_t q) {
  const uint32_t t = q ^ 0x20202020u;
  const uint32_t sign = t & 0x20202020u;
  return t | sign << 1 | sign << 2;
}

// What 32 consecutive values of a row (chunk c holds values 32 c to 32 c + 31) need from memory.
struct Raw {
  uint4 a, b;    // the low bits, or half of the values
  uint4 h0, h1;  // the high bits, or the other half
  uint4 head;    // scales
};

__device__ __forceinline__ void LoadRaw(int type, const uint8_t* row, int cols, int c, Raw& r) {
  const int block = c >> 3, s = c & 7;
  switch (type) {
    case kQ4_K: {
      const uint8_t* p = row + block * 144;
      r.head = Load16(p);
      r.a = Load16(p + 16 + (s >> 1) * 32);
      r.b = Load16(p + 32 + (s >> 1) * 32);
      break;
    }
    case kQ5_K: {
      const uint8_t* p = row + block * 176;
      r.head = Load16(p);
      r.h0 = Load16(p + 16);
      r.h1 = Load16(p + 32);
      r.a = Load16(p + 48 + (s >> 1) * 32);
      r.b = Load16(p + 64 + (s >> 1) * 32);
      break;
    }
    case kQ6_K: {
      const int blocks = cols >> 8, half = s >> 2, quarter = s & 3;
      const uint8_t* p = row + block * 128 + half * 64 + (quarter & 1) * 32;
      r.a = Load16(p);
      r.b = Load16(p + 16);
      p = row + blocks * 128 + block * 64 + half * 32;
      r.h0 = Load16(p);
      r.h1 = Load16(p + 16);
      const int8_t* scale = reinterpret_cast<const int8_t*>(row + blocks * 192 + block * 16) + 2 * s;
      const float d = HalfAt(row + blocks * 208 + block * 2);
      r.head.x = __float_as_uint(d * static_cast<float>(__ldg(scale)));
      r.head.y = __float_as_uint(d * static_cast<float>(__ldg(scale + 1)));
      break;
    }
    case kQ8_0: {
      r.a = Load16(row + c * 32);
      r.b = Load16(row + c * 32 + 16);
      r.head.x = __float_as_uint(HalfAt(row + cols + c * 2));
      break;
    }
    case kQ4_0: {
      r.a = Load16(row + c * 16);
      r.head.x = __float_as_uint(HalfAt(row + (cols >> 1) + c * 2));
      break;
    }
    case kQ5_0: {
      r.a = Load16(row + c * 16);
      r.head.x = __float_as_uint(HalfAt(row + (cols >> 5) * 20 + c * 2));
      r.head.y = __ldg(reinterpret_cast<const uint32_t*>(row + (cols >> 1)) + c);
      break;
    }
    default: {  // F16, BF16
      const uint8_t* p = row + c * 64;
      r.a = Load16(p);
      r.b = Load16(p + 16);
      r.h0 = Load16(p + 32);
      r.h1 = Load16(p + 48);
    }
  }
}

// Byte i of `word` (0..255) as float32: placed into the mantissa of 2^23.
template <int kByte>
__device__ __forceinline__ float ByteFloat(uint32_t word) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + kByte)) - 8388608.0f;
}

template <typename Out>
__device__ __forceinline__ void Emit4(uint32_t q, float scale, float add, Out& out, int at) {
  out.Put(at, fmaf(scale, ByteFloat<0>(q), add), fmaf(scale, ByteFloat<1>(q), add));
  out.Put(at + 2, fmaf(scale, ByteFloat<2>(q), add), fmaf(scale, ByteFloat<3>(q), add));
}

__device__ __forceinline__ uint32_t WordOf(const uint4& a, const uint4& b, int i) {
  return i == 0   ? a.x
         : i == 1 ? a.y
         : i == 2 ? a.z
         : i == 3 ? a.w
         : i == 4 ? b.x
         : i == 5 ? b.y
         : i == 6 ? b.z
                  : b.w;
}

// The 32 values, two at a time: out.Put(i, value i, value i + 1) for even i.
template <typename Out>
__device__ __forceinline__ void DecodeRaw(int type, const Raw& r, int c, Out& out) {
  const int s = c & 7;
  switch (type) {
    case kQ4_K:
    case kQ5_K: {
      float scale, min;
      ScaleMinOf(r.head, s, &scale, &min);
      const int shift = 4 * (s & 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t q = WordOf(r.a, r.b, i) >> shift & 0x0f0f0f0fu;
        if (type == kQ5_K) q |= (WordOf(r.h0, r.h1, i) >> s & 0x01010101u) << 4;
        Emit4(q, scale, -min, out, 4 * i);
      }
      break;
    }
    case kQ6_K: {
      const int quarter = s & 3;
      const float d0 = __uint_as_float(r.head.x), d1 = __uint_as_float(r.head.y);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t q = (WordOf(r.a, r.b, i) >> (4 * (quarter >> 1)) & 0x0f0f0f0fu) |
                           (WordOf(r.h0, r.h1, i) >> (2 * quarter) & 0x03030303u) << 4;
        const float d = i < 4 ? d0 : d1;
        Emit4(q, d, -32.0f * d, out, 4 * i);
      }
      break;
    }
    case kQ8_0: {
      const float d = __uint_as_float(r.head.x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        Emit4(WordOf(r.a, r.b, i) ^ 0x80808080u, d, -128.0f * d, out, 4 * i);
      }
      break;
    }
    case kQ4_0:
    case kQ5_0: {
      const float d = __uint_as_float(r.head.x);
      const float add = (type == kQ5_0 ? -16.0f : -8.0f) * d;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t q = WordOf(r.a, r.a, i & 3) >> (i < 4 ? 0 : 4) & 0x0f0f0f0fu;
        if (type == kQ5_0) q |= SpreadBits(r.head.y >> (4 * i)) << 4;
        Emit4(q, d, add, out, 4 * i);
      }
      break;
    }
    default: {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t w = i < 8 ? WordOf(r.a, r.b, i) : WordOf(r.h0, r.h1, i - 8);
        if (type == kF16) {
          out.Put(2 * i, HalfBits(w & 0xffff), HalfBits(w >> 16));
        } else {
          out.Put(2 * i, __uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
        }
      }
    }
  }
}

}  // namespace tandem::attention::cuda
