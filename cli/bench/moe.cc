// The routed experts of a layer, call after call, over random weights that no cache can hold.
#include <algorithm>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "cli/bench/moe_runner.h"
#include "cli/bench/util.h"
#include "cli/synth/shapes.h"
#include "cli/util/format.h"
#include "common/base/status_macros.h"
#include "common/kernels/bulk.h"
#include "common/quant/quant.h"
#include "common/topology/limits.h"

namespace tandem::cli {
namespace {

constexpr uint64_t kWantedBytes = 4'000'000'000;    // of weights, where the user does not say
constexpr uint64_t kLargeMachine = 64'000'000'000;  // from this much memory on ...
constexpr int64_t kLayersOnLarge = 5;               // ... so many layers at least
constexpr uint64_t kLeastReadBytes = 256'000'000;   // of a read of the ceiling
constexpr int64_t kMostTokens = 65536;

struct Setup {
  expert::GenerateOptions generate;
  int64_t model_layers = 0;  // MoE layers of the whole model
  double pause = 0;          // seconds between calls
  uint64_t bytes = 0;        // of the weights
};

absl::StatusOr<Setup> Sized(const BenchOptions& options, int64_t layers, int64_t experts) {
  TANDEM_ASSIGN_OR_RETURN(const TypeScheme types, TypeScheme::Find(options.type));
  TANDEM_ASSIGN_OR_RETURN(model::ModelConfig config, NamedShape(options.shape));
  Setup setup;
  setup.model_layers = config.num_moe_layers();
  setup.pause = 1e-6 * static_cast<double>(options.pause_us);
  TANDEM_ASSIGN_OR_RETURN(config, Resize(config, 0, layers, experts));
  for (int64_t l = 0; l < layers; ++l) {
    expert::GeneratedLayer layer;
    layer.gate = layer.up = types.TypeOf(TensorRole::kOther, l, layers, config.hidden_size);
    layer.down = types.TypeOf(TensorRole::kDown, l, layers, config.moe_intermediate_size);
    setup.generate.layers.push_back(layer);
  }
  setup.generate.config = config;
  TANDEM_ASSIGN_OR_RETURN(setup.bytes, expert::GeneratedBytes(setup.generate));
  return setup;
}

// The user's layers and experts; where they do not say, enough of them for the caches, within memory.
absl::StatusOr<Setup> ChooseSize(const BenchOptions& options) {
  const uint64_t usable = topology::ReadMemoryInfo().UsableBytes();
  const uint64_t copies = options.slices > 1 ? 2 : 1;
  TANDEM_ASSIGN_OR_RETURN(const model::ModelConfig shape, NamedShape(options.shape));
  int64_t experts = options.experts > 0 ? options.experts : shape.n_routed_experts;
  TANDEM_ASSIGN_OR_RETURN(const Setup two, Sized(options, 2, experts));
  int64_t layers = options.layers;
  if (layers == 0) {
    const uint64_t each = std::max<uint64_t>(1, two.bytes / 2);
    layers = std::max<int64_t>(2, static_cast<int64_t>((kWantedBytes + each - 1) / each));
    if (usable > kLargeMachine) layers = std::max(layers, kLayersOnLarge);
    while (layers > 1 && each * static_cast<uint64_t>(layers) * copies > usable / 10 * 4 &&
           options.experts > 0) {
      --layers;
    }
  }
  TANDEM_ASSIGN_OR_RETURN(Setup setup, Sized(options, layers, experts));
  while (options.experts == 0 && setup.bytes * copies > usable / 10 * 4 &&
         experts / 2 >= 2 * shape.num_experts_per_tok) {
    experts /= 2;
    TANDEM_ASSIGN_OR_RETURN(setup, Sized(options, layers, experts));
  }
  if (setup.bytes * copies > usable / 10 * 9) {
    return absl::ResourceExhaustedError(
        absl::StrCat(layers, " layers of ", experts, " experts take ", FormatBytes(setup.bytes * copies),
                     copies > 1 ? " (one process and the slices)" : "", ", ", FormatBytes(usable),
                     " are available: fewer --layers or --experts"));
  }
  return setup;
}

// New random experts for every token, k distinct ones each.
void Route(std::mt19937_64& random, int64_t tokens, int64_t k, int64_t experts, std::span<int32_t> ids) {
  std::vector<int32_t> all(static_cast<size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      const auto at = static_cast<size_t>(i) + random() % static_cast<uint64_t>(experts - i);
      std::swap(all[static_cast<size_t>(i)], all[at]);
      ids[static_cast<size_t>(t * k + i)] = all[static_cast<size_t>(i)];
    }
  }
}

// Passes over all layers with one runner, and reads of the ceiling in between.
class Series {
 public:
  Series(MoeRunner& runner, const Setup& setup, int64_t tokens)
      : runner_(runner), setup_(setup), tokens_(tokens), random_(static_cast<uint64_t>(tokens)) {
    const model::ModelConfig& c = setup.generate.config;
    const auto pairs = static_cast<size_t>(tokens * c.num_experts_per_tok);
    const auto values = static_cast<size_t>(tokens * c.hidden_size);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < pairs; ++i) {
      runner.weights()[i] = 2.5f / static_cast<float>(c.num_experts_per_tok);
    }
    for (size_t i = 0; i < values; ++i) runner.activations()[i] = quant::FloatToBf16(normal(random_));
  }

  absl::Status Warm() {
    TANDEM_RETURN_IF_ERROR(Walk().status());
    TANDEM_ASSIGN_OR_RETURN(before_, Ceiling());
    return absl::OkStatus();
  }

