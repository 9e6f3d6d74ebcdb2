#include "services/attention_gpu/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/weights.h"
#include "services/attention_gpu/backend/cuda/workspace.h"

namespace tandem::attention {
namespace {

using cuda::Activations;
using cuda::DeviceMatrix;
using cuda::ProductParams;
using cuda::ToStatus;

// Left free for the driver, the display and what else runs on the card.
constexpr uint64_t kReserve = uint64_t{400} << 20;

int64_t CacheBytesPerToken(const model::ModelConfig& c) {
  return c.num_hidden_layers * c.latent_dim() * static_cast<int64_t>(sizeof(uint16_t));
}

// Greedy, and nothing asked for that needs all logits on the host.
bool NeedsOnlyTheBest(const SamplingParams& p) {
  return (p.temperature == 0 || p.top_k == 1) && !p.logprobs && p.logit_bias.empty() &&
         p.presence_penalty == 0 && p.frequency_penalty == 0 && p.repetition_penalty == 1;
}

// One of several products of the same activations.
struct Product {
  const DeviceMatrix* w;
  float* y;
  int64_t y_column;
  bool accumulate = false;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const model::ModelConfig& config, const CudaBackendOptions& options,
              std::unique_ptr<ExpertGroup> experts)
      : c_(config), options_(options), experts_(std::move(experts)), work_(config, options.max_step_tokens) {}

  ~CudaBackend() override {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (routed_ready_ != nullptr) cudaEventDestroy(routed_ready_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  absl::Status Init(const gguf::File& file) {
    if (c_.num_moe_layers() > 0 && experts_ == nullptr) {
      return absl::InvalidArgumentError("the model has MoE layers, but no expert process was given");
    }
    TANDEM_RETURN_IF_ERROR(cuda::OpenDevice(options_.device).status());
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    TANDEM_RETURN_IF_ERROR(
        ToStatus(cudaEventCreateWithFlags(&routed_ready_, cudaEventDisableTiming), "an event"));
    {
      threading::ThreadPool pool(options_.threads);
      TANDEM_ASSIGN_OR_RETURN(weights_, cuda::DeviceWeights::Load(file, c_, pool));
    }
    cache_memory_.Want(&cache_, CacheValues());
    TANDEM_RETURN_IF_ERROR(cache_memory_.Allocate("the KV cache"));
    TANDEM_RETURN_IF_ERROR(work_.Allocate());
    frequencies_ = model::RopeFrequencies(c_);
    scale_ = static_cast<float>(model::AttentionScale(c_));
    return absl::OkStatus();
  }

  std::string name() const override { return "cuda"; }
  int32_t page_tokens() const override { return options_.page_tokens; }
  int32_t page_count() const override { return options_.page_count; }
  int32_t max_step_tokens() const override { return options_.max_step_tokens; }

  absl::Status RecoverExperts(absl::Duration patience) override {
    return experts_ ? experts_->Recover(patience) : absl::OkStatus();
  }

  absl::Status Step(const StepBatch& batch, StepResult* result) override {
    const auto n = static_cast<int64_t>(batch.tokens.size());
    if (n > options_.max_step_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("a step of ", n, " tokens, the limit is ", options_.max_step_tokens));
    }
    *result = StepResult();
    // The caller's thread may be another one than Init's.
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    const absl::Status status = Compute(batch, result);
    // Whatever is still on its way uses the buffers of this step.
    const absl::Status drained = ToStatus(cudaStreamSynchronize(stream_), "a step on the GPU");
    return status.ok() ? drained : status;
  }

  int64_t page_bytes() const override { return int64_t{options_.page_tokens} * CacheBytesPerToken(c_); }

  absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) override {
    return CopyPage(page, to.data(), PageRow(), LayerOf(page), CachePitch(), to.size(),
                    cudaMemcpyDeviceToHost);
  }

  absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) override {
    return CopyPage(page, LayerOf(page), CachePitch(), from.data(), PageRow(), from.size(),
                    cudaMemcpyHostToDevice);
  }

