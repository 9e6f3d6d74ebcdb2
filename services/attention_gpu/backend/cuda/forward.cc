#include "services/attention_gpu/backend/cuda/forward.h"

#include <algorithm>
#include <array>

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/device.h"

namespace tandem::attention::cuda {

Forward::Forward(const model::ModelConfig& config, const DeviceWeights& weights, const LatentCache& cache,
                 Workspace& work)
    : c_(config),
      weights_(weights),
      cache_(cache),
      work_(work),
      scale_(static_cast<float>(model::AttentionScale(config))) {
  // Of float32 weights there are no products with float16 activations or results.
  for (const DeviceLayer& l : weights.layers) {
    const DeviceMatrix& q = config.q_lora_rank > 0 ? l.q_b : l.q;
    if (q.type == kF32 || l.v_b.type == kF32 || l.output.type == kF32) work_.expand = false;
  }
}

// f for all rows of the step, up to `rows` at a time.
template <typename F>
absl::Status Forward::ForPieces(int64_t rows, const F& f) const {
  for (int64_t at = 0; at < work_.n; at += rows) {
    TANDEM_RETURN_IF_ERROR(f(Piece{at, std::min(rows, work_.n - at)}));
  }
  return absl::OkStatus();
}

absl::Status Forward::Layers(RoutedExperts* experts, int32_t defer, cudaStream_t stream) {
  stream_ = stream;
  formed_.reset();
  few_ = Small(work_.n) && work_.blocks.size() == 1 && !work_.blocks[0].expanded;
  factors_ = few_ && experts != nullptr && experts->TakesFactors();
  TANDEM_RETURN_IF_ERROR(work_.Fetch(stream_));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(LaunchEmbed({weights_.embedding, work_.tokens, work_.x, work_.n}, stream_), "embedding"));
  for (int64_t layer = 0; layer < c_.num_hidden_layers; ++layer) {
    for (const AttentionBlock& block : work_.blocks) {
      TANDEM_RETURN_IF_ERROR(block.expanded ? ExpandedAttention(layer, block)
                                            : Attention(layer, {block.first, block.count}));
    }
    TANDEM_RETURN_IF_ERROR(FeedForward(layer, experts, defer));
  }
  return absl::OkStatus();
}

absl::Status Forward::Logits(int64_t first, int64_t count, cudaStream_t stream) {
  stream_ = stream;
  TANDEM_ASSIGN_OR_RETURN(const Activations a,
                          Norm(work_.x, c_.hidden_size, work_.wanted_rows + first, weights_.output_norm,
                               work_.normed, count, c_.hidden_size));
  return Run(a, count, {{&weights_.head, work_.logits, c_.vocab_size}});
}

NormFormParams Forward::FormOf(const float* x, int64_t x_stride, const int32_t* row_ids, const float* weight,
                               float* y, int64_t rows, int64_t cols) const {
  NormFormParams p;
  p.x = x;
  p.x_stride = x_stride;
  p.row_ids = row_ids;
  p.weight = weight;
  p.y = y;
  p.q = work_.form_q;
  p.q_meta = work_.form_q_meta;
  p.squares = work_.squares;
  p.rows = rows;
  p.cols = cols;
  return p;
}

// What LaunchNormForm leaves to products.
Activations Forward::Formed(const NormFormParams& p) const {
  Activations a;
  a.x = p.y;
  a.x_stride = a.cols = p.cols;
  a.q = p.q;
  a.q_meta = p.q_meta;
  a.factors = {p.squares, static_cast<int32_t>(p.cols / 32), static_cast<float>(c_.rms_norm_eps)};
  return a;
}

absl::StatusOr<Activations> Forward::Norm(const float* x, int64_t x_stride, const int32_t* row_ids,
                                          const float* weight, float* y, int64_t rows, int64_t cols,
                                          bool whole) {
  if (Small(rows) && !whole) {
    const NormFormParams p = FormOf(x, x_stride, row_ids, weight, y, rows, cols);
    TANDEM_RETURN_IF_ERROR(ToStatus(LaunchNormForm(p, stream_), "a norm"));
    return Formed(p);
  }
  RmsNormParams p;
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
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchRmsNorm(p, stream_), "a norm"));
  TANDEM_RETURN_IF_ERROR(MakeForm(a, rows, Small(rows)));
  return a;
}

