#include "cli/plan/predict.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "services/attention_gpu/experts/stream_share.h"

namespace tandem::cli {
namespace {

constexpr double kGiga = 1e9, kTera = 1e12;

double VramRate(const MachineFigures& m) { return m.vram_gbps * m.gpu_efficiency * kGiga; }
double GpuFlops(const MachineFigures& m) { return m.gpu_tflops * m.gpu_compute_efficiency * kTera; }

// Floating-point operations of attention for one token that sees `positions`, all layers: the scores over
// latents and rotated keys, then the weighted sum of latents.
double AttentionFlops(const model::ModelConfig& c, double positions) {
  return 2.0 * static_cast<double>(c.num_attention_heads * (c.latent_dim() + c.kv_lora_rank)) * positions *
         static_cast<double>(c.num_hidden_layers);
}

// Those of `rows` rows of a prompt behind `before` positions on a GPU: over latents, or over keys and values
// of the heads that are made from the latents of all positions first, once for each 4096 rows (docs/cuda.md).
double PromptAttentionFlops(const model::ModelConfig& c, double before, double rows) {
  constexpr double kRowsTogether = 4096;
  const double mean = before + (rows + 1) / 2;
  const auto heads = static_cast<double>(c.num_attention_heads);
  const auto pair = static_cast<double>(c.qk_head_dim() + c.v_head_dim);
  const auto made = static_cast<double>(c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim));
  const double expanded = 2 * heads * static_cast<double>(c.num_hidden_layers) *
                          (rows * mean * pair + (before + rows) * made * std::ceil(rows / kRowsTogether));
  return std::min(rows * AttentionFlops(c, mean), expanded);
}

// Seconds of the dense part for one step of `tokens`: its weights once, or its arithmetic if that takes
// longer.
double DenseSeconds(const MachineFigures& m, double bytes, double values, double tokens) {
  if (!m.gpu) return bytes / (m.ExpertGbps() * kGiga) + values * tokens / (m.cpu_tmacs * kTera);
  return std::max(bytes / VramRate(m), 2 * values * tokens / GpuFlops(m));
}

double ExpertReadBytes(const ModelBytes& model, double tokens) {
  return DistinctExperts(model.config, tokens) * static_cast<double>(model.config.num_moe_layers()) *
         model.ExpertBytes();
}

double ExpertReadSeconds(const ModelBytes& model, const MachineFigures& m, double tokens) {
  return ExpertReadBytes(model, tokens) / (m.ExpertGbps() * kGiga);
}

double ExpertMultiplySeconds(const ModelBytes& model, const MachineFigures& m, double tokens) {
  return m.cpu_prefill > 0 ? tokens / m.cpu_prefill : tokens * model.RoutedMacs() / (m.cpu_tmacs * kTera);
}

// The part of a pass's experts that the CPU computes while the others' weights are copied, which all together
// take `copy`, so that both end together: the CPU begins when the GPU is done with everything else (`rest`),
// and reads what memory gives beside the copies.
double CpuShare(const ModelBytes& model, const MachineFigures& m, double tokens, double copy, double rest) {
  const double left = (m.sockets * m.dram_gbps - m.pcie_gbps) * m.cpu_efficiency * kGiga;
  if (tokens > static_cast<double>(attention::kMostSharedTokens) || left <= 0 || copy <= rest) return 0;
  const double read = m.cpu_prefill > 0 ? 0 : ExpertReadBytes(model, tokens) / left;
  return (copy - rest) / (copy + read + ExpertMultiplySeconds(model, m, tokens));
}

// A prompt in passes of so many tokens, experts streamed. In a layer the GPU computes everything else first;
// weights come meanwhile until the buffers are full, and all of them while it multiplies them.
struct Passes {
  double seconds = 0, copies = 0, computes = 0;
  double shared = 0;  // the CPU's part of the experts, of each token
};
Passes StreamPasses(const ModelBytes& model, const MachineFigures& m, const PrefillOptions& options,
                    bool share, int64_t tokens, int64_t chunk) {
  const auto dense_bytes = static_cast<double>(model.every_step + model.shared);
  Passes out;
  for (int64_t at = 0; at < tokens; at += chunk) {
    const auto now = static_cast<double>(std::min(chunk, tokens - at));
    const double all = ExpertReadBytes(model, now) / (m.pcie_gbps * kGiga);
    const double rest_flops = 2 * now * static_cast<double>(model.dense_values) +
                              PromptAttentionFlops(model.config, static_cast<double>(at), now);
    const double rest = std::max(rest_flops / GpuFlops(m), dense_bytes / VramRate(m));
    const double part = share ? CpuShare(model, m, now, all, rest) : 0;
    const double copy = (1 - part) * all;
    const double compute = rest + (1 - part) * 2 * now * model.RoutedMacs() / GpuFlops(m);
    const double buffers =
        options.stream_buffer_mb > 0
            ? static_cast<double>(options.stream_buffer_mb) * 1e6
            : static_cast<double>(attention::AmpleStreamBytes(std::min(chunk, tokens - at), tokens));
    const double ahead = static_cast<double>(model.config.num_moe_layers()) * buffers / (m.pcie_gbps * kGiga);
    const double waits = copy > 0 ? copy + rest - std::min(ahead, copy) : 0;
    out.seconds += std::max({copy, compute, waits});
    out.shared += part * now;
    out.copies += copy;
    out.computes += compute;
  }
  return out;
}

// Of several parts the name of the longest.
Bound Longest(std::initializer_list<std::pair<double, Bound>> parts) {
  return std::max_element(parts.begin(), parts.end(),
                          [](const auto& a, const auto& b) { return a.first < b.first; })
      ->second;
}

}  // namespace

