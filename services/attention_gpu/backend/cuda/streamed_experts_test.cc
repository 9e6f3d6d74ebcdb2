// Streamed experts against expert_cpu's own computation in reference precision.
#include "services/attention_gpu/backend/cuda/streamed_experts.h"

#include <gmock/gmock.h>

#include <array>
#include <cmath>
#include <mutex>
#include <numeric>
#include <set>

#include "absl/strings/str_cat.h"
#include "common/quant/quant.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "services/attention_gpu/backend/cuda/grouped_products.h"
#include "services/attention_gpu/backend/cuda/ring_peers_for_test.h"
#include "services/attention_gpu/backend/cuda/shared_calls.h"
#include "services/attention_gpu/experts/stream_share.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/testing/synthetic_model.h"
#include "tests/golden/local_experts.h"

namespace tandem::attention::cuda {
namespace {

using expert::testing::RandomFloats;
using expert::testing::RandomIds;
using expert::testing::SyntheticModel;
using expert::testing::SyntheticShape;
using gguf::TensorType;
using testing::Check;
using testing::DeviceArray;
using ::testing::HasSubstr;

// Largest distance of a token's sum from the reference, as a share of the reference's norm. Weights and
// activations are rounded to float16 (2^-11 each) in two products one after the other.
constexpr double kTolerance = 2e-3;

struct Tokens {
  int64_t n, k;
  std::vector<float> normed, weights, x;
  std::vector<int32_t> ids;
};

Tokens MakeTokens(const SyntheticShape& shape, int64_t n, uint64_t seed) {
  Tokens t;
  t.n = n;
  t.k = shape.experts_per_token;
  t.normed = RandomFloats(n * shape.hidden, seed);
  t.weights = RandomFloats(n * t.k, seed + 1);
  t.x = RandomFloats(n * shape.hidden, seed + 2);
  t.ids = RandomIds(n, t.k, shape.experts, seed + 3);
  return t;
}

// A model, its shards, and what they compute on the CPU.
class Model {
 public:
  explicit Model(const SyntheticShape& shape, const std::vector<expert::ShardRequest>& requests = {{}})
      : file_(shape) {
    for (const expert::ShardRequest& request : requests) {
      expert::LoadOptions load;
      load.request = request;
      load.arena = expert::ArenaKind::kSharedSmall;
      auto shard = expert::Shard::Load(file_.path(), load);
      EXPECT_TRUE(shard.ok()) << shard.status();
      shards_.push_back(std::move(*shard));
      weights_.push_back(std::make_shared<ShardWeights>(golden::WeightsOf(*shards_.back())));
    }
    const auto opened = gguf::File::Open(file_.path());
    config_ = *model::ReadModelConfig(**opened, "off");
  }

  const SyntheticShape& shape() const { return file_.shape(); }
  const model::ModelConfig& config() const { return config_; }
  const std::vector<std::unique_ptr<expert::Shard>>& shards() const { return shards_; }

  absl::StatusOr<std::unique_ptr<StreamedExperts>> Stream(const StreamOptions& options) const {
    return StreamedExperts::Create(weights_, config_, options);
  }
  // Room for `groups` groups of two experts.
  StreamOptions Options(int64_t max_tokens, uint64_t buffer_bytes = 8 << 20) const {
    StreamOptions o;
    o.max_tokens = max_tokens;
    o.buffer_bytes = buffer_bytes;
    return o;
  }

  // x + the experts' sum, in double.
  std::vector<double> Reference(int64_t layer, const Tokens& t) const {
    threading::ThreadPool::Options threads;
    threads.threads = 2;
    threading::ThreadPool pool(threads);
    std::vector<double> out(t.x.begin(), t.x.end()), answer(t.x.size());
    auto bytes = [](const auto& v) {
      return std::span(reinterpret_cast<const uint8_t*>(v.data()), v.size() * sizeof v[0]);
    };
    for (const auto& shard : shards_) {
      expert::Moe::Options options;
      options.precision = kernels::Precision::kReference;
      expert::Moe moe(*shard, pool, options);
      expert::Call call;
      call.layer = layer;
      call.n_tokens = t.n;
      call.experts_per_token = t.k;
      call.expert_ids = bytes(t.ids);
      call.expert_weights = bytes(t.weights);
      call.activations = bytes(t.normed);
      call.answer_type = expert::AnswerType::kF64;
      const auto done =
          moe.Forward(call, {reinterpret_cast<uint8_t*>(answer.data()), answer.size() * sizeof(double)});
      EXPECT_TRUE(done.ok()) << done.status();
      for (size_t i = 0; i < out.size(); ++i) out[i] += answer[i];
    }
    return out;
  }