 private:
  // The cache: [layers][pages][page_tokens][lora + rope].
  int64_t LayerValues() const {
    return int64_t{options_.page_count} * options_.page_tokens * c_.latent_dim();
  }
  int64_t CacheValues() const { return LayerValues() * c_.num_hidden_layers; }
  uint16_t* Cache(int64_t layer) const { return cache_ + layer * LayerValues(); }
  size_t CachePitch() const { return LayerValues() * sizeof(uint16_t); }
  size_t PageRow() const { return options_.page_tokens * c_.latent_dim() * sizeof(uint16_t); }
  uint16_t* LayerOf(int32_t page) const {
    return cache_ + int64_t{page} * options_.page_tokens * c_.latent_dim();
  }

  // A page's rows, one a layer, between host memory without gaps and the cache.
  absl::Status CopyPage(int32_t page, void* to, size_t to_pitch, const void* from, size_t from_pitch,
                        size_t size, cudaMemcpyKind kind) {
    if (page < 0 || page >= options_.page_count || static_cast<int64_t>(size) != page_bytes()) {
      return absl::InvalidArgumentError(absl::StrCat("page ", page, " of ", options_.page_count, ", ", size,
                                                     " bytes where ", page_bytes(), " are a page"));
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    TANDEM_RETURN_IF_ERROR(ToStatus(
        cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, PageRow(), c_.num_hidden_layers, kind, stream_),
        "copying a page"));
    return ToStatus(cudaStreamSynchronize(stream_), "copying a page");
  }

  bool Small(int64_t columns) const { return columns <= cuda::kMaxColumns; }

  absl::Status Compute(const StepBatch& batch, StepResult* result) {
    if (batch.tokens.empty()) {
      result->sampled.resize(batch.sequences.size());
      return absl::OkStatus();
    }
    TANDEM_RETURN_IF_ERROR(work_.LayOut(batch, frequencies_, options_.page_tokens, stream_));
    TANDEM_RETURN_IF_ERROR(ToStatus(
        cuda::LaunchEmbed({weights_->embedding, work_.tokens, work_.x, work_.n}, stream_), "embedding"));
    for (int64_t layer = 0; layer < c_.num_hidden_layers; ++layer) {
      TANDEM_RETURN_IF_ERROR(Attention(layer));
      TANDEM_RETURN_IF_ERROR(FeedForward(layer, batch.want_logits ? result : nullptr));
    }
    return Output(batch, result);
  }

