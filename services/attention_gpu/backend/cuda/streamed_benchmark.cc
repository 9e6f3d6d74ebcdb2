// Streamed experts on the shape of DeepSeek-R1, beside what plain copies from page-locked memory reach in the
// same run; JSON lines. Two layers in turn, more bytes than any cache holds, the weights in the memory and
// under the mapping that an engine has of an expert process's.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "cli/synth/random_blocks.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "services/attention_gpu/backend/cuda/streamed_experts.h"
#include "services/expert_cpu/shard/generate.h"
#include "services/expert_cpu/testing/synthetic_model.h"
#include "tests/golden/local_experts.h"

namespace tandem::attention::cuda {
namespace {

using expert::testing::RandomFloats;
using expert::testing::RandomIds;
using gguf::TensorType;
using testing::DeviceArray;

template <typename T>
T Must(absl::StatusOr<T> v) {
  if (!v.ok()) {
    std::fprintf(stderr, "%s\n", std::string(v.status().message()).c_str());
    std::exit(1);
  }
  return std::move(*v);
}
void Must(const absl::Status& s) { Must(s.ok() ? absl::StatusOr<int>(0) : absl::StatusOr<int>(s)); }
void Must(cudaError_t e) { Must(ToStatus(e, "benchmark")); }

double Seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Bytes a second of large copies from memory that CUDA allocated.
double PlainCopies() {
  constexpr size_t kBytes = size_t{256} << 20;
  void* host = nullptr;
  Must(cudaMallocHost(&host, kBytes));
  std::fill_n(static_cast<uint8_t*>(host), kBytes, uint8_t{1});
  const DeviceArray<uint8_t> device(kBytes);
  double best = 0;
  for (int i = 0; i < 4; ++i) {
    const double s = Seconds([&] {
      for (int j = 0; j < 4; ++j) {
        Must(cudaMemcpyAsync(device.get(), host, kBytes, cudaMemcpyHostToDevice, nullptr));
      }
      Must(cudaDeviceSynchronize());
    });
    best = std::max(best, 4.0 * kBytes / s);
  }
  Must(cudaFreeHost(host));
  return best;
}

// The arena as another process would map it.
std::span<const std::byte> Mapped(const expert::Shard& shard) {
  const auto fd = Must(shard.arena().OpenReadOnly());
  const uint64_t bytes = (shard.resident_bytes() + (2 << 20) - 1) >> 21 << 21;
  void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (map == MAP_FAILED) Must(absl::InternalError("mmap"));
  return {static_cast<const std::byte*>(map), bytes};
}

struct Batch {
  Batch(const model::ModelConfig& c, int64_t tokens)
      : n(tokens),
        normed(RandomFloats(n * c.hidden_size, 1)),
        weights(RandomFloats(n * c.num_experts_per_tok, 2)),
        x(static_cast<size_t>(n * c.hidden_size)),
        ids(RandomIds(n, c.num_experts_per_tok, c.n_routed_experts, 3)) {
    Must(cudaMemset(x.get(), 0, x.size() * sizeof(float)));
  }
  int64_t n;
  DeviceArray<float> normed, weights, x;
  DeviceArray<int32_t> ids;
};

// Seconds of a layer, the layers in turn.
double Layers(StreamedExperts& experts, const Batch& batch, int64_t layers, int rounds) {
  cudaStream_t stream;
  Must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  auto run = [&](int count) {
    for (int i = 0; i < count; ++i) {
      RoutedCall call;
      call.layer = 1 + i % layers;
      call.n = batch.n;
      call.normed = batch.normed.get();
      call.ids = batch.ids.get();
      call.weights = batch.weights.get();
      call.x = batch.x.get();
      if (call.layer == 1) Must(experts.Begin());
      Must(experts.Ask(call, stream));
      Must(experts.Add(call, stream));
    }
    Must(cudaStreamSynchronize(stream));
  };
  run(2);
  const double s = Seconds([&] { run(rounds); }) / rounds;
  Must(cudaStreamDestroy(stream));
  return s;
}

// The products alone, on weights that are on the device already: seconds of one expert.
double Products(const model::ModelConfig& c, int64_t tokens_each, int32_t tile = 0) {
  constexpr int kExperts = 4;
  const int64_t pairs = kExperts * tokens_each, hidden = c.hidden_size, inner = c.moe_intermediate_size;
  const int64_t up_row = DeviceRowBytes(kQ4_K, hidden), down_row = DeviceRowBytes(kQ6_K, inner);
  std::vector<uint8_t> up(static_cast<size_t>(up_row * inner)), down(static_cast<size_t>(down_row * hidden));
  cli::FillRandomBlocks(TensorType::kQ4_K, 0.01, 1, 0, up);
  cli::FillRandomBlocks(TensorType::kQ6_K, 0.01, 2, 0, down);
  const DeviceArray<uint8_t> d_up(up), d_down(down), d_repacked(down.size());
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < pairs; ++i) tokens.push_back(static_cast<int32_t>(i % tokens_each));
  const DeviceArray<int32_t> d_tokens(tokens);
  const DeviceArray<float> normed(RandomFloats(tokens_each * hidden, 3)), weight(RandomFloats(pairs, 4));
  const DeviceArray<float> x(std::vector<float>(static_cast<size_t>(tokens_each * hidden)));
  const DeviceArray<float> middle(static_cast<size_t>(pairs * inner)), scale(static_cast<size_t>(pairs));
  const DeviceArray<uint16_t> form(static_cast<size_t>(tokens_each * hidden));
  const DeviceArray<uint16_t> middle_form(static_cast<size_t>(pairs * inner));
  const DeviceArray<float> middle_scale(static_cast<size_t>(pairs));
  GateUpParams p;
  p.gate.type = p.up.type = kQ4_K;
  p.gate.row_bytes = p.up.row_bytes = up_row;
  p.h = form.get();
  p.h_scale = scale.get();
  p.pair_token = d_tokens.get();
  p.middle = middle.get();
  p.hidden = static_cast<int32_t>(hidden);
  p.inner = static_cast<int32_t>(inner);
  p.experts = kExperts;
  p.tile = tile;
  for (int e = 0; e < kExperts; ++e) {
    p.gate.data[e] = p.up.data[e] = d_up.get();
    p.begin[e] = static_cast<int32_t>(e * tokens_each);
    p.count[e] = static_cast<int32_t>(tokens_each);
  }
  QuantizeParams to_form;
  to_form.x = normed.get();
  to_form.x_stride = to_form.cols = hidden;
  to_form.rows = tokens_each;
  to_form.h = form.get();
  to_form.h_scale = scale.get();
  Must(LaunchToHalf(to_form, nullptr));
  auto group = [&](double* parts) {
    auto timed = [&](int i, const std::function<cudaError_t()>& launch) {
      cudaEvent_t a, b;
      Must(cudaEventCreate(&a));
      Must(cudaEventCreate(&b));
      Must(cudaEventRecord(a));
      Must(launch());
      Must(cudaEventRecord(b));
      Must(cudaEventSynchronize(b));
      float ms = 0;
      Must(cudaEventElapsedTime(&ms, a, b));
      parts[i] += ms * 1e3 / kExperts;
      Must(cudaEventDestroy(a));
      Must(cudaEventDestroy(b));
    };
    timed(0, [&] {
      cudaError_t e = cudaSuccess;
      for (int i = 0; i < kExperts; ++i) {
        e = LaunchRepack({kQ6_K, d_down.get(), d_repacked.get(), hidden, inner}, nullptr);
      }
      return e;
    });
    timed(1, [&] { return LaunchGateUp(p, nullptr); });
    timed(2, [&] {
      QuantizeParams f;
      f.x = middle.get();
      f.x_stride = f.cols = inner;
      f.rows = pairs;
      f.h = middle_form.get();
      f.h_scale = middle_scale.get();
      return LaunchToHalf(f, nullptr);
    });
    timed(3, [&] {
      cudaError_t e = cudaSuccess;
      for (int i = 0; i < kExperts; ++i) {
        DownParams d;
        d.type = kQ6_K;
        d.row_bytes = down_row;
        d.data = d_repacked.get();
        d.h = middle_form.get() + i * tokens_each * inner;
        d.h_scale = middle_scale.get() + i * tokens_each;
        d.pair_token = d_tokens.get() + i * tokens_each;
        d.pair_weight = weight.get() + i * tokens_each;
        d.x = x.get();
        d.hidden = static_cast<int32_t>(hidden);
        d.inner = static_cast<int32_t>(inner);
        d.count = static_cast<int32_t>(tokens_each);
        d.tile = tile;
        d.after_another = i > 0;
        e = LaunchDown(d, nullptr);
      }
      return e;
    });
  };
  double parts[4] = {};
  for (int i = 0; i < 3; ++i) group(parts);
  for (double& v : parts) v = 0;
  constexpr int kRounds = 10;
  for (int i = 0; i < kRounds; ++i) group(parts);
  double sum = 0;
  for (double& v : parts) sum += v /= kRounds;
  const double flops = 6.0 * static_cast<double>(tokens_each * hidden * inner);
  std::printf(
      "{\"bench\": \"streamed_products\", \"shape\": \"R1\", \"tokens_an_expert\": %lld, \"tile\": %d, "
      "\"microseconds_an_expert\": %.1f, \"repack\": %.1f, \"gate_up\": %.1f, \"form\": %.1f, "
      "\"down\": %.1f, \"tflops\": %.1f}\n",
      static_cast<long long>(tokens_each), tile, sum, parts[0], parts[1], parts[2], parts[3],
      flops / sum / 1e6);
  std::fflush(stdout);
  return sum * 1e-6;
}

int Main(int64_t experts) {
  if (!testing::NoGpu().empty()) {
    std::printf("skipped, no GPU: %s\n", testing::NoGpu().c_str());
    return 0;
  }
  expert::GenerateOptions generate;
  model::ModelConfig& c = generate.config;
  c.hidden_size = 7168;
  c.moe_intermediate_size = 2048;
  c.n_routed_experts = experts;
  c.num_experts_per_tok = 8;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  generate.layers.assign(2, {TensorType::kQ4_K, TensorType::kQ4_K, TensorType::kQ6_K});
  generate.arena = expert::ArenaKind::kSharedSmall;
  generate.fill = [](TensorType type, uint64_t number, std::span<uint8_t> blocks) {
    cli::FillRandomBlocks(type, 0.01, number << 32, 0, blocks);
  };
  Must(PrepareGroupedProducts());
  for (const int64_t each : {16, 64, 128, 512, 2048}) Products(c, each);
  for (const int32_t tile : {64, 128, 256}) Products(c, 512, tile);
  threading::ThreadPool::Options threads;
  threading::ThreadPool pool(threads);
  const auto shard = Must(expert::GenerateShard(generate, pool));
  const auto mapped = std::make_shared<ShardWeights>(golden::WeightsOf(*shard, Mapped(*shard)));
  const auto own = std::make_shared<ShardWeights>(golden::WeightsOf(*shard));

  struct Way {
    const char* what;
    std::shared_ptr<const ShardWeights> weights;
    bool page_lock;
    int threads;
    std::vector<int64_t> tokens;
  };
  for (const Way& way :
       {Way{"mapped", mapped, true, 0, {1024, 4096, 16384}}, Way{"own", own, true, 0, {4096}},
        Way{"buffers, 4 threads", mapped, false, 4, {4096}},
        Way{"buffers, 8 threads", mapped, false, 8, {4096}},
        Way{"buffers, 12 threads", mapped, false, 12, {4096}}}) {
    StreamOptions options;
    options.max_tokens = *std::max_element(way.tokens.begin(), way.tokens.end());
    options.copy.page_lock = way.page_lock;
    options.copy.threads = way.threads;
    for (const bool ahead : {true, false}) {
      options.copy_ahead = ahead;
      const auto streamed = Must(StreamedExperts::Create({way.weights}, c, options));
      std::printf("{\"way\": \"%s\", \"description\": \"%s\"}\n", way.what, streamed->Description().c_str());
      for (const int64_t n : way.tokens) {
        const Batch batch(c, n);
        const double before = PlainCopies();
        const double alone = Must(streamed->MeasureCopy(uint64_t{2} << 30));
        const double s = Layers(*streamed, batch, 2, 8);
        const double ceiling = std::max(before, PlainCopies());
        const auto bytes = static_cast<double>(streamed->LayerBytes(1));
        std::printf(
            "{\"bench\": \"streamed_experts\", \"way\": \"%s\", \"ahead\": %s, \"tokens\": %lld, "
            "\"experts\": %lld, \"milliseconds\": %.2f, \"gbps\": %.2f, \"copy_gbps\": %.2f, "
            "\"ceiling_gbps\": %.2f, \"ratio\": %.3f}\n",
            way.what, ahead ? "true" : "false", static_cast<long long>(n), static_cast<long long>(experts),
            s * 1e3, bytes / s / 1e9, alone / 1e9, ceiling / 1e9, bytes / s / ceiling);
        std::fflush(stdout);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace tandem::attention::cuda

int main(int argc, char** argv) { return tandem::attention::cuda::Main(argc > 1 ? std::atoll(argv[1]) : 64); }
