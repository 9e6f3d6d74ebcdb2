// How fast a machine can run a model: arithmetic on bytes, multiply-adds and bandwidths. Pure functions.
//
// A step of decode computes layer by layer: what the GPU does alone (attention, dense layers, router, head)
// waits for nobody; in a layer with experts it then waits for the CPU, and the shared expert is computed
// meanwhile. So a step takes
//     GPU weights + KV cache + max(routed experts, shared experts) + round trips
// and each part its bytes by the bandwidth, or its multiply-adds by the rate of arithmetic. On the CPU
// reading and multiplying add up: on the machines measured so far they overlap little (docs/plan.md). n
// tokens that route independently meet E (1 - (1 - k / E)^n) distinct experts of E, k for each token.
#pragma once

#include <cstdint>
#include <string_view>

#include "cli/plan/model_bytes.h"

namespace tandem::cli {

struct MachineFigures {
  int sockets = 2;
  double dram_gbps = 174;        // of a socket, by a plain read loop of all its threads
  double cpu_efficiency = 0.85;  // the share of it at which expert weights are read
  double cpu_tmacs = 4;          // 10^12 multiply-adds a second with quantized weights, all sockets together
  double cpu_prefill = 0;        // > 0: tokens/s of all routed experts in long chunks, instead of both above
  bool gpu = true;               // without one the CPU does all
  double vram_gb = 24;
  double vram_gbps = 1008;
  double gpu_efficiency = 0.6;           // the share of it that kernels reach
  double gpu_tflops = 165;               // float16 products with float32 sums
  double gpu_compute_efficiency = 0.35;  // the share of it that kernels reach
  double pcie_gbps = 25;                 // host to GPU, copies from page-locked memory
  double round_trip_us = 16;             // GPU to CPU and back, a layer

  double ExpertGbps() const { return sockets * dram_gbps * cpu_efficiency; }
};

enum class KvType { kBf16, kInt8 };
// Of one token in all layers.
uint64_t KvBytesPerToken(const model::ModelConfig& config, KvType type);

enum class Bound { kDram, kCpuArithmetic, kVram, kGpuArithmetic, kPcie, kRoundTrips };
std::string_view BoundName(Bound bound);

// Of a layer's E experts, those that n tokens meet.
double DistinctExperts(const model::ModelConfig& config, double tokens);

// One step of decode for `requests` sequences that have `context` tokens each. Seconds.
struct DecodePoint {
  int64_t requests = 0;
  int64_t context = 0;
  double distinct = 0;  // experts a layer
  double weights = 0;   // of the dense part, without the shared experts
  double kv = 0;        // reading the cache, or attention's arithmetic where that takes longer
  double shared = 0;    // shared experts; hidden where the routed ones take longer
  double read = 0;      // routed experts' bytes
  double multiply = 0;  // routed experts' multiply-adds
  double round_trips = 0;
  double step = 0;
  Bound bound = Bound::kDram;  // of the longest part
  double kv_bytes = 0;

  double tokens_per_second() const { return static_cast<double>(requests) / step; }
};
DecodePoint PredictDecode(const ModelBytes& model, const MachineFigures& machine, KvType kv, int64_t requests,
                          int64_t context);

// A prompt of `tokens`, alone. Seconds.
struct PrefillPoint {
  int64_t tokens = 0;
  double on_cpu = 0;  // experts on the CPU
  Bound cpu_bound = Bound::kDram;
  double streamed = 0;  // their weights copied to the GPU, pass by pass; 0 without a GPU
  double shared = 0;    // of those, the part that the CPU computes meanwhile
  Bound stream_bound = Bound::kPcie;
};
struct PrefillOptions {
  int64_t chunk = 256;           // tokens of a step, experts on the CPU
  int64_t stream_chunk = 16384;  // tokens of a pass, experts streamed: as many as the engine takes at most
  // 10^6 bytes of weights that a layer's experts may be ahead; 0: as the engine likes it in contexts of up to
  // 32768 tokens.
  int64_t stream_buffer_mb = 0;
  bool share = true;  // some experts of a pass are computed by the CPU
};
PrefillPoint PredictPrefill(const ModelBytes& model, const MachineFigures& machine,
                            const PrefillOptions& options, int64_t tokens);

// The shortest prompt that is faster streamed, of those of more than 64 tokens; 0: none up to 2^20 tokens.
int64_t StreamBreakEven(const ModelBytes& model, const MachineFigures& machine,
                        const PrefillOptions& options);

}  // namespace tandem::cli