  // y = norm(x), [rows, cols] without gaps. With few columns the int8 form is made in the same pass and
  // returned.
  absl::StatusOr<Activations> Norm(const float* x, int64_t x_stride, const int32_t* row_ids,
                                   const float* weight, float* y, int64_t rows, int64_t cols) {
    cuda::RmsNormParams p;
    p.x = x;
    p.x_stride = x_stride;
    p.row_ids = row_ids;
    p.weight = weight;
    p.eps = static_cast<float>(c_.rms_norm_eps);
    p.y = y;
    p.rows = rows;
    p.cols = cols;
    Activations a;
    a.x = y;
    a.x_stride = a.cols = cols;
    if (Small(rows)) {
      a.q = p.q = work_.form_q;
      a.q_meta = p.q_meta = work_.form_q_meta;
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cuda::LaunchRmsNorm(p, stream_), "a norm"));
    if (!Small(rows)) TANDEM_RETURN_IF_ERROR(MakeForm(a, rows, false));
    return a;
  }

  // The form of `rows` vectors of a.x that products with quantized weights read.
  absl::Status MakeForm(Activations& a, int64_t rows, bool small, int64_t heads = 1) {
    cuda::QuantizeParams p;
    p.x = a.x;
    p.x_stride = a.x_stride;
    p.rows = rows;
    p.cols = a.cols;
    p.heads = heads;
    if (small) {
      a.q = p.q = work_.form_q;
      a.q_meta = p.q_meta = work_.form_q_meta;
      return ToStatus(cuda::LaunchQuantize(p, stream_), "activations");
    }
    a.h = p.h = work_.form_h;
    a.h_scale = p.h_scale = work_.form_h_scale;
    return ToStatus(cuda::LaunchToHalf(p, stream_), "activations");
  }

  absl::Status Run(const ProductParams& p) {
    const bool small = Small(p.columns) || p.w.type == cuda::kF32;
    return ToStatus(small ? cuda::LaunchMatVec(p, stream_) : cuda::LaunchMatMul(p, stream_), "a product");
  }

  absl::Status Run(const Activations& a, int64_t columns, std::initializer_list<Product> products) {
    for (const Product& one : products) {
      ProductParams p;
      p.w = *one.w;
      p.x = a;
      p.y = one.y;
      p.y_column = one.y_column;
      p.columns = static_cast<int32_t>(columns);
      p.accumulate = one.accumulate;
      TANDEM_RETURN_IF_ERROR(Run(p));
    }
    return absl::OkStatus();
  }

  // For each head: y[t, h, :] = w[h] x[t, h, :]; the heads' vectors of x are x_head apart, those of y y_head.
  absl::Status PerHead(const DeviceMatrix& w, const float* x, int64_t x_head, float* y, int64_t y_head) {
    const int64_t heads = c_.num_attention_heads;
    Activations a;
    a.x = x;
    a.x_stride = x_head;
    a.cols = w.cols;
    const bool small = Small(work_.n);
    const bool form = small ? !cuda::IsFloatType(w.type) : w.type != cuda::kF32;
    if (form) TANDEM_RETURN_IF_ERROR(MakeForm(a, work_.n * heads, small, heads));
    ProductParams p;
    p.w = w;
    p.x = a;
    p.x_batch = 1;
    p.x_column = heads;
    p.y = y;
    p.y_batch = y_head;
    p.y_column = heads * y_head;
    p.columns = static_cast<int32_t>(work_.n);
    p.batches = static_cast<int32_t>(heads);
    return Run(p);
  }

  // x += attention(norm(x))
  absl::Status Attention(int64_t layer) {
    const cuda::DeviceLayer& w = weights_->layers[layer];
    const int64_t n = work_.n, hidden = c_.hidden_size, heads = c_.num_attention_heads;
    const int64_t width = c_.latent_dim(), qk = c_.qk_head_dim();
    const auto lora = static_cast<int32_t>(c_.kv_lora_rank), rope = static_cast<int32_t>(c_.qk_rope_head_dim);
    TANDEM_ASSIGN_OR_RETURN(Activations a,
                            Norm(work_.x, hidden, nullptr, w.attn_norm, work_.normed, n, hidden));
    if (c_.q_lora_rank > 0) {
      TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.q_a, work_.q_a, c_.q_lora_rank}, {&w.kv_a, work_.kv, width}}));
      TANDEM_ASSIGN_OR_RETURN(
          a, Norm(work_.q_a, c_.q_lora_rank, nullptr, w.q_a_norm, work_.q_a, n, c_.q_lora_rank));
      TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.q_b, work_.q, heads * qk}}));
    } else {
      TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.q, work_.q, heads * qk}, {&w.kv_a, work_.kv, width}}));
    }

    cuda::CacheWriteParams write;
    write.rows = work_.rows;
    write.kv = work_.kv;
    write.weight = w.kv_a_norm;
    write.eps = static_cast<float>(c_.rms_norm_eps);
    write.cache = Cache(layer);
    write.n = n;
    write.lora = lora;
    write.rope = rope;
    TANDEM_RETURN_IF_ERROR(ToStatus(cuda::LaunchCacheWrite(write, stream_), "the KV cache"));

    TANDEM_RETURN_IF_ERROR(PerHead(w.k_b, work_.q, qk, work_.latents, lora));
    cuda::QueryParams query;
    query.rows = work_.rows;
    query.absorbed = work_.latents;
    query.q = work_.q;
    query.scale = scale_;
    query.out = work_.query;
    query.n = n;
    query.heads = static_cast<int32_t>(heads);
    query.lora = lora;
    query.nope = static_cast<int32_t>(c_.qk_nope_head_dim);
    query.rope = rope;
    TANDEM_RETURN_IF_ERROR(ToStatus(cuda::LaunchQuery(query, stream_), "the query"));
    for (const cuda::AttentionRange& range : work_.ranges) TANDEM_RETURN_IF_ERROR(Attend(layer, range));

    TANDEM_RETURN_IF_ERROR(PerHead(w.v_b, work_.latents, lora, work_.attended, c_.v_head_dim));
    Activations out;
    out.x = work_.attended;
    out.x_stride = out.cols = heads * c_.v_head_dim;
    TANDEM_RETURN_IF_ERROR(MakeForm(out, n, Small(n)));
    return Run(out, n, {{&w.output, work_.x, hidden, /*accumulate=*/true}});
  }

  absl::Status Attend(int64_t layer, const cuda::AttentionRange& range) {
    const int64_t heads = c_.num_attention_heads, lora = c_.kv_lora_rank;
    cuda::AttentionParams p;
    p.rows = work_.rows;
    p.rows.position += range.first;
    p.rows.first_page += range.first;
    p.splits = work_.splits + range.first;
    p.first_partial = work_.first_partial + range.first;
    p.query = work_.query + range.first * heads * c_.latent_dim();
    p.cache = Cache(layer);
    p.out = work_.latents + range.first * heads * lora;
    p.partial = work_.partial;
    p.partial_state = work_.partial_state;
    p.n = range.count;
    p.heads = static_cast<int32_t>(heads);
    p.lora = static_cast<int32_t>(lora);
    p.rope = static_cast<int32_t>(c_.qk_rope_head_dim);
    p.most_splits = range.most_splits;
    return ToStatus(cuda::LaunchAttention(p, stream_), "attention");
  }

  // x += ffn(norm(x)), dense or routed + shared experts
  absl::Status FeedForward(int64_t layer, StepResult* trace) {
    const cuda::DeviceLayer& w = weights_->layers[layer];
    const int64_t n = work_.n, hidden = c_.hidden_size;
    TANDEM_ASSIGN_OR_RETURN(const Activations a,
                            Norm(work_.x, hidden, nullptr, w.ffn_norm, work_.normed, n, hidden));
    const bool moe = c_.IsMoe(layer);
    if (moe) TANDEM_RETURN_IF_ERROR(ChooseExperts(w, a));
    if (w.has_ffn) {  // the dense layer, or the shared expert while the experts work
      const int64_t inner = w.ffn.gate.rows;
      TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.ffn.gate, work_.gate, inner}, {&w.ffn.up, work_.up, inner}}));
      cuda::SiluMulParams p;
      p.gate = work_.gate;
      p.up = work_.up;
      p.y = work_.gate;
      p.rows = n;
      p.cols = inner;
      Activations middle;
      middle.x = work_.gate;
      middle.x_stride = middle.cols = inner;
      if (Small(n)) {
        middle.q = p.q = work_.form_q;
        middle.q_meta = p.q_meta = work_.form_q_meta;
      }
      TANDEM_RETURN_IF_ERROR(ToStatus(cuda::LaunchSiluMul(p, stream_), "the FFN"));
      if (!Small(n)) TANDEM_RETURN_IF_ERROR(MakeForm(middle, n, false));
      TANDEM_RETURN_IF_ERROR(Run(middle, n, {{&w.ffn.down, work_.x, hidden, /*accumulate=*/true}}));
    }
    return moe ? AskExperts(layer, trace) : absl::OkStatus();
  }

  // Routes, and sends what the experts need to the host.
  absl::Status ChooseExperts(const cuda::DeviceLayer& w, const Activations& a) {
    const int64_t n = work_.n, k = c_.num_experts_per_tok;
    TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.router, work_.router_logits, c_.n_routed_experts}}));
    cuda::RouteParams p;
    p.logits = work_.router_logits;
    p.bias = w.router_bias;
    p.ids = work_.expert_ids;
    p.weights = work_.expert_weights;
    p.n = n;
    p.experts = static_cast<int32_t>(c_.n_routed_experts);
    p.top_k = static_cast<int32_t>(k);
    p.groups = static_cast<int32_t>(c_.n_group);
    p.top_groups = static_cast<int32_t>(c_.topk_group);
    p.sigmoid = c_.scoring_func == model::ScoringFunc::kSigmoid;
    p.normalize = c_.norm_topk_prob;
    p.scale = static_cast<float>(c_.routed_scaling_factor);
    TANDEM_RETURN_IF_ERROR(ToStatus(cuda::LaunchRoute(p, stream_), "the router"));
    TANDEM_RETURN_IF_ERROR(ToHost(work_.host_expert_ids, work_.expert_ids, n * k));
    TANDEM_RETURN_IF_ERROR(ToHost(work_.host_expert_weights, work_.expert_weights, n * k));
    TANDEM_RETURN_IF_ERROR(ToHost(work_.host_normed, work_.normed, n * c_.hidden_size));
    return ToStatus(cudaEventRecord(routed_ready_, stream_), "the router");
  }

  absl::Status AskExperts(int64_t layer, StepResult* trace) {
    const int64_t n = work_.n, k = c_.num_experts_per_tok, values = n * c_.hidden_size;
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(routed_ready_), "the layers before the experts"));
    if (trace != nullptr) {
      trace->routing.push_back({static_cast<int32_t>(layer),
                                {work_.host_expert_ids, work_.host_expert_ids + n * k},
                                {work_.host_expert_weights, work_.host_expert_weights + n * k}});
    }
    const ExpertCall call{static_cast<int32_t>(layer), static_cast<int32_t>(n),   static_cast<int32_t>(k),
                          work_.host_expert_ids,       work_.host_expert_weights, work_.host_normed};
    TANDEM_RETURN_IF_ERROR(experts_->Start(call));
    // The copy of the layer before is done: the event above came after it on the stream.
    TANDEM_RETURN_IF_ERROR(experts_->Finish(work_.host_routed));
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaMemcpyAsync(work_.routed, work_.host_routed, values * sizeof(float),
                                                    cudaMemcpyHostToDevice, stream_),
                                    "the experts' answer"));
    return ToStatus(cuda::LaunchAdd(work_.x, work_.routed, values, stream_), "the experts' answer");
  }

  template <typename T>
  absl::Status ToHost(T* to, const T* from, int64_t count) {
    return ToStatus(cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToHost, stream_),
                    "copying to the host");
  }

  // Logits of the rows that are asked for, some at a time, and the tokens chosen from them.
  absl::Status Output(const StepBatch& batch, StepResult* result) {
    const int64_t hidden = c_.hidden_size, vocab = c_.vocab_size;
    const auto total = static_cast<int64_t>(work_.wanted.size());
    result->sampled.resize(batch.sequences.size());
    std::vector<size_t> sequence_of(work_.n, batch.sequences.size());  // by row; size(): none samples there
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const StepSequence& s = batch.sequences[i];
      if (s.sample) sequence_of[s.first + s.count - 1] = i;
    }
    if (batch.want_logits) result->logits.resize(total * vocab);
    for (int64_t at = 0; at < total; at += cuda::Workspace::kLogitsRows) {
      const int64_t count = std::min(cuda::Workspace::kLogitsRows, total - at);
      TANDEM_ASSIGN_OR_RETURN(const Activations a, Norm(work_.x, hidden, work_.wanted_rows + at,
                                                        weights_->output_norm, work_.normed, count, hidden));
      TANDEM_RETURN_IF_ERROR(Run(a, count, {{&weights_->head, work_.logits, vocab}}));
      TANDEM_RETURN_IF_ERROR(Choose(batch, sequence_of, at, count, result));
    }
    return absl::OkStatus();
  }

  // For the `count` wanted rows from `at` on, whose logits are computed: greedy choices are made on the GPU
  // and only ids come back; for all others the logits do, and Sample chooses.
  absl::Status Choose(const StepBatch& batch, const std::vector<size_t>& sequence_of, int64_t at,
                      int64_t count, StepResult* result) {
    const int64_t vocab = c_.vocab_size;
    bool all_logits = batch.want_logits;
    for (int64_t i = 0; i < count; ++i) {
      const size_t s = sequence_of[work_.wanted[at + i]];
      if (s < batch.sequences.size() && !NeedsOnlyTheBest(*batch.sequences[s].params)) all_logits = true;
    }
    if (all_logits) {
      TANDEM_RETURN_IF_ERROR(ToHost(work_.host_logits, work_.logits, count * vocab));
    } else {
      TANDEM_RETURN_IF_ERROR(
          ToStatus(cuda::LaunchArgmax({work_.logits, work_.best_tokens, count, vocab}, stream_),
                   "the likeliest token"));
      TANDEM_RETURN_IF_ERROR(ToHost(work_.host_best_tokens, work_.best_tokens, count));
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream_), "a step on the GPU"));
    for (int64_t i = 0; i < count; ++i) {
      float* logits = work_.host_logits + i * vocab;
      if (batch.want_logits) std::copy_n(logits, vocab, result->logits.data() + (at + i) * vocab);
      const size_t index = sequence_of[work_.wanted[at + i]];
      if (index == batch.sequences.size()) continue;
      const StepSequence& s = batch.sequences[index];
      if (all_logits) {
        result->sampled[index] =
            Sample({logits, static_cast<size_t>(vocab)}, *s.params, s.position + s.count, *s.counts);
      } else {
        result->sampled[index].token = work_.host_best_tokens[i];
      }
    }
    return absl::OkStatus();
  }

  const model::ModelConfig c_;
  const CudaBackendOptions options_;
  std::unique_ptr<ExpertGroup> experts_;
  std::unique_ptr<cuda::DeviceWeights> weights_;
  cuda::Arena cache_memory_{cuda::Arena::Kind::kDevice};
  uint16_t* cache_ = nullptr;
  cuda::Workspace work_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t routed_ready_ = nullptr;
  std::vector<float> frequencies_;
  float scale_ = 0;
};

