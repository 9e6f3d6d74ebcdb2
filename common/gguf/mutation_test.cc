// Thousands of damaged copies of small valid files: each is accepted or refused, and never more than that.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "common/gguf/exercise_for_test.h"
#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"

namespace tandem::gguf {
namespace {

std::vector<std::string> Seeds() {
  std::vector<std::string> seeds;
  {
    Writer w;
    w.AddString("general.architecture", "deepseek2");
    w.AddUint("deepseek2.block_count", 61);
    w.AddFloat("deepseek2.rope.freq_base", 10000.0f);
    w.AddBool("tokenizer.ggml.add_bos_token", true);
    w.AddStrings("tokenizer.ggml.tokens", {"<s>", "a", "b", "\xc4\xa0the"});
    w.AddInts("tokenizer.ggml.token_type", {3, 1, 1, 1});
    w.AddFloats("scores", {0.0f, -1.0f});
    w.AddUint("split.no", 0, ValueType::kUint16);
    w.AddUint("split.count", 1, ValueType::kUint16);
    static const std::string kData(1024, 'w');
    EXPECT_TRUE(w.AddTensor("token_embd.weight", TensorType::kQ8_0, {32, 4}, AsBytes(kData).first(136)).ok());
    EXPECT_TRUE(w.AddTensor("output_norm.weight", TensorType::kF32, {32}, AsBytes(kData).first(128)).ok());
    EXPECT_TRUE(
        w.AddTensor("blk.0.ffn.weight", TensorType::kQ4_K, {256, 1, 2}, AsBytes(kData).first(288)).ok());
    EXPECT_TRUE(w.AddAlias("blk.1.ffn.weight", "blk.0.ffn.weight").ok());
    seeds.push_back(w.SerializeAll());
    seeds.push_back(w.SerializeAll(64));
  }
  {
    RawGguf v2(1, 2, 2);
    v2.KeyValue<uint64_t>("u64", 10, 1).KeyValue<uint32_t>("general.alignment", 4, 8);
    seeds.push_back(v2.TensorInfo("t", {3, 1, 1, 2}, 1, 0).PadTo(8).Data(12).str());
  }
  seeds.push_back(RawGguf().str());
  return seeds;
}

uint64_t InterestingValue(std::mt19937_64& random) {
  constexpr uint64_t kValues[] = {0,          1,          2,          7,          31,         32,
                                  33,         255,        256,        0x7fff,     0x10000,    0x7fffffff,
                                  0x80000000, 0xffffffff, 1ull << 32, 1ull << 60, 1ull << 61, 1ull << 62,
                                  1ull << 63, ~0ull,      ~0ull - 31, ~0ull / 2,  12,         13};
  return kValues[random() % std::size(kValues)];
}

// One to four damages of kinds that files meet in the wild or in the hands of an attacker.
std::string Mutate(std::string bytes, const std::vector<std::string>& seeds, std::mt19937_64& random) {
  const int damages = 1 + static_cast<int>(random() % 4);
  for (int i = 0; i < damages; ++i) {
    const size_t at = bytes.empty() ? 0 : random() % bytes.size();
    const size_t length = bytes.empty() ? 0 : std::min<size_t>(1 + random() % 40, bytes.size() - at);
    switch (random() % 8) {
      case 0:
        if (!bytes.empty()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
        break;
      case 1:
        if (!bytes.empty()) bytes[at] = static_cast<char>(random());
        break;
      case 2:
      case 3: {  // a number of 1, 2, 4 or 8 bytes
        const uint64_t value = InterestingValue(random);
        const size_t size = std::min<size_t>(size_t{1} << random() % 4, bytes.size() - at);
        std::copy_n(reinterpret_cast<const char*>(&value), size, bytes.begin() + static_cast<ptrdiff_t>(at));
        break;
      }
      case 4:
        bytes.resize(at);
        break;
      case 5:
        bytes.erase(at, length);
        break;
      case 6:
        bytes.insert(random() % (bytes.size() + 1), bytes.substr(at, length));
        break;
      default: {
        const std::string& other = seeds[random() % seeds.size()];
        const size_t from = random() % other.size();
        bytes.insert(at, other.substr(from, 1 + random() % 60));
        break;
      }
    }
  }
  return bytes;
}

TEST(Mutation, DamagedFilesAreAcceptedOrRefusedAndNothingElse) {
  const std::vector<std::string> seeds = Seeds();
  for (const std::string& seed : seeds) {
    ASSERT_TRUE(Exercise(AsBytes(seed)).file_accepted);
  }
  std::mt19937_64 random(20260101);
  int headers = 0;
  int files = 0;
  constexpr int kRounds = 20000;
  for (int i = 0; i < kRounds; ++i) {
    const std::string bytes = Mutate(seeds[random() % seeds.size()], seeds, random);
    const ExerciseResult result = Exercise(AsBytes(bytes));
    headers += result.header_accepted;
    files += result.file_accepted;
  }
  // Both outcomes must be common, or the damages do not reach what they are meant to test.
  EXPECT_GT(files, kRounds / 50);
  EXPECT_GT(headers, files);
  EXPECT_LT(headers, kRounds / 2);
}

}  // namespace
}  // namespace tandem::gguf