// The norm of rows of the hidden size, which may be there already.
absl::StatusOr<Activations> Forward::NormOnce(const float* x, const float* weight, float* y, int64_t rows,
                                              bool whole) {
  if (!formed_.has_value()) return Norm(x, c_.hidden_size, nullptr, weight, y, rows, c_.hidden_size, whole);
  const Activations a = *formed_;
  formed_.reset();
  return a;
}

// The form of `rows` vectors of a.x that products with quantized weights read.
absl::Status Forward::MakeForm(Activations& a, int64_t rows, bool small, int64_t heads) {
  QuantizeParams p;
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.rows = rows;
  p.cols = a.cols;
  p.heads = heads;
  if (small) {
    a.q = p.q = work_.form_q;
    a.q_meta = p.q_meta = work_.form_q_meta;
    return ToStatus(LaunchQuantize(p, stream_), "activations");
  }
  a.h = p.h = work_.form_h;
  a.h_scale = p.h_scale = work_.form_h_scale;
  return ToStatus(LaunchToHalf(p, stream_), "activations");
}

absl::Status Forward::Run(const ProductParams& p) {
  const bool small = Small(p.columns) || p.w.type == kF32;
  return ToStatus(small ? LaunchMatVec(p, stream_) : LaunchMatMul(p, stream_), "a product");
}

absl::Status Forward::Run(const Activations& a, int64_t columns, std::initializer_list<Product> products) {
  std::array<ProductParams, 2> params;
  int count = 0;
  for (const Product& one : products) {
    ProductParams& p = params[count++];
    p.w = *one.w;
    p.x = a;
    p.y = one.y;
    p.y_column = one.y_column;
    p.columns = static_cast<int32_t>(columns);
    p.accumulate = one.accumulate;
  }
  if (Small(columns)) return ToStatus(LaunchMatVecs(params.data(), count, stream_), "a product");
  for (int i = 0; i < count; ++i) TANDEM_RETURN_IF_ERROR(Run(params[i]));
  return absl::OkStatus();
}

ProductParams Forward::Single(const DeviceMatrix& w, const Activations& a, int64_t columns, float* y) const {
  ProductParams p;
  p.w = w;
  p.x = a;
  p.y = y;
  p.y_column = w.rows;
  p.columns = static_cast<int32_t>(columns);
  return p;
}

bool Forward::MakesForm(ProductParams& p, ResultForm form, Activations& results) const {
  if (!Small(p.columns) || !CanForm(p)) return false;
  const bool other = p.x.q != work_.result_q;
  results.q = form.q = other ? work_.result_q : work_.form_q;
  results.q_meta = form.q_meta = other ? work_.result_q_meta : work_.form_q_meta;
  p.form = form;
  return true;
}

// For each head: y[t, h, :] = w[h] x[t, h, :]; the heads' vectors of x are a.x_stride apart, those of y
// y_head.
absl::StatusOr<ProductParams> Forward::PerHead(const DeviceMatrix& w, int64_t n, Activations a, float* y,
                                               int64_t y_head) {
  const int64_t heads = c_.num_attention_heads;
  a.cols = w.cols;
  const bool small = Small(n);
  const bool form = small ? !IsFloatType(w.type) : w.type != kF32;
  if (form && a.q == nullptr) TANDEM_RETURN_IF_ERROR(MakeForm(a, n * heads, small, heads));
  ProductParams p;
  p.w = w;
  p.x = a;
  p.x_batch = 1;
  p.x_column = heads;
  p.y = y;
  p.y_batch = y_head;
  p.y_column = heads * y_head;
  p.columns = static_cast<int32_t>(n);
  p.batches = static_cast<int32_t>(heads);
  return p;
}