  absl::Status Pass() {
    TANDEM_ASSIGN_OR_RETURN(const MoeRunner::Result walk, Walk());
    TANDEM_ASSIGN_OR_RETURN(const double after, Ceiling());
    const double gbps = walk.bytes / walk.seconds / 1e9;
    gbps_.push_back(gbps);
    bytes_.push_back(walk.bytes / layers());
    seconds_.push_back(walk.seconds / layers());
    ceilings_.push_back(after);
    ratios_.push_back(2 * gbps / (before_ + after));
    before_ = after;
    return absl::OkStatus();
  }

  void Forget() { calls_.clear(); }

  // Everything but the fields that do not depend on the passes.
  Measurement Result() const {
    Measurement m;
    m.bench = "moe";
    m.tokens = tokens_;
    m.bytes = Median(bytes_);
    m.seconds = Median(seconds_);
    m.gbps = Median(gbps_);
    m.ceiling_gbps = Median(ceilings_);
    m.ratio = Median(ratios_);
    m.p50_us = 1e6 * Quantile(calls_, 0.50);
    m.p99_us = 1e6 * Quantile(calls_, 0.99);
    m.tokens_per_second =
        static_cast<double>(tokens_) / (static_cast<double>(setup_.model_layers) * *m.seconds);
    return m;
  }

 private:
  double layers() const { return static_cast<double>(setup_.generate.layers.size()); }

  absl::StatusOr<MoeRunner::Result> Walk() {
    MoeRunner::Result sum;
    const model::ModelConfig& c = setup_.generate.config;
    for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
      Route(random_, tokens_, c.num_experts_per_tok, c.n_routed_experts, runner_.ids());
      for (const Stopwatch pause; pause.Seconds() < setup_.pause;) {
      }
      TANDEM_ASSIGN_OR_RETURN(const MoeRunner::Result one, runner_.Forward({layer, tokens_}));
      sum.seconds += one.seconds;
      sum.bytes += one.bytes;
      calls_.push_back(one.seconds);
    }
    last_bytes_ = sum.bytes;
    return sum;
  }
  absl::StatusOr<double> Ceiling() {
    const uint64_t bytes = std::max(static_cast<uint64_t>(last_bytes_), kLeastReadBytes);
    TANDEM_ASSIGN_OR_RETURN(const double rate, runner_.Read(bytes));
    return rate / 1e9;
  }

  MoeRunner& runner_;
  const Setup& setup_;
  const int64_t tokens_;
  std::mt19937_64 random_;
  double last_bytes_ = 0;
  double before_ = 0;
  std::vector<double> gbps_, bytes_, seconds_, ceilings_, ratios_, calls_;
};

}  // namespace

absl::Status BenchMoe(const BenchOptions& options, Report& report) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<kernels::Isa> isas, BenchIsas(options.isa));
  TANDEM_ASSIGN_OR_RETURN(const std::vector<int64_t> tokens,
                          ParseNumbers("tokens", options.tokens, kMostTokens));
  TANDEM_ASSIGN_OR_RETURN(const Setup setup, ChooseSize(options));
  MoeRunnerOptions how;
  how.generate = setup.generate;
  how.max_tokens = *std::max_element(tokens.begin(), tokens.end());
  TANDEM_ASSIGN_OR_RETURN(how.cpus, BenchCpus(options.threads));
  how.bulk = options.precision == "bulk";
  const std::string machine = MachineName();
  const std::string shape = absl::StrCat(options.shape, " ", options.type, ", ", setup.generate.layers.size(),
                                         " layers of ", setup.generate.config.n_routed_experts);
  report.Note(absl::StrCat(shape, " experts, working set ", FormatBytes(setup.bytes),
                           "; tokens/s: ", setup.model_layers, " layers like these"));
  for (const kernels::Isa isa : isas) {
    const IsaScope scope(isa);
    if (how.bulk && !kernels::BulkAvailable()) {
      return absl::InvalidArgumentError(absl::StrCat("--precision bulk: ", std::string(kernels::IsaName(isa)),
                                                     " has no bf16 tiles (AMX-BF16)"));
    }
    std::vector<std::unique_ptr<MoeRunner>> runners(1);
    std::vector<std::string> names = {shape};
    if (options.slices > 1) {
      // Both as processes, so that the handing over of calls costs the same.
      runners.resize(2);
      TANDEM_ASSIGN_OR_RETURN(runners[0], MakeProcessRunner(how, 1));
      TANDEM_ASSIGN_OR_RETURN(runners[1], MakeProcessRunner(how, options.slices));
      names = {absl::StrCat(shape, ", 1 process"), absl::StrCat(shape, ", ", options.slices, " slices")};
    } else {
      TANDEM_ASSIGN_OR_RETURN(runners[0], MakeLocalRunner(how));
    }
    for (const int64_t n : tokens) {
      std::vector<Series> series;
      for (const auto& runner : runners) series.emplace_back(*runner, setup, n);
      for (Series& each : series) {
        TANDEM_RETURN_IF_ERROR(each.Warm());
        each.Forget();
      }
      for (Passes passes(options); passes.Next();) {
        for (Series& each : series) TANDEM_RETURN_IF_ERROR(each.Pass());
      }
      for (size_t i = 0; i < series.size(); ++i) {
        Measurement m = series[i].Result();
        m.machine = machine;
        m.isa = std::string(kernels::IsaName(isa));
        m.threads = static_cast<int64_t>(how.cpus.size());
        m.shape = how.bulk ? absl::StrCat(names[i], ", bulk") : names[i];
        report.Add(m);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace tandem::cli