absl::Status CheckShape(const model::ModelConfig& c, const CudaBackendOptions& o) {
  auto refuse = [](const auto&... text) {
    return absl::UnimplementedError(absl::StrCat(text..., " (--gpu none computes on the CPU)"));
  };
  if (!cuda::AttentionSupports(static_cast<int32_t>(c.kv_lora_rank),
                               static_cast<int32_t>(c.qk_rope_head_dim))) {
    return refuse("the CUDA backend has no attention for kv_lora_rank ", c.kv_lora_rank, " and rope ",
                  c.qk_rope_head_dim, ", only for 512 and 64, 256 and 32");
  }
  if (c.n_routed_experts > 1024) {
    return refuse("the CUDA backend routes to 1024 experts at most, not ", c.n_routed_experts);
  }
  if (o.page_tokens % cuda::kAttentionTile != 0) {
    return absl::InvalidArgumentError(absl::StrCat("pages of ", o.page_tokens,
                                                   " tokens; the CUDA backend needs ", "a multiple of ",
                                                   cuda::kAttentionTile));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CudaPlan> PlanCuda(const gguf::File& file, const model::ModelConfig& c,
                                  const CudaBackendOptions& o) {
  TANDEM_ASSIGN_OR_RETURN(const cuda::Device device, cuda::OpenDevice(o.device));
  TANDEM_RETURN_IF_ERROR(CheckShape(c, o));
  CudaPlan plan;
  plan.gpu = absl::StrCat(device.name, " (", device.major, ".", device.minor, ")");
  TANDEM_ASSIGN_OR_RETURN(plan.weights, cuda::DeviceWeights::Plan(file, c));
  const int64_t token_bytes = CacheBytesPerToken(c);
  const auto cache = CheckedMul<int64_t>(token_bytes, int64_t{o.page_count} * o.page_tokens);
  if (!cache) return absl::InvalidArgumentError("the KV cache's size is out of range");
  plan.cache = static_cast<uint64_t>(*cache);
  plan.workspace = cuda::Workspace(c, o.max_step_tokens).bytes();
  plan.available = device.free_bytes > kReserve ? device.free_bytes - kReserve : 0;
  if (o.vram_limit > 0) plan.available = std::min(plan.available, o.vram_limit);
  if (plan.total() <= plan.available) return plan;
  const uint64_t fixed = plan.weights + plan.workspace;
  std::string advice = "the weights alone do not fit";
  if (fixed < plan.available) {
    advice = absl::StrCat("a KV cache of ", (plan.available - fixed) / token_bytes,
                          " tokens would fit (--kv-tokens)");
  }
  return absl::ResourceExhaustedError(absl::StrCat("not enough GPU memory: ", plan.ToString(), "; ", advice));
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const gguf::File& file,
                                                           const model::ModelConfig& config,
                                                           const CudaBackendOptions& options,
                                                           std::unique_ptr<ExpertGroup> experts) {
  TANDEM_RETURN_IF_ERROR(CheckShape(config, options));
  TANDEM_RETURN_IF_ERROR(cuda::DeviceWeights::Plan(file, config).status());  // shapes without a kernel
  auto backend = std::make_unique<CudaBackend>(config, options, std::move(experts));
  TANDEM_RETURN_IF_ERROR(backend->Init(file));
  return backend;
}

}  // namespace tandem::attention