// x += attention(norm(x))
absl::Status Forward::Attention(int64_t layer, const Piece& piece) {
  const DeviceLayer& w = weights_.layers[layer];
  const int64_t n = piece.n, hidden = c_.hidden_size, heads = c_.num_attention_heads;
  const int64_t width = c_.latent_dim(), qk = c_.qk_head_dim();
  const auto lora = static_cast<int32_t>(c_.kv_lora_rank), rope = static_cast<int32_t>(c_.qk_rope_head_dim);
  float* const x = work_.x + piece.first * hidden;
  const StepRows rows = work_.RowsFrom(piece.first);
  TANDEM_ASSIGN_OR_RETURN(Activations a, NormOnce(x, w.attn_norm, work_.normed, n, false));
  Activations queries;
  queries.x = work_.q;
  queries.x_stride = qk;
  ResultForm of_queries;  // of what the heads' products with k_b read
  of_queries.of_head = qk;
  of_queries.values = c_.qk_nope_head_dim;
  if (c_.q_lora_rank > 0) {
    TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.q_a, work_.q_a, c_.q_lora_rank}, {&w.kv_a, work_.kv, width}}));
    TANDEM_ASSIGN_OR_RETURN(
        a, Norm(work_.q_a, c_.q_lora_rank, nullptr, w.q_a_norm, work_.q_a, n, c_.q_lora_rank));
    ProductParams q_b = Single(w.q_b, a, n, work_.q);
    if (!IsFloatType(w.k_b.type)) MakesForm(q_b, of_queries, queries);
    TANDEM_RETURN_IF_ERROR(Run(q_b));
  } else {
    TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.q, work_.q, heads * qk}, {&w.kv_a, work_.kv, width}}));
  }

  CacheWriteParams write;
  write.rows = rows;
  write.kv = work_.kv;
  write.weight = w.kv_a_norm;
  write.eps = static_cast<float>(c_.rms_norm_eps);
  write.cache = cache_.Layer(layer);
  write.type = cache_.type;
  write.n = n;
  write.lora = lora;
  write.rope = rope;
  TANDEM_ASSIGN_OR_RETURN(const ProductParams k_b, PerHead(w.k_b, n, queries, work_.latents, lora));
  TANDEM_RETURN_IF_ERROR(Run(k_b));
  QueryParams query;
  query.rows = rows;
  query.absorbed = work_.latents;
  query.q = work_.q;
  query.scale = scale_;
  query.out = work_.query;
  query.type = cache_.type;
  query.n = n;
  query.heads = static_cast<int32_t>(heads);
  query.lora = lora;
  query.nope = static_cast<int32_t>(c_.qk_nope_head_dim);
  query.rope = rope;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(LaunchQueryAndCacheWrite(query, write, stream_), "the query and the KV cache"));
  const bool formed = Small(n) && !IsFloatType(w.v_b.type);
  for (const AttentionRange& range : work_.ranges) {
    if (range.first < piece.first || range.first >= piece.first + n) continue;
    TANDEM_RETURN_IF_ERROR(Attend(layer, piece, range, formed));
  }

  Activations latents;
  latents.x = work_.latents;
  latents.x_stride = lora;
  if (formed) {
    latents.q = work_.form_q;
    latents.q_meta = work_.form_q_meta;
  }
  TANDEM_ASSIGN_OR_RETURN(ProductParams v_b, PerHead(w.v_b, n, latents, work_.attended, c_.v_head_dim));
  Activations out;
  out.x = work_.attended;
  out.x_stride = out.cols = heads * c_.v_head_dim;
  const bool made = MakesForm(v_b, {}, out);
  TANDEM_RETURN_IF_ERROR(Run(v_b));
  if (!made) TANDEM_RETURN_IF_ERROR(MakeForm(out, n, Small(n)));
  return Run(out, n, {{&w.output, x, hidden, /*accumulate=*/true}});
}

// With `form` what comes out is in the int8 form.
absl::Status Forward::Attend(int64_t layer, const Piece& piece, const AttentionRange& range, bool form) {
  const int64_t heads = c_.num_attention_heads, lora = c_.kv_lora_rank, at = range.first - piece.first;
  AttentionParams p;
  p.rows = work_.RowsFrom(range.first);
  p.splits = work_.splits + range.first;
  p.first_partial = work_.first_partial + range.first;
  p.query = work_.query + at * heads * c_.latent_dim();
  p.cache = cache_.Layer(layer);
  p.type = cache_.type;
  p.out = work_.latents + at * heads * lora;
  p.partial = work_.partial;
  p.partial_state = work_.partial_state;
  p.n = range.count;
  p.heads = static_cast<int32_t>(heads);
  p.lora = static_cast<int32_t>(lora);
  p.rope = static_cast<int32_t>(c_.qk_rope_head_dim);
  p.most_splits = range.most_splits;
  if (form) {
    p.q = work_.form_q;
    p.q_meta = work_.form_q_meta;
    p.form_rows = piece.n;
    p.form_first = at;
  }
  return ToStatus(LaunchAttention(p, stream_), "attention");
}

