// Calls, and processes to answer them, for the tests of Moe.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/testing/synthetic_model.h"

namespace tandem::expert::testing {

using kernels::Precision;

// A batch of calls' inputs, owned.
struct Batch {
  int64_t n = 0;
  int64_t k = 0;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<float> x;

  static Batch Random(const SyntheticShape& shape, int64_t n, uint64_t seed) {
    Batch b;
    b.n = n;
    b.k = shape.experts_per_token;
    b.ids = RandomIds(n, b.k, shape.experts, seed);
    b.weights = RandomFloats(n * b.k, seed + 1);
    b.x = RandomFloats(n * shape.hidden, seed + 2);
    return b;
  }
  Batch Token(int64_t t) const {
    const int64_t hidden = static_cast<int64_t>(x.size()) / n;
    Batch b;
    b.n = 1;
    b.k = k;
    b.ids.assign(ids.begin() + t * k, ids.begin() + (t + 1) * k);
    b.weights.assign(weights.begin() + t * k, weights.begin() + (t + 1) * k);
    b.x.assign(x.begin() + t * hidden, x.begin() + (t + 1) * hidden);
    return b;
  }
};

template <typename T>
std::span<const uint8_t> Bytes(const std::vector<T>& v) {
  return {reinterpret_cast<const uint8_t*>(v.data()), v.size() * sizeof(T)};
}

inline Call ToCall(const Batch& batch, AnswerType answer, int64_t layer = 1) {
  Call call;
  call.layer = layer;
  call.n_tokens = batch.n;
  call.experts_per_token = batch.k;
  call.expert_ids = Bytes(batch.ids);
  call.expert_weights = Bytes(batch.weights);
  call.activations = Bytes(batch.x);
  call.answer_type = answer;
  return call;
}

// A shard, its threads and its Moe.
class Process {
 public:
  explicit Process(const SyntheticModel& model, const ShardRequest& request = {}, int threads = 2,
                   Precision precision = Precision::kFast) {
    LoadOptions load;
    load.request = request;
    load.threads = 2;
    auto shard = Shard::Load(model.path(), load);
    if (!shard.ok()) {
      ADD_FAILURE() << shard.status();
      abort();
    }
    shard_ = std::move(*shard);
    threading::ThreadPool::Options pool;
    pool.threads = threads;
    pool_ = std::make_unique<threading::ThreadPool>(pool);
    Moe::Options options;
    options.precision = precision;
    options.max_tokens = 1024;
    moe_ = std::make_unique<Moe>(*shard_, *pool_, options);
  }
  Moe& moe() { return *moe_; }
  const Shard& shard() const { return *shard_; }

  std::vector<float> F32(const Batch& batch, int64_t layer = 1) {
    return Run<float>(ToCall(batch, AnswerType::kF32, layer));
  }
  std::vector<double> F64(const Batch& batch, int64_t layer = 1) {
    return Run<double>(ToCall(batch, AnswerType::kF64, layer));
  }
  template <typename T>
  std::vector<T> Run(const Call& call) {
    std::vector<T> out(moe_->AnswerBytes(call.n_tokens, call.answer_type) / sizeof(T),
                       std::numeric_limits<T>::quiet_NaN());
    const auto done = moe_->Forward(call, {reinterpret_cast<uint8_t*>(out.data()), out.size() * sizeof(T)});
    EXPECT_TRUE(done.ok()) << done.status();
    return out;
  }

 private:
  std::unique_ptr<Shard> shard_;
  std::unique_ptr<threading::ThreadPool> pool_;
  std::unique_ptr<Moe> moe_;
};

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Root mean square of the difference, as a share of that of the reference.
inline double RelativeError(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

}  // namespace tandem::expert::testing