uint64_t KvBytesPerToken(const model::ModelConfig& c, KvType type) {
  // 8 bits: the latent as bytes with a scale, the rotated key as it is.
  const int64_t entry =
      type == KvType::kBf16 ? 2 * c.latent_dim() : c.kv_lora_rank + 4 + 2 * c.qk_rope_head_dim;
  return static_cast<uint64_t>(c.num_hidden_layers * entry);
}

std::string_view BoundName(Bound bound) {
  switch (bound) {
    case Bound::kDram:
      return "DRAM";
    case Bound::kCpuArithmetic:
      return "CPU arithmetic";
    case Bound::kVram:
      return "VRAM";
    case Bound::kGpuArithmetic:
      return "GPU arithmetic";
    case Bound::kPcie:
      return "PCIe";
    case Bound::kRoundTrips:
      return "round trips";
  }
  return "";
}

double DistinctExperts(const model::ModelConfig& c, double tokens) {
  if (c.n_routed_experts == 0) return 0;
  const auto experts = static_cast<double>(c.n_routed_experts);
  return experts * (1 - std::pow(1 - static_cast<double>(c.num_experts_per_tok) / experts, tokens));
}

DecodePoint PredictDecode(const ModelBytes& model, const MachineFigures& m, KvType kv, int64_t requests,
                          int64_t context) {
  const model::ModelConfig& c = model.config;
  const auto n = static_cast<double>(requests), seen = static_cast<double>(context);
  DecodePoint p;
  p.requests = requests;
  p.context = context;
  p.distinct = DistinctExperts(c, n);
  p.kv_bytes = n * seen * static_cast<double>(KvBytesPerToken(c, kv));
  p.read = ExpertReadSeconds(model, m, n);
  p.multiply = n * model.RoutedMacs() / (m.cpu_tmacs * kTera);
  const double all = static_cast<double>(model.every_step + model.shared);
  const double share = all > 0 ? static_cast<double>(model.shared) / all : 0;
  const auto values = static_cast<double>(model.dense_values);
  p.weights = DenseSeconds(m, static_cast<double>(model.every_step), values * (1 - share), n);
  p.shared = DenseSeconds(m, static_cast<double>(model.shared), values * share, n);
  const double flops = n * AttentionFlops(c, seen);
  const double routed = p.read + p.multiply;
  Bound kv_bound = Bound::kVram, weights_bound = Bound::kVram;
  if (m.gpu) {
    const double read = p.kv_bytes / VramRate(m), compute = flops / GpuFlops(m);
    p.kv = std::max(read, compute);
    if (compute > read) kv_bound = Bound::kGpuArithmetic;
    p.round_trips = static_cast<double>(c.num_moe_layers()) * m.round_trip_us * 1e-6;
    p.step = p.weights + p.kv + std::max(routed, p.shared) + p.round_trips;
  } else {
    p.kv = p.kv_bytes / (m.ExpertGbps() * kGiga) + flops / 2 / (m.cpu_tmacs * kTera);
    kv_bound = weights_bound = Bound::kDram;
    p.step = p.weights + p.kv + routed + p.shared;
  }
  p.bound = Longest({{p.read, Bound::kDram},
                     {p.multiply, Bound::kCpuArithmetic},
                     {p.weights, weights_bound},
                     {p.kv, kv_bound},
                     {p.round_trips, Bound::kRoundTrips}});
  return p;
}

