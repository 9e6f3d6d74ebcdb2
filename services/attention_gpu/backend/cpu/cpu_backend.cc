#include "services/attention_gpu/backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/quant/quant.h"
#include "common/threading/claims.h"
#include "services/attention_gpu/backend/cpu/latent_cache.h"
#include "services/attention_gpu/backend/cpu/mla_attention.h"
#include "services/attention_gpu/backend/cpu/router.h"
#include "services/attention_gpu/backend/cpu/weights.h"
#include "services/attention_gpu/experts/deferral.h"

namespace tandem::attention {
namespace {

using kernels::Activations;
using kernels::Matrix;

// One of several products of the same activations: y[t * ldy + row].
struct Product {
  const Matrix* w;
  float* y;
  int64_t ldy;
};

// Where a token row stands: its sequence's pages and its position.
struct Row {
  const StepSequence* sequence;
  int64_t position;
};

class CpuBackend : public Backend {
 public:
  CpuBackend(const gguf::File& file, const model::ModelConfig& config, const CpuBackendOptions& options,
             std::unique_ptr<ExpertGroup> experts)
      : file_(file), c_(config), options_(options), experts_(std::move(experts)), pool_(options.threads) {}

  absl::Status Init() {
    TANDEM_RETURN_IF_ERROR(CheckDeferExperts(c_, options_.defer_experts));
    TANDEM_ASSIGN_OR_RETURN(weights_, CpuWeights::Load(file_, c_, options_.precision, pool_));
    TANDEM_ASSIGN_OR_RETURN(cache_, LatentCache::Create(c_.num_hidden_layers, options_.page_count,
                                                        options_.page_tokens, c_.latent_dim()));
    if (c_.num_moe_layers() > 0 && experts_ == nullptr) {
      return absl::InvalidArgumentError("the model has MoE layers, but no expert process was given");
    }
    frequencies_ = model::RopeFrequencies(c_);
    scale_ = static_cast<float>(model::AttentionScale(c_));
    head_scratch_.resize(pool_.threads());
    return absl::OkStatus();
  }

  std::string name() const override { return "cpu"; }
  int32_t page_tokens() const override { return options_.page_tokens; }
  int32_t page_count() const override { return options_.page_count; }
  int32_t max_step_tokens() const override { return options_.max_step_tokens; }

  int64_t page_bytes() const override { return cache_.page_bytes(); }
  absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) override {
    TANDEM_RETURN_IF_ERROR(CheckPage(page, to.size()));
    cache_.CopyOut(page, to.data());
    return absl::OkStatus();
  }
  absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) override {
    TANDEM_RETURN_IF_ERROR(CheckPage(page, from.size()));
    cache_.CopyIn(from.data(), page);
    return absl::OkStatus();
  }

  absl::Status RecoverExperts(absl::Duration patience) override {
    return experts_ ? experts_->Recover(patience) : absl::OkStatus();
  }

  absl::Status Step(const StepBatch& batch, StepResult* result) override {
    TANDEM_RETURN_IF_ERROR(CheckStepTokens(batch, options_.max_step_tokens));
    n_ = static_cast<int64_t>(batch.tokens.size());
    *result = StepResult();
    LayOut(batch);
    Embed(batch);
    for (int64_t layer = 0; layer < c_.num_hidden_layers; ++layer) {
      Attention(layer);
      if (n_ == 0) break;
      TANDEM_RETURN_IF_ERROR(FeedForward(layer, batch.want_logits ? result : nullptr));
    }
    Output(batch, result);
    return absl::OkStatus();
  }

