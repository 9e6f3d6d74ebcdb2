// The GPU's own calls against a host that answers through the same shared memory, in this process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cuda/bell.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "services/attention_gpu/backend/cuda/ring_peers_for_test.h"
#include "services/attention_gpu/backend/cuda/step_graph.h"
#include "services/attention_gpu/experts/deferral.h"

namespace tandem::attention::cuda {
namespace {

using testing::Check;
using testing::Peers;

constexpr uint32_t kHidden = 512, kPairs = 4, kMostRows = 40;

// What expert process `ring` makes of a value of the activations.
double Answer(float x, uint32_t layer, float weights, size_t ring) {
  return static_cast<double>(x) * (layer + 1) + weights + 1e-9 * static_cast<double>(ring + 1);
}

// y = Answer(x): what all processes of these tests make of a call; layer 99 is none of theirs.
absl::Status AnswerAll(const shm::IncomingCall& call, size_t index) {
  if (call.layer == 99) return absl::NotFoundError("no layer 99");
  for (uint32_t t = 0; t < call.rows; ++t) {
    float weights = 0;
    for (uint32_t k = 0; k < call.pairs; ++k) {
      float w;
      int32_t id;
      std::memcpy(&w, call.weights.data() + (t * call.pairs + k) * 4, 4);
      std::memcpy(&id, call.ids.data() + (t * call.pairs + k) * 4, 4);
      weights += w * static_cast<float>(id);
    }
    for (int64_t i = 0; i < kHidden; ++i) {
      const int64_t at = t * kHidden + i;
      float x;
      if (call.input_type == shm::ValueType::kBf16) {
        uint16_t h;
        std::memcpy(&h, call.input.data() + 2 * at, 2);
        x = quant::Bf16ToFloat(h);
      } else {
        std::memcpy(&x, call.input.data() + 4 * at, 4);
      }
      const double y = Answer(x, call.layer, weights, index);
      const auto single = static_cast<float>(y);
      if (call.output_type == shm::ValueType::kF64) {
        std::memcpy(call.output.data() + 8 * at, &y, 8);
      } else {
        std::memcpy(call.output.data() + 4 * at, &single, 4);
      }
    }
  }
  return absl::OkStatus();
}

const shm::RegionShape kShape = {1, kMostRows, kPairs, kHidden};

class BellTest : public ::testing::TestWithParam<BellKind> {
 protected:
  void SetUp() override {
    TANDEM_NEEDS_GPU();
    config_.hidden_size = kHidden;
    config_.num_experts_per_tok = kPairs;
    ASSERT_TRUE(OpenDevice(0).ok());
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    device_.Want(&normed_, kMostRows * kHidden);
    device_.Want(&x_, kMostRows * kHidden);
    device_.Want(&ids_, kMostRows * kPairs);
    device_.Want(&weights_, kMostRows * kPairs);
    device_.Want(&defers_, kMostRows);
    ASSERT_TRUE(device_.Allocate("a test").ok());
    for (int64_t i = 0; i < kMostRows * kHidden; ++i) {
      activations_.push_back(
          quant::Bf16ToFloat(quant::FloatToBf16(0.37f * static_cast<float>(i % 101 - 50))));
    }
    for (int64_t i = 0; i < kMostRows * kPairs; ++i) {
      expert_ids_.push_back(static_cast<int32_t>(i * 7 % 256));
      expert_weights_.push_back(0.01f * static_cast<float>(i % 13));
    }
    Upload(normed_, activations_);
    Upload(ids_, expert_ids_);
    Upload(weights_, expert_weights_);
    std::vector<int32_t> odd(kMostRows);
    for (size_t t = 0; t < odd.size(); ++t) odd[t] = t % 2 == 1 ? 1 : 0;
    Upload(defers_, odd);
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  template <typename T>
  void Upload(T* to, const std::vector<T>& from) {
    ASSERT_EQ(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }

  std::unique_ptr<Bell> Open(Peers& peers) {
    auto bell = Bell::Open(config_, &peers, GetParam(), 0);
    EXPECT_TRUE(bell.ok()) << bell.status();
    return bell.ok() ? std::move(*bell) : nullptr;
  }

  RoutedCall Call(int64_t index, int64_t n, int64_t layer) const {
    RoutedCall call;
    call.layer = layer;
    call.index = index;
    call.n = n;
    call.normed = normed_;
    call.ids = ids_;
    call.weights = weights_;
    call.x = x_;
    return call;
  }
  // So many layers, which defer as many experts.
  absl::Status Put(Bell& bell, int64_t layers, int64_t n, int32_t defer = 0) {
    for (int64_t i = 0; i < layers; ++i) {
      RoutedCall call = Call(i, n, i);
      call.defer = defer;
      call.defers = defers_;
      call.last = i + 1 == layers;
      absl::Status s = bell.Ask(call, stream_);
      if (s.ok()) s = bell.Add(call, stream_);
      if (!s.ok()) return s;
    }
    return absl::OkStatus();
  }
  // A run that is put on the stream directly, or by the graph.
  absl::Status Run(Bell& bell, int64_t layers, int64_t n, StepGraph* graph = nullptr, int32_t defer = 0) {
    absl::Status s = bell.Begin(Bell::CallsOf(layers, defer));
    if (!s.ok()) return s;
    s = graph != nullptr ? graph->Launch(stream_) : Put(bell, layers, n, defer);
    s.Update(ToStatus(cudaStreamSynchronize(stream_), "the run"));
    const absl::Status finished = bell.Finish(s.ok(), s);
    return finished.ok() ? s : finished;
  }
  void Clear() { ASSERT_EQ(cudaMemset(x_, 0, kMostRows * kHidden * 4), cudaSuccess); }
  void CheckSums(int64_t calls, int64_t n, size_t rings) const {
    std::vector<float> got(n * kHidden);
    ASSERT_EQ(cudaMemcpy(got.data(), x_, got.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
    for (int64_t t = 0; t < n; ++t) {
      float weights = 0;
      for (int64_t k = 0; k < kPairs; ++k) {
        weights += expert_weights_[t * kPairs + k] * static_cast<float>(expert_ids_[t * kPairs + k]);
      }
      for (int64_t i = 0; i < kHidden; ++i) {
        float want = 0;
        for (int64_t layer = 0; layer < calls; ++layer) {
          double sum = 0;
          for (size_t r = 0; r < rings; ++r) {
            const double y = Answer(activations_[t * kHidden + i], static_cast<uint32_t>(layer), weights, r);
            sum += rings > 1 ? y : static_cast<double>(static_cast<float>(y));
          }
          want += static_cast<float>(sum);
        }
        ASSERT_EQ(got[t * kHidden + i], want) << "token " << t << ", value " << i;
      }
    }
  }

  model::ModelConfig config_;
  cudaStream_t stream_ = nullptr;
  Arena device_{Arena::Kind::kDevice};
  float *normed_ = nullptr, *x_ = nullptr, *weights_ = nullptr;
  int32_t *ids_ = nullptr, *defers_ = nullptr;
  std::vector<float> activations_, expert_weights_;
  std::vector<int32_t> expert_ids_;
};

TEST_P(BellTest, CallsOneAfterTheOther) {
  for (const bool float_input : {false, true}) {
    Peers peers(1, kShape, AnswerAll, float_input);
    const auto bell = Open(peers);
    ASSERT_NE(bell, nullptr);
    for (int64_t n : {1, 3, int{kMostRows}}) {
      Clear();
      const absl::Status s = Run(*bell, 9, n);
      ASSERT_TRUE(s.ok()) << s;
      CheckSums(9, n, 1);
    }
  }
}

// Activations that are still to be multiplied with their rows' factors, and a norm of what has been added.
TEST_P(BellTest, FactorsOfRowsAndTheNextNorm) {
  constexpr int64_t kRows = 11, kBlocks = kHidden / 32;
  for (const bool float_input : {false, true}) {
    Peers peers(2, kShape, AnswerAll, float_input);
    const auto bell = Open(peers);
    ASSERT_NE(bell, nullptr);
    Clear();
    // Half, a quarter, half ...: the processes see numbers that bfloat16 has.
    std::vector<float> squares(kRows * kBlocks);
    for (int64_t t = 0; t < kRows; ++t) {
      for (int64_t b = 0; b < kBlocks; ++b) squares[t * kBlocks + b] = t % 2 == 0 ? 4 * 32 : 16 * 32;
    }
    std::mt19937 rng(3);
    const testing::DeviceArray<float> d_squares(squares), weight(kernels::testing::Gaussian(rng, kHidden));
    const testing::DeviceArray<float> y(kRows * kHidden), want_y(y.size()), sums(squares.size()),
        want_sums(sums.size());
    const testing::DeviceArray<int8_t> q(Int8FormRows(kRows, 1) * kHidden), want_q(q.size());
    const testing::DeviceArray<float2> meta(q.size() / 32), want_meta(meta.size());
    NormFormParams next{x_,      kHidden,    nullptr,    weight.get(), y.get(),
                        q.get(), meta.get(), sums.get(), kRows,        kHidden};
    ASSERT_TRUE(bell->Begin(1).ok());
    RoutedCall call = Call(0, kRows, 0);
    call.factors = {d_squares.get(), kBlocks, 0};
    call.next = &next;
    ASSERT_TRUE(bell->Ask(call, stream_).ok());
    ASSERT_TRUE(bell->Add(call, stream_).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    ASSERT_TRUE(bell->Finish(true, absl::OkStatus()).ok());
    for (int64_t i = 0; i < kRows * kHidden; ++i) activations_[i] *= i / kHidden % 2 == 0 ? 0.5f : 0.25f;
    CheckSums(1, kRows, 2);
    for (int64_t i = 0; i < kRows * kHidden; ++i) activations_[i] *= i / kHidden % 2 == 0 ? 2 : 4;
    next.y = want_y.get();
    next.q = want_q.get();
    next.q_meta = want_meta.get();
    next.squares = want_sums.get();
    Check(LaunchNormForm(next, nullptr));
    EXPECT_EQ(y.Download(), want_y.Download());
    EXPECT_EQ(q.Download(), want_q.Download());
    EXPECT_EQ(sums.Download(), want_sums.Download());
    EXPECT_EQ(std::memcmp(meta.Download().data(), want_meta.Download().data(), meta.size() * sizeof(float2)),
              0);
  }
}

TEST_P(BellTest, AddsTheAnswersOfSeveralAndRoundsOnce) {
  Peers peers(3, kShape, AnswerAll);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  Clear();
  const absl::Status s = Run(*bell, 5, 7);
  ASSERT_TRUE(s.ok()) << s;
  CheckSums(5, 7, 3);
}

TEST_P(BellTest, AGraphIsGoodForEveryRunAndForAnotherSession) {
  Peers peers(2, kShape, AnswerAll);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  const auto graph = StepGraph::Capture(stream_, bell.get(), [&] { return Put(*bell, 6, 2); });
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int run = 0; run < 20; ++run) {
    Clear();
    if (run == 10) absl::SleepFor(absl::Milliseconds(300));  // the hosts sleep by now
    const absl::Status s = Run(*bell, 6, 2, graph->get());
    ASSERT_TRUE(s.ok()) << s;
    CheckSums(6, 2, 2);
  }
  Peers others(2, kShape, AnswerAll, false, 50);
  const uint64_t generation = bell->generation();
  ASSERT_TRUE(bell->Attach(&others).ok());
  EXPECT_EQ(bell->generation(), generation);
  Clear();
  const absl::Status s = Run(*bell, 6, 2, graph->get());
  ASSERT_TRUE(s.ok()) << s;
  CheckSums(6, 2, 2);
  bell->Detach();
}

// What a process was asked, and by which call it was answered.
struct Asked {
  uint32_t layer;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

// Odd rows defer two of their four experts, even ones none. Each call of the run answers with a power of two
// of its own, so that the sum shows which were added.
TEST_P(BellTest, DeferredExpertsAreASecondCallWhoseAnswerComesALayerLater) {
  constexpr size_t kLayers = 9, kRows = 5, kCalls = 2 * kLayers - 1;
  std::mutex mutex;
  std::vector<Asked> asked;
  const auto answer = [&](const shm::IncomingCall& call, size_t) {
    const std::lock_guard lock(mutex);
    Asked a{call.layer, std::vector<int32_t>(call.ids.size() / 4), std::vector<float>(call.ids.size() / 4)};
    std::memcpy(a.ids.data(), call.ids.data(), call.ids.size());
    std::memcpy(a.weights.data(), call.weights.data(), call.weights.size());
    for (uint32_t t = 0; t < call.rows; ++t) {
      const float value = std::ldexp(1.0f, static_cast<int>(asked.size() % 20));
      for (int64_t i = 0; i < kHidden; ++i) {
        std::memcpy(call.output.data() + 4 * (t * kHidden + i), &value, 4);
      }
    }
    asked.push_back(std::move(a));
    return absl::OkStatus();
  };
  const shm::RegionShape shape = {kDeferralSlots, kMostRows, kPairs, kHidden};
  Peers peers(1, shape, answer);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  const auto graph = StepGraph::Capture(stream_, bell.get(), [&] { return Put(*bell, kLayers, kRows, 2); });
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int run = 0; run < 6; ++run) {
    asked.clear();
    Clear();
    const absl::Status s = Run(*bell, kLayers, kRows, run % 2 == 0 ? graph->get() : nullptr, 2);
    ASSERT_TRUE(s.ok()) << s;
    ASSERT_EQ(asked.size(), kCalls);
    SplitRouting split;
    split.Assign(expert_ids_.data(), expert_weights_.data(), std::vector<int32_t>{0, 1, 0, 1, 0}, kPairs, 2);
    for (size_t i = 0; i < kCalls; ++i) {
      const bool last = i + 1 == kCalls, later = i % 2 == 1;
      const size_t pairs = kRows * kPairs;
      EXPECT_EQ(asked[i].layer, i / 2);
      EXPECT_EQ(asked[i].ids, last    ? std::vector(expert_ids_.begin(), expert_ids_.begin() + pairs)
                              : later ? split.later_ids
                                      : split.ids)
          << "call " << i;
      EXPECT_EQ(asked[i].weights, last ? std::vector(expert_weights_.begin(), expert_weights_.begin() + pairs)
                                  : later ? split.later_weights
                                          : split.weights);
    }
    std::vector<float> got(kRows * kHidden);
    ASSERT_EQ(cudaMemcpy(got.data(), x_, got.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
    for (const float v : got) ASSERT_EQ(v, std::ldexp(1.0f, static_cast<int>(asked.size())) - 1);
  }
}

// The answer to a deferred call is not waited for in its own layer.
TEST_P(BellTest, TheGpuGoesOnWhileADeferredCallIsWorkedOn) {
  std::mutex mutex;
  std::vector<float> seen;  // the first activation of each call
  const auto answer = [&](const shm::IncomingCall& call, size_t) {
    float x;
    std::memcpy(&x, call.input.data(), 4);
    const std::lock_guard lock(mutex);
    const float value = seen.size() % 2 == 1 ? 100.0f : 1.0f;  // deferred ones: 100
    seen.push_back(x);
    for (int64_t i = 0; i < kHidden; ++i) std::memcpy(call.output.data() + 4 * i, &value, 4);
    return absl::OkStatus();
  };
  const shm::RegionShape shape = {kDeferralSlots, kMostRows, kPairs, kHidden};
  Peers peers(1, shape, answer, /*float_input=*/true);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  Clear();
  const std::vector<int32_t> all(kMostRows, 1);
  Upload(defers_, all);
  ASSERT_TRUE(bell->Begin(Bell::CallsOf(4, 1)).ok());
  for (int64_t i = 0; i < 4; ++i) {
    RoutedCall call = Call(i, 1, i);
    call.normed = x_;  // each layer sends what the layers before have made of x
    call.defer = 1;
    call.defers = defers_;
    call.last = i == 3;
    ASSERT_TRUE(bell->Ask(call, stream_).ok());
    ASSERT_TRUE(bell->Add(call, stream_).ok());
  }
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  ASSERT_TRUE(bell->Finish(true, absl::OkStatus()).ok());
  // Layer 1 sees what was due in layer 0, layer 2 also what layer 0 has deferred, and so on.
  EXPECT_EQ(seen, (std::vector<float>{0, 0, 1, 1, 102, 102, 203}));
  float x = 0;
  ASSERT_EQ(cudaMemcpy(&x, x_, 4, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(x, 304);
}

TEST_P(BellTest, AnErrorOfTheHostIsToldAndTheNextRunWorks) {
  Peers peers(1, kShape, AnswerAll);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  ASSERT_TRUE(bell->Begin(2).ok());
  ASSERT_TRUE(bell->Ask(Call(0, kMostRows, 99), stream_).ok());
  ASSERT_TRUE(bell->Add(Call(0, kMostRows, 99), stream_).ok());
  ASSERT_TRUE(bell->Ask(Call(1, kMostRows, 99), stream_).ok());
  ASSERT_TRUE(bell->Add(Call(1, kMostRows, 99), stream_).ok());
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  const absl::Status told = bell->Finish(true, absl::OkStatus());
  EXPECT_THAT(std::string(told.message()), ::testing::HasSubstr("99")) << told;
  Clear();
  ASSERT_TRUE(Run(*bell, 3, kMostRows).ok());
  CheckSums(3, kMostRows, 1);
}

// The process dies in the middle of a run: its lease says so, the GPU comes to its end, and another session
// works with the same graph.
TEST_P(BellTest, ADeadProcessFreesTheGpu) {
  Peers peers(2, kShape, AnswerAll);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  const auto graph = StepGraph::Capture(stream_, bell.get(), [&] { return Put(*bell, 30, kMostRows); });
  ASSERT_TRUE(graph.ok()) << graph.status();
  peers[1].stop_after = 12;
  std::thread lease([&] {
    while (peers[1].calls < 12) absl::SleepFor(absl::Milliseconds(1));
    absl::SleepFor(absl::Milliseconds(20));
    peers[1].client().Abort(absl::UnavailableError("the process is gone"));
  });
  const absl::Status s = Run(*bell, 30, kMostRows, graph->get());
  lease.join();
  EXPECT_EQ(s, absl::UnavailableError("the process is gone"));
  Peers others(2, kShape, AnswerAll, false, 70);
  ASSERT_TRUE(bell->Attach(&others).ok());
  Clear();
  ASSERT_TRUE(Run(*bell, 30, kMostRows, graph->get()).ok());
  CheckSums(30, kMostRows, 2);
  bell->Detach();
}

TEST_P(BellTest, TheWatchdogEndsAWaitForASilentProcess) {
  Peers peers(1, kShape, nullptr), soon(1, kShape, nullptr, false, 50), late(1, kShape, nullptr, false, 90);
  for (Peers* p : {&peers, &soon, &late}) p->timeout = absl::Milliseconds(200);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  for (Peers* p : {&peers, &soon, &late}) {
    if (p != &peers) {
      ASSERT_TRUE(bell->Attach(p).ok());
    }
    if (p == &late) absl::SleepFor(absl::Milliseconds(1200));  // the watchdog sleeps by now
    const absl::Status s = Run(*bell, 4, kMostRows);
    EXPECT_EQ(s.code(), absl::StatusCode::kDeadlineExceeded) << s;
  }
  bell->Detach();
}

TEST_P(BellTest, EmptyCallsAreTimed) {
  Peers peers(1, kShape, AnswerAll);
  const auto bell = Open(peers);
  ASSERT_NE(bell, nullptr);
  const auto trip = bell->Measure(58, 15, stream_);
  ASSERT_TRUE(trip.ok()) << trip.status();
  std::printf("bell by %s: %.1f us for an empty call, host CPU %.0f us for a graph of 58\n",
              std::string(BellName(GetParam())).c_str(), trip->microseconds, trip->host_microseconds);
  EXPECT_GT(trip->microseconds, 0);
}

INSTANTIATE_TEST_SUITE_P(, BellTest,
                         ::testing::Values(BellKind::kStreamMemory, BellKind::kKernel,
                                           BellKind::kHostFunction),
                         [](const auto& info) { return std::string(BellName(info.param)); });

}  // namespace
}  // namespace tandem::attention::cuda