 private:
  SyntheticModel file_;
  std::vector<std::unique_ptr<expert::Shard>> shards_;
  std::vector<std::shared_ptr<const ShardWeights>> weights_;
  model::ModelConfig config_;
};

std::vector<float> StreamLayer(StreamedExperts& experts, const Tokens& t, int64_t layer) {
  const DeviceArray<float> normed(t.normed), weights(t.weights), x(t.x);
  const DeviceArray<int32_t> ids(t.ids);
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  RoutedCall call;
  call.layer = layer;
  call.n = t.n;
  call.normed = normed.get();
  call.ids = ids.get();
  call.weights = weights.get();
  call.x = x.get();
  absl::Status status = experts.Ask(call, stream);
  if (status.ok()) status = experts.Add(call, stream);
  EXPECT_TRUE(status.ok()) << status;
  Check(cudaStreamSynchronize(stream));
  Check(cudaStreamDestroy(stream));
  return x.Download();
}

void ExpectClose(const std::vector<float>& got, const std::vector<double>& want, const Tokens& t) {
  const auto hidden = static_cast<int64_t>(t.x.size()) / t.n;
  double worst = 0;
  for (int64_t i = 0; i < t.n; ++i) {
    double error = 0, norm = 0;
    for (int64_t c = i * hidden; c < (i + 1) * hidden; ++c) {
      const double part = want[c] - t.x[c], e = got[c] - want[c];
      error += e * e;
      norm += part * part;
    }
    worst = std::max(worst, norm > 0 ? std::sqrt(error / norm) : std::sqrt(error));
  }
  EXPECT_LT(worst, kTolerance);
  std::printf("%lld tokens: %.2e of the norm\n", static_cast<long long>(t.n), worst);
}

// The processes of a model: threads of this one, behind rings, that compute as the reference does.
class RingExperts : public ExpertGroup {
 public:
  explicit RingExperts(const Model& model) : model_(model) {
    threading::ThreadPool::Options threads;
    threads.threads = 2;
    expert::Moe::Options options;
    options.precision = kernels::Precision::kReference;
    for (const auto& shard : model.shards()) {
      pools_.push_back(std::make_unique<threading::ThreadPool>(threads));
      moes_.push_back(std::make_unique<expert::Moe>(*shard, *pools_.back(), options));
    }
  }
  absl::Status Start(const ExpertCall&) override { return absl::UnimplementedError("not from the host"); }
  absl::Status Finish(float*) override { return absl::UnimplementedError("not from the host"); }
  absl::Status Recover(absl::Duration) override { return absl::OkStatus(); }
  int processes() const override { return static_cast<int>(moes_.size()); }
  absl::StatusOr<std::unique_ptr<ExpertGroup>> Beside(int64_t max_call_tokens) override {
    struct Rings : RingExperts {
      Rings(const Model& model, std::unique_ptr<testing::Peers> p)
          : RingExperts(model), peers(std::move(p)) {}
      DeviceCalls* device_calls() override { return peers.get(); }
      std::unique_ptr<testing::Peers> peers;
    };
    shm::RegionShape shape;
    shape.max_rows = static_cast<uint32_t>(max_call_tokens);
    shape.max_pairs = static_cast<uint32_t>(model_.shape().experts_per_token);
    shape.width = static_cast<uint32_t>(model_.shape().hidden);
    auto peers = std::make_unique<testing::Peers>(
        moes_.size(), shape, [this](const auto& in, size_t i) { return Answer(in, i); }, true);
    last_ = peers.get();
    return std::make_unique<Rings>(model_, std::move(peers));
  }
  testing::Peers& last() { return *last_; }
  // Experts that were asked for since the last time, of all processes.
  std::multiset<int32_t> Asked() {
    const std::lock_guard lock(mutex_);
    return std::exchange(asked_, {});
  }

