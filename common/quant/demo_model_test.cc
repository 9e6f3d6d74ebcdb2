// llama.cpp quantized these files from the BF16 one: decoding them must come near it. Nothing of ours made
// them, so this checks the bit layouts themselves.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/gguf/gguf.h"
#include "common/gguf/raw_gguf_for_test.h"
#include "common/quant/quant.h"

namespace tandem::quant {
namespace {

std::vector<float> Values(const gguf::Tensor& tensor) {
  const int64_t n = tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3];
  std::vector<float> out(static_cast<size_t>(n));
  Dequantize(tensor.type, tensor.data, out.data(), n);
  return out;
}

struct Sums {
  int tensors = 0;
  double error = 0;
  double power = 0;
  double worst = 0;  // relative RMS error of the worst tensor
};

// Over all tensors of a type.
std::map<std::string, Sums> Compare(const gguf::File& file, const gguf::File& original) {
  std::map<std::string, Sums> out;
  for (const gguf::Tensor& tensor : file.tensors()) {
    const gguf::Tensor* reference = original.FindTensor(tensor.name);
    if (reference == nullptr) continue;  // another layout of the same weights
    const std::vector<float> a = Values(tensor);
    const std::vector<float> b = Values(*reference);
    EXPECT_EQ(a.size(), b.size()) << tensor.name;
    if (a.size() != b.size()) continue;
    double error = 0;
    double power = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      error += (a[i] - b[i]) * static_cast<double>(a[i] - b[i]);
      power += b[i] * static_cast<double>(b[i]);
    }
    Sums& sums = out[std::string(gguf::TypeName(tensor.type))];
    ++sums.tensors;
    sums.error += error;
    sums.power += power;
    sums.worst = std::max(sums.worst, std::sqrt(error / power));
  }
  return out;
}

class DemoModel : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = gguf::SharedFolder().value_or("../shared") + "/demo_model/";
    if (!std::filesystem::exists(folder_ + "tinyr1-bf16.gguf")) {
      GTEST_SKIP() << "no demo_model/tinyr1-bf16.gguf in ../shared (TANDEM_SHARED)";
    }
    original_ = Open("tinyr1-bf16.gguf");
    ASSERT_NE(original_, nullptr);
  }
  std::unique_ptr<gguf::File> Open(const std::string& name) {
    auto file = gguf::File::Open(folder_ + name);
    EXPECT_TRUE(file.ok()) << file.status();
    return file.ok() ? *std::move(file) : nullptr;
  }
  void Check(const std::string& name, const std::map<std::string, double>& limits) {
    const auto file = Open(name);
    ASSERT_NE(file, nullptr);
    const auto sums = Compare(*file, *original_);
    for (const auto& [type, limit] : limits) {
      ASSERT_TRUE(sums.contains(type)) << type;
      const Sums& s = sums.at(type);
      EXPECT_GT(s.tensors, 0);
      EXPECT_GT(s.power, 0);
      EXPECT_LE(std::sqrt(s.error / s.power), limit) << type;
      EXPECT_LE(s.worst, 1.5 * limit) << type;
    }
  }
  std::string folder_;
  std::unique_ptr<gguf::File> original_;
};

TEST_F(DemoModel, Q8) { Check("tinyr1-Q8_0.gguf", {{"F32", 0.0}, {"Q8_0", 0.01}}); }

TEST_F(DemoModel, Q4KM) {
  Check("tinyr1-Q4_K_M.gguf", {{"F32", 0.0}, {"Q4_K", 0.09}, {"Q5_0", 0.05}, {"Q6_K", 0.025}});
}

TEST_F(DemoModel, OldLayout) {
  Check("tinyr1-Q4_K_M-oldlayout.gguf", {{"F32", 0.0}, {"Q4_K", 0.09}, {"Q6_K", 0.025}});
}

// Our own quantizers on real weights: no worse than twice the error that llama.cpp's search leaves, where
// known.
TEST_F(DemoModel, OurQuantizersOnRealWeights) {
  using gguf::TensorType;
  const gguf::Tensor* tensor = original_->FindTensor("blk.1.ffn_down_exps.weight");
  ASSERT_NE(tensor, nullptr);
  const std::vector<float> x = Values(*tensor);
  const auto n = static_cast<int64_t>(x.size());
  for (const auto& [type, limit] : std::map<TensorType, double>{{TensorType::kQ4_0, 0.13},
                                                                {TensorType::kQ4_1, 0.11},
                                                                {TensorType::kQ5_0, 0.06},
                                                                {TensorType::kQ5_1, 0.06},
                                                                {TensorType::kQ8_0, 0.01},
                                                                {TensorType::kQ2_K, 0.45},
                                                                {TensorType::kQ3_K, 0.25},
                                                                {TensorType::kQ4_K, 0.12},
                                                                {TensorType::kQ5_K, 0.06},
                                                                {TensorType::kQ6_K, 0.035},
                                                                {TensorType::kBF16, 0.0}}) {
    std::vector<uint8_t> blocks(static_cast<size_t>(gguf::RowBytes(type, n)));
    Quantize(type, x.data(), blocks.data(), n);
    std::vector<float> y(x.size());
    Dequantize(type, blocks.data(), y.data(), n);
    double error = 0;
    double power = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      error += (x[i] - y[i]) * static_cast<double>(x[i] - y[i]);
      power += x[i] * static_cast<double>(x[i]);
    }
    EXPECT_LE(std::sqrt(error / power), limit) << gguf::TypeName(type);
  }
}

}  // namespace
}  // namespace tandem::quant
