#include "services/expert_cpu/testing/synthetic_model.h"

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>

#include "common/quant/quant.h"

namespace tandem::expert::testing {
namespace {

uint64_t Next(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dULL;
}

float NextFloat(uint64_t& state) { return static_cast<float>(Next(state) >> 40) / 8388608.0f - 1.0f; }

}  // namespace

std::vector<float> RandomFloats(int64_t n, uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 1;
  std::vector<float> out(static_cast<size_t>(n));
  for (float& f : out) f = NextFloat(state);
  return out;
}

std::vector<int32_t> RandomIds(int64_t n, int64_t k, int64_t experts, uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 7;
  std::vector<int32_t> all(static_cast<size_t>(experts)), out;
  std::iota(all.begin(), all.end(), 0);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      const auto left = static_cast<uint64_t>(experts - i);
      std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(i) + Next(state) % left]);
    }
    out.insert(out.end(), all.begin(), all.begin() + k);
  }
  return out;
}

SyntheticModel::Stack SyntheticModel::Random(gguf::TensorType type, int64_t cols, int64_t rows) {
  Stack out;
  const int64_t n = cols * rows * shape_.experts;
  std::vector<float> values(static_cast<size_t>(n));
  const float scale = std::sqrt(3.0f / static_cast<float>(cols));
  for (float& v : values) v = scale * NextFloat(random_state_);
  out.bytes.resize(static_cast<size_t>(gguf::RowBytes(type, n)));
  quant::Quantize(type, values.data(), out.bytes.data(), n);
  out.values.resize(values.size());
  quant::Dequantize(type, out.bytes.data(), out.values.data(), n);
  return out;
}

SyntheticModel::SyntheticModel(const SyntheticShape& shape)
    : shape_(shape), random_state_(shape.seed * 0x9e3779b97f4a7c15ULL + 3) {
  static std::atomic<int> counter{0};
  path_ = "/tmp/tandem_synthetic_" + std::to_string(getpid()) + "_" + std::to_string(counter++) + ".gguf";
  gguf::Writer w;
  const auto u32 = [&](const char* key, int64_t v) {
    w.AddUint(std::string("deepseek2.") + key, static_cast<uint64_t>(v));
  };
  w.AddString("general.architecture", "deepseek2");
  w.AddString("general.name", "synthetic");
  u32("block_count", shape.layers);
  u32("context_length", 1024);
  u32("embedding_length", shape.hidden);
  u32("feed_forward_length", 512);
  u32("attention.head_count", 4);
  u32("attention.kv_lora_rank", 64);
  u32("attention.key_length", 48);
  u32("attention.value_length", 32);
  u32("rope.dimension_count", 16);
  u32("leading_dense_block_count", 1);
  u32("vocab_size", 1000);
  u32("expert_count", shape.experts);
  u32("expert_used_count", shape.experts_per_token);
  u32("expert_feed_forward_length", shape.inner);
  u32("expert_shared_count", 1);
  u32("expert_gating_func", 2);
  const auto layers = static_cast<size_t>(shape.layers);
  gate_.resize(layers);
  up_.resize(layers);
  down_.resize(layers);
  std::vector<std::vector<uint8_t>> fused(layers);
  const auto add = [&](const std::string& name, gguf::TensorType type, std::vector<int64_t> ne,
                       const std::vector<uint8_t>& bytes) {
    const absl::Status status = w.AddTensor(name, type, std::move(ne), bytes);
    if (!status.ok()) {
      std::cerr << status << "\n";
      std::abort();
    }
  };
  for (size_t l = 1; l < layers; ++l) {
    const std::string blk = "blk." + std::to_string(l) + ".";
    gate_[l] = Random(shape.gate, shape.hidden, shape.inner);
    up_[l] = Random(shape.up, shape.hidden, shape.inner);
    down_[l] = Random(shape.down, shape.inner, shape.hidden);
    if (shape.fused_gate_up) {
      const size_t each = gate_[l].bytes.size() / static_cast<size_t>(shape.experts);
      for (size_t e = 0; e < static_cast<size_t>(shape.experts); ++e) {
        for (const Stack* part : {&gate_[l], &up_[l]}) {
          const auto from = part->bytes.begin() + static_cast<int64_t>(e * each);
          fused[l].insert(fused[l].end(), from, from + static_cast<int64_t>(each));
        }
      }
      add(blk + "ffn_gate_up_exps.weight", shape.gate, {shape.hidden, 2 * shape.inner, shape.experts},
          fused[l]);
    } else {
      add(blk + "ffn_gate_exps.weight", shape.gate, {shape.hidden, shape.inner, shape.experts},
          gate_[l].bytes);
      add(blk + "ffn_up_exps.weight", shape.up, {shape.hidden, shape.inner, shape.experts}, up_[l].bytes);
    }
    add(blk + "ffn_down_exps.weight", shape.down, {shape.inner, shape.hidden, shape.experts}, down_[l].bytes);
  }
  const absl::Status written = w.WriteFile(path_);
  if (!written.ok()) {
    std::cerr << written << "\n";
    std::abort();
  }
}

SyntheticModel::~SyntheticModel() { std::remove(path_.c_str()); }

std::vector<double> SyntheticModel::Reference(int64_t layer, const std::vector<float>& x,
                                              const std::vector<int32_t>& ids,
                                              const std::vector<float>& weights, int64_t k) const {
  const auto hidden = static_cast<size_t>(shape_.hidden), inner = static_cast<size_t>(shape_.inner);
  const auto l = static_cast<size_t>(layer);
  const size_t n = x.size() / hidden;
  std::vector<double> out(n * hidden, 0.0), h(inner);
  for (size_t pair = 0; pair < ids.size(); ++pair) {
    if (ids[pair] < 0) continue;
    const auto e = static_cast<size_t>(ids[pair]);
    const size_t t = pair / static_cast<size_t>(k);
    const float* token = x.data() + t * hidden;
    for (size_t r = 0; r < inner; ++r) {
      const float* gate = gate_[l].values.data() + (e * inner + r) * hidden;
      const float* up = up_[l].values.data() + (e * inner + r) * hidden;
      double g = 0, u = 0;
      for (size_t c = 0; c < hidden; ++c) {
        g += static_cast<double>(gate[c]) * token[c];
        u += static_cast<double>(up[c]) * token[c];
      }
      h[r] = g / (1 + std::exp(-g)) * u;
    }
    for (size_t o = 0; o < hidden; ++o) {
      const float* down = down_[l].values.data() + (e * hidden + o) * inner;
      double y = 0;
      for (size_t c = 0; c < inner; ++c) y += static_cast<double>(down[c]) * h[c];
      out[t * hidden + o] += static_cast<double>(weights[pair]) * y;
    }
  }
  return out;
}

}  // namespace tandem::expert::testing