 private:
  absl::Status Answer(const shm::IncomingCall& in, size_t i) {
    expert::Call call;
    call.layer = in.layer;
    call.n_tokens = in.rows;
    call.experts_per_token = in.pairs;
    call.expert_ids = in.ids;
    call.expert_weights = in.weights;
    call.activations = in.input;
    call.answer_type =
        in.output_type == shm::ValueType::kF64 ? expert::AnswerType::kF64 : expert::AnswerType::kF32;
    std::vector<int32_t> ids(in.ids.size() / sizeof(int32_t));
    std::memcpy(ids.data(), in.ids.data(), in.ids.size());
    const auto& plan = model_.shards()[i]->plan();
    {
      const std::lock_guard lock(mutex_);
      for (const int32_t id : std::set<int32_t>(ids.begin(), ids.end())) {
        if (id >= plan.expert_begin && id < plan.expert_end) asked_.insert(id);
      }
    }
    return moes_[i]->Forward(call, in.output).status();
  }

  const Model& model_;
  std::vector<std::unique_ptr<threading::ThreadPool>> pools_;
  std::vector<std::unique_ptr<expert::Moe>> moes_;
  testing::Peers* last_ = nullptr;
  std::mutex mutex_;
  std::multiset<int32_t> asked_;
};

TEST(SharedCallsTest, KeepsTheExpertsOfTheSet) {
  TANDEM_NEEDS_GPU();
  std::vector<int32_t> ids = {-1, 0, 1, 31, 32, 33, 63, 64, 1023, 1024, 5000};
  for (int32_t i = 0; i < 1000; ++i) ids.push_back(i);
  const DeviceArray<int32_t> in(ids), out(ids.size());
  KeepExpertsParams p;
  p.ids = in.get();
  p.pairs = static_cast<int64_t>(ids.size());
  p.out = out.get();
  std::set<int32_t> keep = {0, 31, 32, 64, 777, 1023};
  for (const int32_t e : keep) p.keep[e / 32] |= uint32_t{1} << e % 32;
  Check(LaunchKeepExperts(p, nullptr));
  const std::vector<int32_t> got = out.Download();
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(got[i], keep.contains(ids[i]) ? ids[i] : -1) << ids[i];
}

// Whatever is shared, every expert is computed once, by one side.
TEST(StreamedExpertsTest, SharedWithTheProcesses) {
  TANDEM_NEEDS_GPU();
  SyntheticShape shape;
  shape.hidden = 256;
  shape.inner = 512;
  shape.experts = 24;
  shape.experts_per_token = 3;
  shape.layers = 3;
  constexpr int64_t kMost = 90;  // of a call
  const bool yes = true, no = false;
  struct Way {
    std::vector<expert::ShardRequest> requests;
    BellKind kind;
    bool ahead;
  };
  for (const Way& way : {Way{{{}}, BellKind::kKernel, yes}, Way{{{}}, BellKind::kHostFunction, no},
                         Way{{{.slice_index = 0, .slice_count = 2}, {.slice_index = 1, .slice_count = 2}},
                             BellKind::kKernel,
                             yes},
                         Way{{{.expert_begin = 0, .expert_end = 7}, {.expert_begin = 7, .expert_end = 24}},
                             BellKind::kKernel,
                             no}}) {
    const Model model(shape, way.requests);
    const bool slices = way.requests.size() == 2 && way.requests[0].slice_count == 2;
    RingExperts group(model);
    StreamOptions options = model.Options(100);
    options.copy_ahead = way.ahead;
    auto experts = model.Stream(options);
    ASSERT_TRUE(experts.ok()) << experts.status();
    auto calls = SharedCalls::Open(model.config(), group, way.kind, 0, kMost);
    ASSERT_TRUE(calls.ok()) << calls.status();
    std::vector<int32_t> chosen;
    int percent = 0;
    (*experts)->Share(std::move(*calls),
                      [&](int64_t, std::span<const int32_t> counts, const std::vector<bool>& coming) {
                        EXPECT_EQ(std::count(coming.begin(), coming.end(), true) > 0, way.ahead);
                        std::vector<bool> shared = ChoosePercent(percent, counts, coming);
                        for (size_t e = 0; e < shared.size(); ++e) {
                          if (shared[e] && counts[e] > 0) chosen.push_back(static_cast<int32_t>(e));
                        }
                        return shared;
                      });
    for (const int64_t n : {int64_t{1}, kMost, kMost + 1}) {
      Tokens t = MakeTokens(shape, n, static_cast<uint64_t>(n));
      for (size_t i = 0; n > kMost && i < t.ids.size(); ++i) {
        if (t.ids[i] < 8) t.ids[i] = -1;
      }
      const int64_t layer = 1 + n % 3;
      const std::vector<double> want = model.Reference(layer, t);
      for (percent = 0; percent <= 100; percent += 50) {
        SCOPED_TRACE(absl::StrCat(percent, " %, ", n, " tokens, ", way.requests.size(), " processes"));
        ASSERT_TRUE((*experts)->Begin().ok());
        chosen.clear();
        const std::vector<float> got = StreamLayer(**experts, t, layer);
        ExpectClose(got, want, t);
        const size_t given = chosen.size();
        EXPECT_EQ(given > 0, percent > 0 && n <= kMost);
        std::multiset<int32_t> asked(chosen.begin(), chosen.end());
        if (slices) asked.insert(chosen.begin(), chosen.end());
        EXPECT_EQ(group.Asked(), asked);
        EXPECT_EQ(StreamLayer(**experts, t, layer), got) << "the second time";
        EXPECT_EQ(group.Asked(), asked);
        const auto totals = (*experts)->End();
        ASSERT_TRUE(totals.ok()) << totals.status();
        EXPECT_EQ(totals->layers, 2);
        EXPECT_EQ(totals->shared, static_cast<int64_t>(2 * given));
        EXPECT_GE(totals->shared_pairs, totals->shared);
      }
    }
  }
}

// A process that answers no more: the device comes to its end, and the step's end says so.
TEST(StreamedExpertsTest, AProcessThatHasAShareIsLost) {
  TANDEM_NEEDS_GPU();
  const SyntheticShape shape;
  const Model model(shape);
  RingExperts group(model);
  auto experts = model.Stream(model.Options(100));
  ASSERT_TRUE(experts.ok()) << experts.status();
  auto calls = SharedCalls::Open(model.config(), group, BellKind::kKernel, 0, 100);
  ASSERT_TRUE(calls.ok()) << calls.status();
  (*experts)->Share(std::move(*calls),
                    [](int64_t, std::span<const int32_t> counts, const std::vector<bool>& ahead) {
                      return ChoosePercent(50, counts, ahead);
                    });
  const Tokens t = MakeTokens(shape, 100, 1);
  StreamLayer(**experts, t, 1);
  ASSERT_TRUE((*experts)->End().ok());
  group.last().timeout = absl::Milliseconds(500);
  group.last()[0].stop_after = group.last()[0].calls.load();
  StreamLayer(**experts, t, 1);
  EXPECT_FALSE((*experts)->End().ok());
}

TEST(SortPairsTest, ByExpertThenByToken) {
  TANDEM_NEEDS_GPU();
  for (const int64_t n : {1, 5, 33, 1000, 4096}) {
    for (const int32_t experts : {1, 16, 256}) {
      const int64_t k = std::min<int64_t>(8, experts);
      std::vector<int32_t> ids = RandomIds(n, k, experts, static_cast<uint64_t>(n));
      for (size_t i = 3; i < ids.size(); i += 7) ids[i] = i % 2 == 0 ? -1 : experts;  // no pairs
      const std::vector<float> weights = RandomFloats(n * k, 5);
      std::vector<int32_t> counts(static_cast<size_t>(experts)), tokens;
      std::vector<float> sorted;
      for (int32_t e = 0; e < experts; ++e) {
        for (size_t i = 0; i < ids.size(); ++i) {
          if (ids[i] != e) continue;
          ++counts[static_cast<size_t>(e)];
          tokens.push_back(static_cast<int32_t>(i) / static_cast<int32_t>(k));
          sorted.push_back(weights[i]);
        }
      }
      const DeviceArray<int32_t> d_ids(ids), d_counts(counts.size()), d_tokens(ids.size());
      const DeviceArray<float> d_weights(weights), d_sorted(ids.size());
      SortPairsParams p;
      p.ids = d_ids.get();
      p.weights = d_weights.get();
      p.n = n;
      p.k = static_cast<int32_t>(k);
      p.experts = experts;
      p.counts = d_counts.get();
      p.pair_token = d_tokens.get();
      p.pair_weight = d_sorted.get();
      Check(LaunchSortPairs(p, nullptr));
      EXPECT_EQ(d_counts.Download(), counts);
      std::vector<int32_t> got = d_tokens.Download();
      std::vector<float> got_weights = d_sorted.Download();
      got.resize(tokens.size());
      got_weights.resize(sorted.size());
      EXPECT_EQ(got, tokens) << n << " tokens, " << experts << " experts";
      EXPECT_EQ(got_weights, sorted);
    }
  }
}

TEST(StreamedExpertsTest, TypesAndNumbersOfTokens) {
  TANDEM_NEEDS_GPU();
  struct Types {
    TensorType gate, up, down;
  };
  for (const Types& types : {Types{TensorType::kQ4_K, TensorType::kQ4_K, TensorType::kQ6_K},
                             Types{TensorType::kQ5_K, TensorType::kQ6_K, TensorType::kQ4_K},
                             Types{TensorType::kQ8_0, TensorType::kQ4_0, TensorType::kQ5_0},
                             Types{TensorType::kF16, TensorType::kBF16, TensorType::kQ8_0},
                             Types{TensorType::kQ5_0, TensorType::kQ8_0, TensorType::kBF16}}) {
    SyntheticShape shape;
    shape.hidden = 512;
    shape.inner = 256;
    shape.experts = 13;
    shape.experts_per_token = 3;
    shape.gate = types.gate;
    shape.up = types.up;
    shape.down = types.down;
    const Model model(shape);
    auto experts = model.Stream(model.Options(300));
    ASSERT_TRUE(experts.ok()) << experts.status();
    for (const int64_t n : {1, 7, 65, 300}) {
      const Tokens t = MakeTokens(shape, n, static_cast<uint64_t>(n));
      ExpectClose(StreamLayer(**experts, t, 1), model.Reference(1, t), t);
    }
  }
}

// Rows that are no multiple of a tile, and an inner size that is none of 64.
TEST(StreamedExpertsTest, OddShapes) {
  TANDEM_NEEDS_GPU();
  SyntheticShape shape;
  shape.hidden = 416;
  shape.inner = 96;
  shape.experts = 5;
  shape.gate = shape.up = TensorType::kQ8_0;
  shape.down = TensorType::kQ5_0;
  const Model model(shape);
  auto experts = model.Stream(model.Options(200));
  ASSERT_TRUE(experts.ok()) << experts.status();
  const Tokens t = MakeTokens(shape, 200, 1);
  ExpectClose(StreamLayer(**experts, t, 1), model.Reference(1, t), t);
}

TEST(StreamedExpertsTest, SlicesAndRangesAddUp) {
  TANDEM_NEEDS_GPU();
  SyntheticShape shape;
  shape.hidden = 256;
  shape.inner = 768;
  shape.experts = 11;
  shape.experts_per_token = 4;
  using Requests = std::vector<expert::ShardRequest>;
  for (const Requests& requests :
       {Requests{{.slice_index = 0, .slice_count = 2}, {.slice_index = 1, .slice_count = 2}},
        Requests{{.expert_begin = 0, .expert_end = 4}, {.expert_begin = 4, .expert_end = 11}}}) {
    const Model model(shape, requests);
    auto experts = model.Stream(model.Options(150));
    ASSERT_TRUE(experts.ok()) << experts.status();
    const Tokens t = MakeTokens(shape, 150, 3);
    ExpectClose(StreamLayer(**experts, t, 1), model.Reference(1, t), t);
  }
}

// Some experts idle, some tokens without any, layers in any order, copied ahead or not, straight or through
// buffers, with much room or little: the same bits.
TEST(StreamedExpertsTest, NothingButTheNumbersMatters) {
  TANDEM_NEEDS_GPU();
  SyntheticShape shape;
  shape.hidden = 512;
  shape.inner = 512;
  shape.experts = 24;
  shape.experts_per_token = 3;
  shape.layers = 4;
  const Model model(shape);
  std::vector<Tokens> tokens;
  for (const int64_t n : {1, 90, 40, 256}) {
    Tokens t = MakeTokens(shape, n, static_cast<uint64_t>(n));
    for (size_t i = 0; i < t.ids.size(); ++i) {
      if (n == 40) t.ids[i] = std::array{3, 17, 18}[i % 3];
      if (n == 90 && t.ids[i] < 8) t.ids[i] = -1;
    }
    tokens.push_back(t);
  }
  struct Way {
    const char* what;
    bool page_lock;
    uint64_t buffer_bytes;
    bool ahead;
    bool scratch = false;
  };
  const DeviceArray<uint8_t> scratch(std::vector<uint8_t>(64 << 20, 0xff));  // no number is as it should be
  std::vector<std::vector<float>> want;
  for (const Way& way :
       {Way{"straight", true, 4 << 20, false}, Way{"copied ahead", true, 4 << 20, true},
        Way{"much room", true, 64 << 20, true}, Way{"others' memory", true, 4 << 20, true, true},
        Way{"buffers", false, 4 << 20, false}, Way{"buffers, ahead", false, 16 << 20, true}}) {
    SCOPED_TRACE(way.what);
    StreamOptions options = model.Options(256, way.buffer_bytes);
    options.copy_ahead = way.ahead;
    options.copy.page_lock = way.page_lock;
    options.copy.threads = 3;
    options.copy.buffer_bytes = 100'000;
    if (way.scratch) {
      options.scratch = scratch.get();
      options.scratch_bytes = scratch.size();
    }
    auto experts = model.Stream(options);
    ASSERT_TRUE(experts.ok()) << experts.status();
    std::printf("%s: %s\n", way.what, (*experts)->Description().c_str());
    EXPECT_LE((*experts)->device_bytes(), StreamedExperts::DeviceBytes(model.config(), options));
    size_t at = 0;
    for (int round = 0; round < 3; ++round) {
      if (round == 2) {
        ASSERT_TRUE((*experts)->Begin().ok());
      }
      for (const Tokens& t : tokens) {
        // In the first round what was copied ahead is the right layer, in the second a wrong one.
        const int64_t layer = 1 + static_cast<int64_t>(round == 1 ? 2 - at % 3 : at % 3);
        const std::vector<float> got = StreamLayer(**experts, t, layer);
        if (want.size() == at) {
          ExpectClose(got, model.Reference(layer, t), t);
          want.push_back(got);
        }
        EXPECT_EQ(kernels::testing::Bits(got), kernels::testing::Bits(want[at])) << "call " << at;
        ++at;
      }
      const auto rate = (*experts)->MeasureCopy(1 << 20);
      ASSERT_TRUE(rate.ok()) << rate.status();
      EXPECT_GT(*rate, 0);
    }
  }
}

TEST(StreamedExpertsTest, ATokenAloneAndInCompany) {
  TANDEM_NEEDS_GPU();
  const SyntheticShape shape;
  const Model model(shape);
  auto experts = model.Stream(model.Options(200));
  ASSERT_TRUE(experts.ok()) << experts.status();
  const Tokens all = MakeTokens(shape, 200, 9);
  const std::vector<float> together = StreamLayer(**experts, all, 1);
  for (const int64_t i : {0, 77, 199}) {
    auto part = [&](const auto& v, int64_t width) {
      return std::decay_t<decltype(v)>(v.begin() + i * width, v.begin() + (i + 1) * width);
    };
    const Tokens one{1,
                     all.k,
                     part(all.normed, shape.hidden),
                     part(all.weights, all.k),
                     part(all.x, shape.hidden),
                     part(all.ids, all.k)};
    EXPECT_EQ(StreamLayer(**experts, one, 1), part(together, shape.hidden)) << "token " << i;
  }
}

TEST(StreamedExpertsTest, SaysWhatItCannotDo) {
  TANDEM_NEEDS_GPU();
  SyntheticShape shape;
  const Model model(shape);
  const auto small = model.Stream(model.Options(10, 1000));
  EXPECT_TRUE(absl::IsResourceExhausted(small.status())) << small.status();
  auto experts = model.Stream(model.Options(10));
  ASSERT_TRUE(experts.ok()) << experts.status();
  RoutedCall call;
  call.layer = 1;
  call.n = 11;
  EXPECT_TRUE(absl::IsInvalidArgument((*experts)->Ask(call, nullptr)));
  call.n = 1;
  call.layer = 0;
  EXPECT_TRUE(absl::IsNotFound((*experts)->Add(call, nullptr)));
  shape.down = TensorType::kQ2_K;
  const Model other(shape);
  const absl::Status status = other.Stream(other.Options(10)).status();
  EXPECT_TRUE(absl::IsUnimplemented(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1: experts of type Q2_K"));
}

// Tiles of all widths, none of them full, of as many rows as make them worth it.
TEST(StreamedExpertsTest, ProductsOfManyRows) {
  TANDEM_NEEDS_GPU();
  Check(PrepareGroupedProducts());
  constexpr int kExperts = 4;
  const int64_t tokens = 320, hidden = 7168, inner = 2048;
  const std::array<int32_t, kExperts> counts = {150, 0, 201, 97};
  std::mt19937 rng(7);
  const auto gate = kernels::testing::QuantizedGaussian(rng, TensorType::kQ4_K, kExperts * inner, hidden);
  const auto up = kernels::testing::QuantizedGaussian(rng, TensorType::kQ8_0, kExperts * inner, hidden);
  const auto down = kernels::testing::QuantizedGaussian(rng, TensorType::kQ6_K, kExperts * hidden, inner);
  const testing::DeviceWeight d_gate(gate.m), d_up(up.m), d_down(down.m);
  const auto x = kernels::testing::Gaussian(rng, tokens * hidden);
  std::vector<float> scaled = x;
  for (float& v : scaled) v *= 0.01f;
  const testing::DeviceActivations a(scaled, tokens, hidden, hidden);
  std::vector<int32_t> pair_token;
  std::vector<float> pair_weight;
  for (int32_t count : counts) {
    for (int32_t i = 0; i < count; ++i) {
      pair_token.push_back(static_cast<int32_t>(i * 320 / count));
      pair_weight.push_back(0.5f + 0.001f * static_cast<float>(i));
    }
  }
  const size_t pairs = pair_token.size();
  const DeviceArray<int32_t> d_token(pair_token);
  const DeviceArray<float> d_weight(pair_weight), middle(pairs * inner);
  GateUpParams p;
  p.gate = {d_gate.matrix().type, d_gate.matrix().row_bytes};
  p.up = {d_up.matrix().type, d_up.matrix().row_bytes};
  p.h = a.get().h;
  p.h_scale = a.get().h_scale;
  p.pair_token = d_token.get();
  p.middle = middle.get();
  p.hidden = static_cast<int32_t>(hidden);
  p.inner = static_cast<int32_t>(inner);
  p.experts = kExperts;
  int32_t begin = 0;
  for (int e = 0; e < kExperts; ++e) {
    p.gate.data[e] = d_gate.matrix().data + e * inner * d_gate.matrix().row_bytes;
    p.up.data[e] = d_up.matrix().data + e * inner * d_up.matrix().row_bytes;
    p.begin[e] = begin;
    p.count[e] = counts[e];
    begin += counts[e];
  }
  Check(LaunchGateUp(p, nullptr));
  const auto got = middle.Download();
  auto row_of = [](const kernels::testing::Weights& w, int64_t row) {
    std::vector<float> values(w.m.cols);
    quant::Dequantize(w.m.type, w.m.data + row * w.m.row_bytes, values.data(), w.m.cols);
    return values;
  };
  auto dot = [](const std::vector<float>& w, const float* v, double* size) {
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i) sum += double{w[i]} * v[i], *size += std::fabs(w[i] * v[i]);
    return sum;
  };
  for (int e = 0; e < kExperts; ++e) {
    for (int64_t r : {int64_t{0}, int64_t{17}, int64_t{700}, inner - 1}) {
      const auto g = row_of(gate, e * inner + r), u = row_of(up, e * inner + r);
      for (int32_t i = 0; i < counts[e]; i += 13) {
        const float* v = scaled.data() + int64_t{pair_token[p.begin[e] + i]} * hidden;
        double size_g = 0, size_u = 0;
        const double vg = dot(g, v, &size_g), vu = dot(u, v, &size_u);
        const double want = vg / (1 + std::exp(-vg)) * vu;
        ASSERT_NEAR(got[(p.begin[e] + i) * inner + r], want,
                    2e-3 * (size_g * std::fabs(vu) + size_u * std::fabs(vg)))
            << "expert " << e << ", pair " << i << ", row " << r;
      }
    }
  }

  const testing::DeviceActivations m(got, static_cast<int64_t>(pairs), inner, inner);
  std::vector<double> want(static_cast<size_t>(tokens * 3));
  std::vector<double> sizes(want.size());
  const int64_t rows[3] = {0, 3333, hidden - 1};
  for (int e = 0; e < kExperts; ++e) {
    for (int k = 0; k < 3; ++k) {
      const auto w = row_of(down, e * hidden + rows[k]);
      for (int32_t i = p.begin[e]; i < p.begin[e] + counts[e]; ++i) {
        double size = 0;
        want[pair_token[i] * 3 + k] += pair_weight[i] * dot(w, got.data() + int64_t{i} * inner, &size);
        sizes[pair_token[i] * 3 + k] += size * pair_weight[i];
      }
    }
  }
  // One expert behind the other, who share most tokens; each after the one before or beside its end.
  auto sums = [&](int32_t tile, bool chained) {
    DeviceArray<float> sum(std::vector<float>(static_cast<size_t>(tokens * hidden)));
    bool another = false;
    for (int e = 0; e < kExperts; ++e) {
      DownParams d;
      d.type = d_down.matrix().type;
      d.row_bytes = d_down.matrix().row_bytes;
      d.data = d_down.matrix().data + e * hidden * d.row_bytes;
      d.h = m.get().h + int64_t{p.begin[e]} * inner;
      d.h_scale = m.get().h_scale + p.begin[e];
      d.pair_token = d_token.get() + p.begin[e];
      d.pair_weight = d_weight.get() + p.begin[e];
      d.x = sum.get();
      d.hidden = p.hidden;
      d.inner = p.inner;
      d.count = counts[e];
      d.tile = tile;
      d.after_another = chained && another;
      another = another || d.count > 0;
      Check(LaunchDown(d, nullptr));
    }
    return sum.Download();
  };
  const auto y = sums(0, false);
  for (const int32_t tile : {64, 128, 256}) {
    DeviceArray<float> again(pairs * inner);
    p.tile = tile;
    p.middle = again.get();
    Check(LaunchGateUp(p, nullptr));
    EXPECT_TRUE(testing::SameBits(got.data(), again.Download().data(), got.size())) << tile;
    EXPECT_TRUE(testing::SameBits(y.data(), sums(tile, false).data(), y.size())) << tile;
    for (int i = 0; i < 10; ++i) {
      EXPECT_TRUE(testing::SameBits(y.data(), sums(tile, true).data(), y.size())) << tile << " chained";
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int k = 0; k < 3; ++k) {
      ASSERT_NEAR(y[t * hidden + rows[k]], want[t * 3 + k], 2e-3 * sizes[t * 3 + k] + 1e-6)
          << "token " << t << ", row " << rows[k];
    }
  }
}

}  // namespace
}  // namespace tandem::attention::cuda