PrefillPoint PredictPrefill(const ModelBytes& model, const MachineFigures& m, const PrefillOptions& options,
                            int64_t tokens) {
  const model::ModelConfig& c = model.config;
  const auto n = static_cast<double>(tokens);
  const auto dense_bytes = static_cast<double>(model.every_step + model.shared);
  const auto values = static_cast<double>(model.dense_values);
  PrefillPoint p;
  p.tokens = tokens;

  double read = 0, dense = 0, round_trips = 0, attention_flops = 0;
  for (int64_t at = 0; at < tokens; at += options.chunk) {
    const auto now = static_cast<double>(std::min(options.chunk, tokens - at));
    read += ExpertReadSeconds(model, m, now);
    dense += DenseSeconds(m, dense_bytes, values, now);
    attention_flops += m.gpu ? PromptAttentionFlops(c, static_cast<double>(at), now)
                             : now * AttentionFlops(c, static_cast<double>(at) + (now + 1) / 2);
    if (m.gpu) round_trips += static_cast<double>(c.num_moe_layers()) * m.round_trip_us * 1e-6;
  }
  const double multiply = ExpertMultiplySeconds(model, m, n);
  if (m.cpu_prefill > 0) read = 0;
  const double attention =
      m.gpu ? attention_flops / GpuFlops(m) : attention_flops / 2 / (m.cpu_tmacs * kTera);
  const Bound arithmetic = m.gpu ? Bound::kGpuArithmetic : Bound::kCpuArithmetic;
  p.on_cpu = read + multiply + dense + attention + round_trips;
  p.cpu_bound =
      Longest({{read, Bound::kDram}, {multiply, Bound::kCpuArithmetic}, {dense + attention, arithmetic}});
  if (!m.gpu) return p;

  // As the engine does: passes that are too large to be shared, or more of them that are not.
  Passes passes = StreamPasses(model, m, options, options.share, tokens, options.stream_chunk);
  if (options.share && options.stream_chunk > attention::kMostSharedTokens &&
      tokens > attention::kMostSharedTokens) {
    const Passes shared = StreamPasses(model, m, options, true, tokens, attention::kMostSharedTokens);
    if (shared.seconds < passes.seconds) passes = shared;
  }
  p.streamed = passes.seconds;
  p.shared = passes.shared / n;
  p.stream_bound = Longest({{passes.copies, Bound::kPcie}, {passes.computes, Bound::kGpuArithmetic}});
  return p;
}

int64_t StreamBreakEven(const ModelBytes& model, const MachineFigures& m, const PrefillOptions& options) {
  if (!m.gpu || model.routed == 0) return 0;
  auto pays = [&](int64_t tokens) {
    const PrefillPoint p = PredictPrefill(model, m, options, tokens);
    return p.streamed < p.on_cpu;
  };
  constexpr int64_t kMost = int64_t{1} << 20;
  int64_t no = 64, yes = 65;
  while (!pays(yes)) {
    no = yes;
    if (yes >= kMost) return 0;
    yes *= 2;
  }
  while (no + 1 < yes) {
    const int64_t middle = (no + yes) / 2;
    (pays(middle) ? yes : no) = middle;
  }
  return yes;
}

}  // namespace tandem::cli