// x += ffn(norm(x)), dense or routed + shared experts
absl::Status Forward::FeedForward(int64_t layer, RoutedExperts* experts, int32_t defer) {
  const DeviceLayer& w = weights_.layers[layer];
  const int64_t hidden = c_.hidden_size;
  const bool moe = c_.IsMoe(layer);
  const int64_t together = w.has_ffn ? work_.FfnRows(w.ffn.gate.rows) : work_.piece_tokens();
  const bool one_piece = work_.n <= together;
  RoutedCall call;
  call.layer = layer;
  call.index = layer - c_.first_k_dense_replace;
  call.n = work_.n;
  call.normed = work_.normed;
  call.ids = work_.expert_ids;
  call.weights = work_.expert_weights;
  call.x = work_.x;
  call.defer = defer;
  call.defers = work_.generated;
  call.last = layer + 1 == c_.num_hidden_layers;
  const bool few = moe && factors_;
  Activations a;
  RouteParams route;
  TANDEM_RETURN_IF_ERROR(ForPieces(together, [&](const Piece& piece) -> absl::Status {
    const int64_t at = piece.first * hidden;
    TANDEM_ASSIGN_OR_RETURN(a, NormOnce(work_.x + at, w.ffn_norm, work_.normed + at, piece.n, moe && !few));
    if (moe) {
      TANDEM_RETURN_IF_ERROR(Run(a, piece.n, {{&w.router, work_.router_logits, c_.n_routed_experts}}));
      route = RouteOf(w, piece);
      if (!few) TANDEM_RETURN_IF_ERROR(ToStatus(LaunchRoute(route, stream_), "the router"));
    }
    return !moe && w.has_ffn ? DenseExpert(w, a, piece) : absl::OkStatus();
  }));
  if (!moe) return absl::OkStatus();
  if (few) {
    call.factors = a.factors;
    call.route = &route;
  }
  // Where one attention of few rows comes next, its norm goes with the answer.
  NormFormParams next;
  if (few && !call.last) {
    next =
        FormOf(work_.x, hidden, nullptr, weights_.layers[layer + 1].attn_norm, work_.normed, work_.n, hidden);
    call.next = &next;
    formed_ = Formed(next);
  }
  TANDEM_RETURN_IF_ERROR(experts->Ask(call, stream_));
  if (w.has_ffn) {  // the shared expert while the others work
    TANDEM_RETURN_IF_ERROR(ForPieces(together, [&](const Piece& piece) -> absl::Status {
      if (!one_piece) {  // the form of the last piece is there, not of this one
        a.x = work_.normed + piece.first * hidden;
        TANDEM_RETURN_IF_ERROR(MakeForm(a, piece.n, Small(piece.n)));
      }
      return DenseExpert(w, a, piece);
    }));
  }
  return experts->Add(call, stream_);
}

// x += down(silu(gate(a)) * up(a)): the dense layer's or the shared expert's.
absl::Status Forward::DenseExpert(const DeviceLayer& w, const Activations& a, const Piece& piece) {
  const int64_t n = piece.n, hidden = c_.hidden_size, inner = w.ffn.gate.rows;
  TANDEM_RETURN_IF_ERROR(Run(a, n, {{&w.ffn.gate, work_.gate, inner}, {&w.ffn.up, work_.up, inner}}));
  SiluMulParams p;
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
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchSiluMul(p, stream_), "the FFN"));
  if (!Small(n)) TANDEM_RETURN_IF_ERROR(MakeForm(middle, n, false));
  return Run(middle, n, {{&w.ffn.down, work_.x + piece.first * hidden, hidden, /*accumulate=*/true}});
}

// From the router's logits: which experts each token of the piece goes to.
RouteParams Forward::RouteOf(const DeviceLayer& w, const Piece& piece) const {
  const int64_t k = c_.num_experts_per_tok;
  RouteParams p;
  p.logits = work_.router_logits;
  p.bias = w.router_bias;
  p.ids = work_.expert_ids + piece.first * k;
  p.weights = work_.expert_weights + piece.first * k;
  p.n = piece.n;
  p.experts = static_cast<int32_t>(c_.n_routed_experts);
  p.top_k = static_cast<int32_t>(k);
  p.groups = static_cast<int32_t>(c_.n_group);
  p.top_groups = static_cast<int32_t>(c_.topk_group);
  p.sigmoid = c_.scoring_func == model::ScoringFunc::kSigmoid;
  p.normalize = c_.norm_topk_prob;
  p.scale = static_cast<float>(c_.routed_scaling_factor);
  return p;
}

}  // namespace tandem::attention::cuda
