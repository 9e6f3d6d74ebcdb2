// The sampler on R1's vocabulary, microseconds a launch inside a graph; JSON lines.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "services/attention_gpu/backend/cuda/gpu_test_util.h"
#include "services/attention_gpu/backend/cuda/sampler.h"

namespace tandem::attention::cuda {
namespace {

using testing::DeviceArray;

constexpr int64_t kVocab = 129280;
constexpr int kRounds = 20;

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  std::exit(1);
}
void Must(cudaError_t e) { Must(ToStatus(e, "the benchmark")); }

// Median seconds of one of kRounds launches captured together.
double Time(const std::function<absl::Status(cudaStream_t)>& launch) {
  cudaStream_t stream;
  Must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t run;
  Must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kRounds; ++i) Must(launch(stream));
  Must(cudaStreamEndCapture(stream, &graph));
  Must(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  Must(cudaEventCreate(&begin));
  Must(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < 12; ++i) {
    Must(cudaEventRecord(begin, stream));
    Must(cudaGraphLaunch(run, stream));
    Must(cudaEventRecord(end, stream));
    Must(cudaStreamSynchronize(stream));
    float ms = 0;
    Must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) seconds.push_back(ms * 1e-3 / kRounds);
  }
  std::sort(seconds.begin(), seconds.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return seconds[seconds.size() / 2];
}

int Main() {
  if (!testing::NoGpu().empty()) {
    std::printf("skipped, no GPU: %s\n", testing::NoGpu().c_str());
    return 0;
  }
  auto created = Sampler::Create(kVocab);
  Must(created.status());
  Sampler& sampler = **created;
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, 3);
  // Flat: as of random weights. Peaked: as a trained model's, ten tokens with nearly all the weight.
  std::vector<float> flat(Sampler::kMaxRows * kVocab), peaked;
  for (float& x : flat) x = normal(rng);
  peaked = flat;
  for (int64_t r = 0; r < Sampler::kMaxRows; ++r) {
    for (int i = 0; i < 10; ++i) peaked[r * kVocab + rng() % kVocab] = 25 + normal(rng);
  }
  struct Kind {
    const char* name;
    SamplingParams params;
  };
  std::vector<Kind> kinds(8);
  for (Kind& k : kinds) k.params.temperature = 0.6f;
  kinds[0].name = "greedy among others";
  kinds[0].params.temperature = 0;
  kinds[1].name = "top_p 0.95";
  kinds[1].params.top_p = 0.95f;
  kinds[2].name = "temperature 1 alone";
  kinds[2].params.temperature = 1;
  kinds[3].name = "top_k 40";
  kinds[3].params.top_k = 40;
  kinds[4].name = "min_p 0.05";
  kinds[4].params.min_p = 0.05f;
  kinds[5].name = "top_p 0.95 and 2000 penalties";
  kinds[5].params.top_p = 0.95f;
  kinds[5].params.frequency_penalty = 0.1f;
  kinds[6].name = "top_p 0.95 and 20 logprobs";
  kinds[6].params.top_p = 0.95f;
  kinds[6].params.logprobs = true;
  kinds[6].params.top_logprobs = 20;
  kinds[7].name = "top_p 0.999, temperature 1.5";
  kinds[7].params.top_p = 0.999f;
  kinds[7].params.temperature = 1.5f;
  std::unordered_map<int32_t, int32_t> counts;
  while (counts.size() < 2000) counts[static_cast<int32_t>(rng() % kVocab)] = 1;

  for (const char* shape : {"flat", "peaked"}) {
    const DeviceArray<float> logits(shape == std::string("flat") ? flat : peaked);
    const DeviceArray<int32_t> best(Sampler::kMaxRows);
    for (int64_t rows : {1, 4, 16, 64}) {
      auto report = [&](const char* what, double seconds) {
        std::printf(
            "{\"bench\": \"cuda_sampler\", \"shape\": \"%s, %s\", \"tokens\": %lld, \"microseconds\": "
            "%.1f}\n",
            what, shape, static_cast<long long>(rows), seconds * 1e6);
        std::fflush(stdout);
      };
      report("argmax kernel", Time([&](cudaStream_t s) {
               return ToStatus(LaunchArgmax({logits.get(), best.get(), rows, kVocab}, s), "argmax");
             }));
      report("greedy alone",
             Time([&](cudaStream_t s) { return sampler.LaunchGreedy(logits.get(), rows, s); }));
      for (const Kind& k : kinds) {
        // Penalties of repeated launches would add up: without effect in value, but not in work.
        SamplingParams p = k.params;
        if (p.frequency_penalty != 0) p.frequency_penalty = 1e-30f;
        std::vector<Sampler::Request> requests(static_cast<size_t>(rows), {&p, 0, &counts});
        for (int64_t r = 0; r < rows; ++r) requests[r].position = static_cast<uint64_t>(r);
        Must(sampler.Stage(requests));
        report(k.name, Time([&](cudaStream_t s) { return sampler.Launch(logits.get(), rows, s); }));
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace tandem::attention::cuda

int main() { return tandem::attention::cuda::Main(); }
