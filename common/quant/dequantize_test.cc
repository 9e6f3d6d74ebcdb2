// Blocks made by hand, with the expected values worked out from the layout alone: first single bits at known
// places (tables of which value each stored bit belongs to), then whole random blocks through a bit-by-bit
// reader that shares no code with the decoder.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "common/quant/blocks.h"
#include "common/quant/quant.h"

namespace tandem::quant {
namespace {

using gguf::TensorType;

constexpr uint16_t kOne = 0x3c00;   // 1.0 as a half
constexpr uint16_t kTwo = 0x4000;   // 2.0
constexpr uint16_t kHalf = 0x3800;  // 0.5

template <typename Block>
Block Zeroed() {
  Block b;
  std::memset(&b, 0, sizeof b);
  return b;
}

template <typename Block>
std::vector<float> Decoded(TensorType type, const Block& block) {
  const auto values = gguf::GetTypeInfo(type).block_size;
  EXPECT_EQ(sizeof(Block), gguf::GetTypeInfo(type).type_size);
  std::vector<float> out(values, NAN);
  Dequantize(type, &block, out.data(), values);
  return out;
}

// All values of `x` are `rest`, but x[at].
void ExpectOnly(const std::vector<float>& x, size_t at, float value, float rest) {
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x[i], i == at ? value : rest) << "value " << i;
}

TEST(Dequantize, Q4_0) {
  auto b = Zeroed<BlockQ4_0>();
  b.d = kTwo;
  std::memset(b.qs, 0x88, sizeof b.qs);  // 8 stands for zero
  b.qs[3] = 0x8f;
  ExpectOnly(Decoded(TensorType::kQ4_0, b), 3, 14.0f, 0.0f);
  b.qs[3] = 0x08;
  ExpectOnly(Decoded(TensorType::kQ4_0, b), 19, -16.0f, 0.0f);
}

TEST(Dequantize, Q4_1) {
  auto b = Zeroed<BlockQ4_1>();
  b.d = kHalf;
  b.m = 0xbc00;  // -1
  b.qs[15] = 0xf0;
  ExpectOnly(Decoded(TensorType::kQ4_1, b), 31, 6.5f, -1.0f);
  b.qs[15] = 0x01;
  ExpectOnly(Decoded(TensorType::kQ4_1, b), 15, -0.5f, -1.0f);
}

TEST(Dequantize, Q5_0) {
  auto b = Zeroed<BlockQ5_0>();
  b.d = kOne;
  std::memset(b.qh, 0xff, sizeof b.qh);  // 16 stands for zero
  b.qs[2] = 0x0f;
  ExpectOnly(Decoded(TensorType::kQ5_0, b), 2, 15.0f, 0.0f);
  b.qs[2] = 0;
  b.qh[3] = 0x7f;  // bit 31
  ExpectOnly(Decoded(TensorType::kQ5_0, b), 31, -16.0f, 0.0f);
  b.qh[3] = 0xff;
  b.qh[1] = 0xfe;  // bit 8
  ExpectOnly(Decoded(TensorType::kQ5_0, b), 8, -16.0f, 0.0f);
}

TEST(Dequantize, Q5_1) {
  auto b = Zeroed<BlockQ5_1>();
  b.d = kTwo;
  b.m = kHalf;
  b.qs[4] = 0xf0;
  b.qh[2] = 0x10;  // bit 20
  ExpectOnly(Decoded(TensorType::kQ5_1, b), 20, 62.5f, 0.5f);
}

TEST(Dequantize, Q8_0) {
  auto b = Zeroed<BlockQ8_0>();
  b.d = kHalf;
  b.qs[31] = -128;
  ExpectOnly(Decoded(TensorType::kQ8_0, b), 31, -64.0f, 0.0f);
}

TEST(Dequantize, Q2_K) {
  auto b = Zeroed<BlockQ2_K>();
  b.d = kHalf;
  b.dmin = kTwo;
  b.scales[13] = 0x36;  // values 208 to 223: scale 6, minimum 3
  auto x = Decoded(TensorType::kQ2_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i / 16 == 13 ? -6.0f : 0.0f) << i;
  // 208 = 128 + 64 + 16: second half, third pair (bits 4 and 5), byte 16.
  b.qs[32 + 16] = 3 << 4;
  x = Decoded(TensorType::kQ2_K, b);
  EXPECT_EQ(x[208], 0.5f * 6 * 3 - 6);
  EXPECT_EQ(x[209], -6.0f);
}

TEST(Dequantize, Q3_K) {
  auto b = Zeroed<BlockQ3_K>();
  b.d = kOne;
  // All scales 32 (zero): high two bits 2, low four bits 0.
  std::memset(b.scales + 8, 0xaa, 4);
  for (const float v : Decoded(TensorType::kQ3_K, b)) EXPECT_EQ(v, 0.0f);
  // Sub-block 9 (values 144 to 159): low bits in the high nibble of byte 1, high bits in byte 8 + 1 from
  // bit 4.
  b.scales[1] = 0x50;
  auto x = Decoded(TensorType::kQ3_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i / 16 == 9 ? 5.0f * -4 : 0.0f) << i;
  b.scales[9] = 0x9a;  // bits 4 and 5: 1, so scale 16 + 5 - 32 = -11
  x = Decoded(TensorType::kQ3_K, b);
  EXPECT_EQ(x[150], 44.0f);
  // Value 150 = 128 + 22: bits 0 and 1 of byte 32 + 22, third bit: bit 150 / 32 = 4 of hmask[22].
  b.qs[32 + 22] = 3;
  b.hmask[22] = 1 << 4;
  x = Decoded(TensorType::kQ3_K, b);
  EXPECT_EQ(x[150], -33.0f);
  EXPECT_EQ(x[149], 44.0f);
  EXPECT_EQ(x[22], 0.0f);
}

TEST(Dequantize, Q4_K) {
  auto b = Zeroed<BlockQ4_K>();
  b.d = kHalf;
  b.dmin = kTwo;
  // Sub-block 2: scale 41 and minimum 5 in six plain bits.
  b.scales[2] = 41;
  b.scales[6] = 5;
  auto x = Decoded(TensorType::kQ4_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i / 32 == 2 ? -10.0f : 0.0f) << i;
  b.qs[32 + 7] = 0x0d;  // pair 1, low nibble: value 64 + 7
  EXPECT_EQ(Decoded(TensorType::kQ4_K, b)[71], 20.5f * 13 - 10);
  // Sub-block 7: scale 54 = 0b11'0110, minimum 27 = 0b01'1011, in three places.
  b = Zeroed<BlockQ4_K>();
  b.d = kHalf;
  b.dmin = kTwo;
  b.scales[11] = 0xb6;
  b.scales[3] = 3 << 6;
  b.scales[7] = 1 << 6;
  x = Decoded(TensorType::kQ4_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i / 32 == 7 ? -54.0f : 0.0f) << i;
  b.qs[96 + 31] = 0xf0;
  EXPECT_EQ(Decoded(TensorType::kQ4_K, b)[255], 27.0f * 15 - 54);
}

TEST(Dequantize, Q5_K) {
  auto b = Zeroed<BlockQ5_K>();
  b.d = kOne;
  b.dmin = kOne;
  b.scales[1] = 2;  // sub-block 1: scale 2, minimum 1
  b.scales[5] = 1;
  b.qs[9] = 0x30;     // value 32 + 9: 3 ...
  b.qh[9] = 1 << 1;   // ... + 16
  b.qh[10] = 1 << 0;  // of sub-block 0, whose scale is 0
  const auto x = Decoded(TensorType::kQ5_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i == 41 ? 37.0f : i / 32 == 1 ? -1.0f : 0.0f) << i;
}

TEST(Dequantize, Q6_K) {
  auto b = Zeroed<BlockQ6_K>();
  b.d = kHalf;
  b.scales[12] = -3;  // values 192 to 207
  auto x = Decoded(TensorType::kQ6_K, b);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(x[i], i / 16 == 12 ? 48.0f : 0.0f) << i;
  // 195 = 128 + 2 * 32 + 3: high nibble of ql[64 + 3], bits 4 and 5 of qh[32 + 3].
  b.ql[67] = 0xa0;
  b.qh[35] = 3 << 4;
  x = Decoded(TensorType::kQ6_K, b);
  EXPECT_EQ(x[195], -1.5f * (48 + 10 - 32));
  EXPECT_EQ(x[196], 48.0f);
  // 239 = 128 + 3 * 32 + 15: high nibble of ql[64 + 32 + 15], bits 6 and 7 of qh[32 + 15]; scale 14.
  b = Zeroed<BlockQ6_K>();
  b.d = kHalf;
  b.scales[14] = 100;
  b.ql[111] = 0x10;
  b.qh[47] = 1 << 6;
  EXPECT_EQ(Decoded(TensorType::kQ6_K, b)[239], 50.0f * (16 + 1 - 32));
}

// --- Random blocks against a reader of single bits ---

int Bit(const uint8_t* bytes, int index) { return bytes[index / 8] >> (index % 8) & 1; }

// `count` bits, lowest first, each at its own place.
int Gather(const uint8_t* bytes, std::initializer_list<int> places) {
  int out = 0;
  int i = 0;
  for (const int place : places) out |= Bit(bytes, place) << i++;
  return out;
}

// Four bits: the low or high nibble of byte `byte`.
int Nibble(const uint8_t* bytes, int byte, bool high) {
  const int at = 8 * byte + (high ? 4 : 0);
  return Gather(bytes, {at, at + 1, at + 2, at + 3});
}

float Expected(const BlockQ2_K& b, int i) {
  const int s = i / 16;
  const int at = 8 * ((i / 128) * 32 + i % 32) + 2 * (i / 32 % 4);
  const float scale = HalfToFloat(b.d) * static_cast<float>(Nibble(b.scales, s, false));
  const float min = HalfToFloat(b.dmin) * static_cast<float>(Nibble(b.scales, s, true));
  return scale * static_cast<float>(Gather(b.qs, {at, at + 1})) - min;
}

float Expected(const BlockQ3_K& b, int i) {
  const int s = i / 16;
  const int high_at = 8 * (8 + s % 4) + 2 * (s / 4);
  const int stored = Nibble(b.scales, s % 8, s >= 8) + 16 * Gather(b.scales, {high_at, high_at + 1});
  const int at = 8 * ((i / 128) * 32 + i % 32) + 2 * (i / 32 % 4);
  const int q = Gather(b.qs, {at, at + 1}) + 4 * Bit(b.hmask, 8 * (i % 32) + i / 32);
  return HalfToFloat(b.d) * static_cast<float>(stored - 32) * static_cast<float>(q - 4);
}

// Six-bit numbers of Q4_K and Q5_K by the places of their bits in the 96 bits of `scales`.
int ScaleOf(const uint8_t* scales, int s) {
  if (s < 4) return Gather(scales, {8 * s, 8 * s + 1, 8 * s + 2, 8 * s + 3, 8 * s + 4, 8 * s + 5});
  const int low = 64 + 8 * (s - 4);
  const int high = 8 * (s - 4) + 6;
  return Gather(scales, {low, low + 1, low + 2, low + 3, high, high + 1});
}
int MinOf(const uint8_t* scales, int s) {
  if (s < 4) return ScaleOf(scales + 4, s);
  const int low = 64 + 8 * (s - 4) + 4;
  const int high = 32 + 8 * (s - 4) + 6;
  return Gather(scales, {low, low + 1, low + 2, low + 3, high, high + 1});
}

float Expected(const BlockQ4_K& b, int i) {
  const int s = i / 32;
  const int q = Nibble(b.qs, 32 * (i / 64) + i % 32, s % 2 == 1);
  return HalfToFloat(b.d) * static_cast<float>(ScaleOf(b.scales, s)) * static_cast<float>(q) -
         HalfToFloat(b.dmin) * static_cast<float>(MinOf(b.scales, s));
}

float Expected(const BlockQ5_K& b, int i) {
  const int s = i / 32;
  const int q = Nibble(b.qs, 32 * (i / 64) + i % 32, s % 2 == 1) + 16 * Bit(b.qh, 8 * (i % 32) + s);
  return HalfToFloat(b.d) * static_cast<float>(ScaleOf(b.scales, s)) * static_cast<float>(q) -
         HalfToFloat(b.dmin) * static_cast<float>(MinOf(b.scales, s));
}

float Expected(const BlockQ6_K& b, int i) {
  const int quarter = i / 32 % 4;
  const int high_at = 8 * ((i / 128) * 32 + i % 32) + 2 * quarter;
  const int q = Nibble(b.ql, 64 * (i / 128) + 32 * (quarter % 2) + i % 32, quarter >= 2) +
                16 * Gather(b.qh, {high_at, high_at + 1});
  const int8_t scale = b.scales[i / 16];
  return HalfToFloat(b.d) * static_cast<float>(scale) * static_cast<float>(q - 32);
}

float Expected(const BlockQ4_0& b, int i) {
  return HalfToFloat(b.d) * static_cast<float>(Nibble(b.qs, i % 16, i >= 16) - 8);
}
float Expected(const BlockQ4_1& b, int i) {
  return HalfToFloat(b.d) * static_cast<float>(Nibble(b.qs, i % 16, i >= 16)) + HalfToFloat(b.m);
}
float Expected(const BlockQ5_0& b, int i) {
  return HalfToFloat(b.d) * static_cast<float>(Nibble(b.qs, i % 16, i >= 16) + 16 * Bit(b.qh, i) - 16);
}
float Expected(const BlockQ5_1& b, int i) {
  return HalfToFloat(b.d) * static_cast<float>(Nibble(b.qs, i % 16, i >= 16) + 16 * Bit(b.qh, i)) +
         HalfToFloat(b.m);
}

template <typename Block>
void CheckRandomBlocks(TensorType type) {
  std::mt19937 random(7);
  const int values = static_cast<int>(gguf::GetTypeInfo(type).block_size);
  constexpr int kBlocks = 50;
  // At an odd address: blocks in a file need no alignment.
  std::vector<uint8_t> bytes(kBlocks * sizeof(Block) + 1);
  for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
  std::vector<Block> blocks(kBlocks);
  std::memcpy(blocks.data(), bytes.data() + 1, kBlocks * sizeof(Block));
  for (auto& b : blocks) {  // finite scales
    b.d = static_cast<uint16_t>(b.d & 0xbfff);
    if constexpr (requires { b.dmin; }) b.dmin = static_cast<uint16_t>(b.dmin & 0xbfff);
    if constexpr (requires { b.m; }) b.m = static_cast<uint16_t>(b.m & 0xbfff);
  }
  std::memcpy(bytes.data() + 1, blocks.data(), kBlocks * sizeof(Block));
  std::vector<float> x(static_cast<size_t>(kBlocks * values));
  Dequantize(type, bytes.data() + 1, x.data(), kBlocks * values);
  for (int k = 0; k < kBlocks; ++k) {
    for (int i = 0; i < values; ++i) ASSERT_EQ(x[k * values + i], Expected(blocks[k], i)) << k << " " << i;
  }
}

TEST(Dequantize, RandomBlocks) {
  CheckRandomBlocks<BlockQ4_0>(TensorType::kQ4_0);
  CheckRandomBlocks<BlockQ4_1>(TensorType::kQ4_1);
  CheckRandomBlocks<BlockQ5_0>(TensorType::kQ5_0);
  CheckRandomBlocks<BlockQ5_1>(TensorType::kQ5_1);
  CheckRandomBlocks<BlockQ2_K>(TensorType::kQ2_K);
  CheckRandomBlocks<BlockQ3_K>(TensorType::kQ3_K);
  CheckRandomBlocks<BlockQ4_K>(TensorType::kQ4_K);
  CheckRandomBlocks<BlockQ5_K>(TensorType::kQ5_K);
  CheckRandomBlocks<BlockQ6_K>(TensorType::kQ6_K);
}

TEST(Dequantize, PlainTypesAtOddAddresses) {
  const float values[] = {1.5f, -2.0f, 65504.0f, 0.0f};
  std::vector<uint8_t> bytes(17);
  float out[4];
  std::memcpy(bytes.data() + 1, values, 16);
  Dequantize(TensorType::kF32, bytes.data() + 1, out, 4);
  EXPECT_EQ(std::memcmp(out, values, 16), 0);
  for (const TensorType type : {TensorType::kF16, TensorType::kBF16}) {
    Quantize(type, values, bytes.data() + 1, 4);
    Dequantize(type, bytes.data() + 1, out, 4);
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(out[i], values[i], std::fabs(values[i]) / 256);
  }
  Dequantize(TensorType::kQ4_K, nullptr, nullptr, 0);  // nothing to do is fine
}

}  // namespace
}  // namespace tandem::quant