 private:
  absl::Status CheckPage(int32_t page, size_t bytes) const {
    if (page >= 0 && page < options_.page_count && static_cast<int64_t>(bytes) == page_bytes()) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("page ", page, " of ", options_.page_count, ", ", bytes, " bytes of ", page_bytes()));
  }

  void LayOut(const StepBatch& batch) {
    rows_.resize(n_);
    for (const StepSequence& s : batch.sequences) {
      for (int32_t i = 0; i < s.count; ++i) rows_[s.first + i] = {&s, int64_t{s.position} + i};
    }
    defers_.clear();
    if (options_.defer_experts > 0 && HasGeneratedTokens(batch)) {
      for (const Row& row : rows_) defers_.push_back(row.position >= row.sequence->generated_from ? 1 : 0);
    }
    wanted_.clear();
    if (batch.want_logits) {
      for (int64_t t = 0; t < n_; ++t) wanted_.push_back(t);
    } else {
      for (const StepSequence& s : batch.sequences) {
        if (s.sample) wanted_.push_back(s.first + s.count - 1);
      }
    }
    const int64_t pairs = c_.qk_rope_head_dim / 2;
    rope_.resize(n_ * pairs * 2);
    for (int64_t t = 0; t < n_; ++t) {
      for (int64_t i = 0; i < pairs; ++i) {
        const double angle = static_cast<float>(rows_[t].position) * frequencies_[i];
        rope_[(t * pairs + i) * 2] = static_cast<float>(std::cos(angle));
        rope_[(t * pairs + i) * 2 + 1] = static_cast<float>(std::sin(angle));
      }
    }
  }

  void Embed(const StepBatch& batch) {
    const int64_t hidden = c_.hidden_size;
    x_.resize(n_ * hidden);
    normed_.resize(n_ * hidden);
    for (int64_t t = 0; t < n_; ++t) {
      const uint8_t* row = weights_.embedding.data + batch.tokens[t] * weights_.embedding.row_bytes;
      quant::Dequantize(weights_.embedding_type, row, x_.data() + t * hidden, hidden);
    }
  }

  // Rotates the interleaved pairs of v[0, rope) by token t's angles.
  void Rotate(float* v, int64_t t) const {
    const int64_t pairs = c_.qk_rope_head_dim / 2;
    const float* cs = rope_.data() + t * pairs * 2;
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = v[2 * i], b = v[2 * i + 1], cos = cs[2 * i], sin = cs[2 * i + 1];
      v[2 * i] = a * cos - b * sin;
      v[2 * i + 1] = a * sin + b * cos;
    }
  }

  void NormRows(const float* x, const float* weight, int64_t width, float* y) {
    ForTokens([&](int64_t t) {
      kernels::RmsNorm(x + t * width, weight, static_cast<float>(c_.rms_norm_eps), y + t * width, width);
    });
  }

  // Calls fn(t) for every token; in parallel where there are enough of them to be worth it.
  template <typename Fn>
  void ForTokens(const Fn& fn) {
    if (n_ < 8) {
      for (int64_t t = 0; t < n_; ++t) fn(t);
      return;
    }
    pool_.ParallelFor(n_, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) fn(t);
    });
  }

  void Prepare(Activations& acts, const float* x, int64_t cols, std::initializer_list<Product> products) {
    acts.Assign(x, n_, cols);
    for (const Product& p : products) {
      if (!acts.Reserve(p.w->type, options_.precision)) continue;
      if (n_ < 8) {
        acts.PrepareTokens(p.w->type, 0, n_);
      } else {
        pool_.ParallelFor(
            n_, 4, [&](int64_t begin, int64_t end, int) { acts.PrepareTokens(p.w->type, begin, end); });
      }
    }
  }

  // All products in one parallel loop, shared out in passes of the kernels; what a chunk reads first is asked
  // for while the one before it is worked on.
  void Run(const Activations& acts, std::initializer_list<Product> products) {
    struct Part {
      const Product* p;
      int64_t first_chunk, rows;
    };
    Part parts[4];
    int count = 0;
    int64_t chunks = 0;
    for (const Product& p : products) {
      // At least 32 KB of weights, so that small matrices are not shared out for nothing.
      const int64_t least = std::max<int64_t>(32, kernels::PassRows(n_));
      const int64_t rows = std::clamp<int64_t>(32768 / p.w->row_bytes / least * least, least, 256);
      parts[count++] = {&p, chunks, rows};
      chunks += (p.w->rows + rows - 1) / rows;
    }
    const auto part_of = [&](int64_t chunk) -> const Part& {
      int i = count - 1;
      while (parts[i].first_chunk > chunk) --i;
      return parts[i];
    };
    claims_.Reset(chunks);
    pool_.ParallelFor(std::min<int64_t>(chunks, pool_.threads()), 1, [&](int64_t, int64_t, int worker) {
      claims_.Run(worker, [&](int64_t chunk, bool asked, int64_t next_chunk) {
        const Part& part = part_of(chunk);
        const Product& p = *part.p;
        const int64_t row = (chunk - part.first_chunk) * part.rows;
        kernels::Flow flow{{}, asked};
        if (next_chunk >= 0) {
          const Part& next = part_of(next_chunk);
          flow.next = {next.p->w, (next_chunk - next.first_chunk) * next.rows, next.p->w->rows, n_};
        }
        kernels::MatMul(*p.w, row, std::min(p.w->rows, row + part.rows), acts, p.y, p.ldy, options_.precision,
                        flow);
      });
    });
  }

  void PrepareAndRun(const float* x, int64_t cols, std::initializer_list<Product> products) {
    Prepare(acts_, x, cols, products);
    Run(acts_, products);
  }

  // For heads [first, first + count) and n tokens: y[t, h, :] = w[h] x[t, h, :]. x and y are those of the
  // first head; strides are in floats between heads and between tokens.
  void PerHead(const std::vector<Matrix>& w, int64_t first, int64_t count, int64_t n, const float* x,
               int64_t x_head, int64_t x_stride, float* y, int64_t y_head, int64_t y_stride,
               Activations& acts) {
    for (int64_t h = 0; h < count; ++h) {
      const Matrix& m = w[first + h];
      acts.Assign(x + h * x_head, n, m.cols, x_stride);
      acts.Prepare(m.type, options_.precision);
      kernels::Flow flow{{}, h > 0};
      if (h + 1 < count) flow.next = {&w[first + h + 1], 0, m.rows, n};
      kernels::MatMul(m, 0, m.rows, acts, y + h * y_head, y_stride, options_.precision, flow);
    }
  }

  // What one worker needs for its heads and tokens.
  struct HeadScratch {
    Activations acts;
    std::vector<float> query;    // [tokens, heads, kv_lora + rope]
    std::vector<float> latents;  // [tokens, heads, kv_lora]
    MlaScratch mla;
  };

  // From q_ to attended_ for heads [head, head + count) of token rows [begin, end): the query is taken into
  // the latents' space by k_b, attends, and the result is taken out of it by v_b. All in one go, since what
  // lies between is ten times the size of what comes in and would not stay in the caches.
  void AttendHeads(int64_t layer, int64_t begin, int64_t end, int64_t head, int64_t count, HeadScratch& s) {
    const CpuLayer& w = weights_.layers[layer];
    const int64_t heads = c_.num_attention_heads, lora = c_.kv_lora_rank, width = c_.latent_dim();
    const int64_t nope = c_.qk_nope_head_dim, rope = c_.qk_rope_head_dim, qk = c_.qk_head_dim();
    const int64_t v = c_.v_head_dim, n = end - begin;
    s.query.resize(n * count * width);
    s.latents.resize(n * count * lora);
    float* q = q_.data() + (begin * heads + head) * qk;
    for (int64_t t = 0; t < n; ++t) {
      float* row = q + t * heads * qk;
      for (int64_t i = 0; i < count * qk; ++i) row[i] *= scale_;
      for (int64_t h = 0; h < count; ++h) {
        float* q_rope = row + h * qk + nope;
        Rotate(q_rope, begin + t);
        std::memcpy(s.query.data() + (t * count + h) * width + lora, q_rope, rope * sizeof(float));
      }
    }
    PerHead(w.k_b, head, count, n, q, qk, heads * qk, s.query.data(), width, count * width, s.acts);
    for (int64_t t = 0; t < n;) {  // runs of one sequence
      const Row& row = rows_[begin + t];
      int64_t run = 1;
      while (t + run < n && rows_[begin + t + run].sequence == row.sequence) ++run;
      MlaAttend(cache_, layer, row.sequence->pages, row.position, run, count, lora,
                s.query.data() + t * count * width, s.latents.data() + t * count * lora, s.mla);
      t += run;
    }
    PerHead(w.v_b, head, count, n, s.latents.data(), lora, count * lora,
            attended_.data() + (begin * heads + head) * v, v, heads * v, s.acts);
  }

  // From kv_ to the cache.
  void StoreLatents(int64_t layer) {
    const int64_t lora = c_.kv_lora_rank, rope = c_.qk_rope_head_dim;
    ForTokens([&](int64_t t) {
      float* entry = cache_.Entry(layer, rows_[t].sequence->pages, rows_[t].position);
      float* kv = kv_.data() + t * c_.latent_dim();
      kernels::RmsNorm(kv, weights_.layers[layer].kv_a_norm, static_cast<float>(c_.rms_norm_eps), entry,
                       lora);
      Rotate(kv + lora, t);
      std::memcpy(entry + lora, kv + lora, rope * sizeof(float));
    });
  }

  // Of the last layer's results only those are needed that logits come from: the other tokens end here, with
  // their latents in the cache.
  void KeepWanted(int64_t layer) {
    const auto keep = [this](auto& values, int64_t each) {
      std::remove_reference_t<decltype(values)> kept;
      for (int64_t t : wanted_)
        kept.insert(kept.end(), values.begin() + t * each, values.begin() + (t + 1) * each);
      std::copy(kept.begin(), kept.end(), values.begin());
    };
    keep(x_, c_.hidden_size);
    keep(normed_, c_.hidden_size);
    keep(rope_, c_.qk_rope_head_dim);
    keep(rows_, 1);
    if (Defers(layer - 1)) keep(deferred_, c_.hidden_size);
    if (!defers_.empty()) keep(defers_, 1);
    n_ = static_cast<int64_t>(wanted_.size());
    for (int64_t t = 0; t < n_; ++t) wanted_[t] = t;
  }

  // x += attention(norm(x))
  void Attention(int64_t layer) {
    const CpuLayer& w = weights_.layers[layer];
    const int64_t hidden = c_.hidden_size, heads = c_.num_attention_heads;
    const int64_t qk = c_.qk_head_dim(), width = c_.latent_dim(), v = c_.v_head_dim;
    NormRows(x_.data(), w.attn_norm, hidden, normed_.data());

    q_.resize(n_ * heads * qk);
    kv_.resize(n_ * width);
    const bool compressed = c_.q_lora_rank > 0;
    if (compressed) q_a_.resize(n_ * c_.q_lora_rank);
    const Product query =
        compressed ? Product{&w.q_a, q_a_.data(), c_.q_lora_rank} : Product{&w.q, q_.data(), heads * qk};
    const Product latents = {&w.kv_a, kv_.data(), width};
    if (layer + 1 == c_.num_hidden_layers && static_cast<int64_t>(wanted_.size()) < n_) {
      PrepareAndRun(normed_.data(), hidden, {latents});
      StoreLatents(layer);
      KeepWanted(layer);
      if (n_ == 0) return;
      PrepareAndRun(normed_.data(), hidden, {query});
    } else {
      PrepareAndRun(normed_.data(), hidden, {query, latents});
      StoreLatents(layer);
    }
    if (compressed) {
      NormRows(q_a_.data(), w.q_a_norm, c_.q_lora_rank, q_a_.data());
      PrepareAndRun(q_a_.data(), c_.q_lora_rank, {{&w.q_b, q_.data(), heads * qk}});
    }

    attended_.resize(n_ * heads * v);
    // Blocks of tokens so large that decoding k_b and v_b for each of them costs little, heads as many as
    // keep a worker's rows within its cache and leave work for all.
    constexpr int64_t kTokens = 64, kRows = 128;
    const int64_t blocks = (n_ + kTokens - 1) / kTokens;
    const int64_t tokens = (n_ + blocks - 1) / blocks;
    const int64_t for_all = (2 * pool_.threads() + blocks - 1) / blocks;
    const int64_t groups = std::min(heads, std::max(for_all, tokens * heads / kRows));
    const int64_t per_group = (heads + groups - 1) / groups;
    pool_.ParallelFor(blocks * groups, 1, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / groups * tokens, head = i % groups * per_group;
        const int64_t count = std::min(per_group, heads - head);
        if (count > 0) {
          AttendHeads(layer, first, std::min(n_, first + tokens), head, count, head_scratch_[worker]);
        }
      }
    });

    delta_.resize(n_ * hidden);
    PrepareAndRun(attended_.data(), heads * v, {{&w.output, delta_.data(), hidden}});
    AddToX(delta_.data());
  }

  // x += ffn(norm(x)), dense or routed + shared experts
  absl::Status FeedForward(int64_t layer, StepResult* trace) {
    const CpuLayer& w = weights_.layers[layer];
    const int64_t hidden = c_.hidden_size;
    NormRows(x_.data(), w.ffn_norm, hidden, normed_.data());
    const bool moe = c_.IsMoe(layer), defers = Defers(layer);
    if (moe) {
      ChooseExperts(layer);
      if (trace != nullptr)
        trace->routing.push_back({static_cast<int32_t>(layer), expert_ids_, expert_weights_});
      if (defers) {
        split_.Assign(expert_ids_.data(), expert_weights_.data(), defers_, c_.num_experts_per_tok,
                      options_.defer_experts);
      }
      const auto& ids = defers ? split_.ids : expert_ids_;
      const auto& weights = defers ? split_.weights : expert_weights_;
      TANDEM_RETURN_IF_ERROR(experts_->Start(Call(layer, ids, weights)));
      routed_.resize(n_ * hidden);
      if (options_.experts_share_cpus) TANDEM_RETURN_IF_ERROR(experts_->Finish(routed_.data()));
    }
    if (w.has_ffn) {  // the dense layer, or the shared expert while the experts work
      const int64_t inner = w.ffn.gate.rows;
      gate_.resize(n_ * inner);
      up_.resize(n_ * inner);
      PrepareAndRun(normed_.data(), hidden,
                    {{&w.ffn.gate, gate_.data(), inner}, {&w.ffn.up, up_.data(), inner}});
      ForTokens([&](int64_t t) {
        kernels::SiluMul(gate_.data() + t * inner, up_.data() + t * inner, gate_.data() + t * inner, inner);
      });
      delta_.resize(n_ * hidden);
      PrepareAndRun(gate_.data(), inner, {{&w.ffn.down, delta_.data(), hidden}});
    }
    if (moe) {
      if (!options_.experts_share_cpus) TANDEM_RETURN_IF_ERROR(experts_->Finish(routed_.data()));
      AddToX(routed_.data());
    }
    if (w.has_ffn) AddToX(delta_.data());
    if (Defers(layer - 1)) AddDeferred();
    if (!defers) return absl::OkStatus();
    deferred_.resize(n_ * hidden);
    TANDEM_RETURN_IF_ERROR(experts_->Start(Call(layer, split_.later_ids, split_.later_weights)));
    return experts_->Finish(deferred_.data());
  }

  ExpertCall Call(int64_t layer, const std::vector<int32_t>& ids, const std::vector<float>& weights) const {
    return {static_cast<int32_t>(layer),
            static_cast<int32_t>(n_),
            static_cast<int32_t>(c_.num_experts_per_tok),
            ids.data(),
            weights.data(),
            normed_.data()};
  }

  // Whether a part of the layer's experts is added a layer later.
  bool Defers(int64_t layer) const {
    return !defers_.empty() && c_.IsMoe(layer) && layer + 1 < c_.num_hidden_layers;
  }

  // What the layer before has deferred.
  void AddDeferred() {
    const int64_t hidden = c_.hidden_size;
    for (int64_t t = 0; t < n_; ++t) {
      if (defers_[t] == 0) continue;
      kernels::Axpy(1.0f, deferred_.data() + t * hidden, x_.data() + t * hidden, hidden);
    }
  }

  void ChooseExperts(int64_t layer) {
    const CpuLayer& w = weights_.layers[layer];
    const int64_t experts = c_.n_routed_experts, k = c_.num_experts_per_tok;
    router_logits_.resize(n_ * experts);
    PrepareAndRun(normed_.data(), c_.hidden_size, {{&w.router, router_logits_.data(), experts}});
    expert_ids_.resize(n_ * k);
    expert_weights_.resize(n_ * k);
    router_scratch_.resize(2 * experts);
    for (int64_t t = 0; t < n_; ++t) {
      Route(c_, router_logits_.data() + t * experts, w.router_bias, expert_ids_.data() + t * k,
            expert_weights_.data() + t * k, router_scratch_.data());
    }
  }

  void AddToX(const float* delta) {
    const int64_t hidden = c_.hidden_size;
    ForTokens([&](int64_t t) { kernels::Axpy(1.0f, delta + t * hidden, x_.data() + t * hidden, hidden); });
  }

  // Logits of the rows that are asked for, and the tokens chosen from them.
  void Output(const StepBatch& batch, StepResult* result) {
    const int64_t hidden = c_.hidden_size, vocab = c_.vocab_size;
    result->sampled.resize(batch.sequences.size());
    if (wanted_.empty()) return;
    for (size_t i = 0; i < wanted_.size(); ++i) {
      kernels::RmsNorm(x_.data() + wanted_[i] * hidden, weights_.output_norm,
                       static_cast<float>(c_.rms_norm_eps), normed_.data() + i * hidden, hidden);
    }
    n_ = static_cast<int64_t>(wanted_.size());
    logits_.resize(n_ * vocab);
    PrepareAndRun(normed_.data(), hidden, {{&weights_.head, logits_.data(), vocab}});
    if (batch.want_logits) result->logits = logits_;

    std::vector<std::pair<size_t, int64_t>> draws;  // sequence, row of logits_
    int64_t row = 0;
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const StepSequence& s = batch.sequences[i];
      if (s.sample) draws.push_back({i, batch.want_logits ? s.first + s.count - 1 : row++});
    }
    pool_.ParallelFor(static_cast<int64_t>(draws.size()), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const StepSequence& s = batch.sequences[draws[i].first];
        result->sampled[draws[i].first] =
            Sample({logits_.data() + draws[i].second * vocab, static_cast<size_t>(vocab)}, *s.params,
                   s.position + s.count, *s.counts);
      }
    });
  }

  const gguf::File& file_;
  const model::ModelConfig c_;
  const CpuBackendOptions options_;
  std::unique_ptr<ExpertGroup> experts_;
  threading::ThreadPool pool_;
  threading::Claims claims_{pool_.threads()};
  CpuWeights weights_;
  LatentCache cache_;
  std::vector<float> frequencies_;
  float scale_ = 0;

  // The step in hand. [n, ...], rows in the order of StepBatch::tokens; in the last layer the wanted ones.
  int64_t n_ = 0;
  std::vector<Row> rows_;
  std::vector<int64_t> wanted_;        // rows whose logits are asked for
  std::vector<int32_t> defers_;        // [n], not 0: the token defers; empty: none does
  std::vector<float> rope_;            // [n, rope / 2, (cos, sin)]
  std::vector<float> x_, normed_;      // [n, hidden]
  std::vector<float> q_a_;             // [n, q_lora]
  std::vector<float> q_;               // [n, heads, qk]
  std::vector<float> kv_;              // [n, kv_lora + rope]
  std::vector<float> attended_;        // [n, heads, v]
  std::vector<float> delta_, routed_;  // [n, hidden]
  std::vector<float> gate_, up_;       // [n, inner]
  std::vector<float> router_logits_;   // [n, experts]
  std::vector<float> router_scratch_;
  std::vector<int32_t> expert_ids_;    // [n, k]
  std::vector<float> expert_weights_;  // [n, k]
  SplitRouting split_;                 // of a layer that defers
  std::vector<float> deferred_;        // [n, hidden], by the layer before
  std::vector<float> logits_;          // [rows asked for, vocab]
  Activations acts_;
  std::vector<HeadScratch> head_scratch_;  // a worker
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const gguf::File& file,
                                                          const model::ModelConfig& config,
                                                          const CpuBackendOptions& options,
                                                          std::unique_ptr<ExpertGroup> experts) {
  auto backend = std::make_unique<CpuBackend>(file, config, options, std::move(experts));
  TANDEM_RETURN_IF_ERROR(backend->Init());
  return backend;
}

}  // namespace tandem::attention
