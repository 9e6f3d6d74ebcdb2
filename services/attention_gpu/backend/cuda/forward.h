// The layers of a step as launches on a stream: everything between the token ids and the logits, but for the
// routed experts, which somebody else computes. Nothing here waits for the GPU or allocates, so that it can
// be captured into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/prefill_layout.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/backend/cuda/weights.h"
#include "services/attention_gpu/backend/cuda/workspace.h"

namespace tandem::attention::cuda {

// The latent cache of all layers: [layers][pages][page_tokens] rows of CacheRowBytes(type).
struct LatentCache {
  uint8_t* data = nullptr;
  int64_t layer_bytes = 0;
  CacheType type = kCacheBf16;
  uint8_t* Layer(int64_t layer) const { return data + layer * layer_bytes; }
};

class Forward {
 public:
  // All must outlive this.
  Forward(const model::ModelConfig& config, const DeviceWeights& weights, const LatentCache& cache,
          Workspace& work);

  // The tokens that the workspace was laid out for, through all layers: leaves work.x. `experts` may be null
  // for a model without MoE layers. `defer`: experts that generated tokens leave to the layer behind.
  absl::Status Layers(RoutedExperts* experts, int32_t defer, cudaStream_t stream);
  // work.logits = those of the `count` wanted rows from `first` on, at most Workspace::kLogitsRows.
  absl::Status Logits(int64_t first, int64_t count, cudaStream_t stream);

 private:
  // Rows [first, first + n) of the step.
  struct Piece {
    int64_t first = 0, n = 0;
  };
  // One of two products of the same activations.
  struct Product {
    const DeviceMatrix* w;
    float* y;
    int64_t y_column;
    bool accumulate = false;
  };
  static bool Small(int64_t columns) { return columns <= kMaxColumns; }

  // norm(x) for what products read; `y` has room for it. Of few rows the products multiply the factors,
  // unless `whole`.
  absl::StatusOr<Activations> Norm(const float* x, int64_t x_stride, const int32_t* row_ids,
                                   const float* weight, float* y, int64_t rows, int64_t cols,
                                   bool whole = false);
  absl::StatusOr<Activations> NormOnce(const float* x, const float* weight, float* y, int64_t rows,
                                       bool whole);
  NormFormParams FormOf(const float* x, int64_t x_stride, const int32_t* row_ids, const float* weight,
                        float* y, int64_t rows, int64_t cols) const;
  Activations Formed(const NormFormParams& p) const;
  absl::Status MakeForm(Activations& a, int64_t rows, bool small, int64_t heads = 1);
  absl::Status Run(const ProductParams& p);
  absl::Status Run(const Activations& a, int64_t columns, std::initializer_list<Product> products);
  // A product with one matrix for all rows, to be changed and run.
  ProductParams Single(const DeviceMatrix& w, const Activations& a, int64_t columns, float* y) const;
  // p is to make `form` of its results, where it can; those are the activations' form then.
  bool MakesForm(ProductParams& p, ResultForm form, Activations& results) const;
  // With a.q the int8 form of a.x is there already.
  absl::StatusOr<ProductParams> PerHead(const DeviceMatrix& w, int64_t n, Activations a, float* y,
                                        int64_t y_head);
  absl::Status Attention(int64_t layer, const Piece& piece);
  absl::Status Attend(int64_t layer, const Piece& piece, const AttentionRange& range, bool form);
  // expanded_attention.cc
  absl::Status ExpandedAttention(int64_t layer, const AttentionBlock& block);
  absl::Status ExpandedChunk(int64_t layer, const PrefillLayout& at, const Piece& rows, int64_t position);
  absl::Status Project(int64_t layer, const PrefillLayout& at, const Piece& rows, int64_t done);
  absl::Status MakeQueries(const DeviceLayer& w, const PrefillLayout& at, const Piece& rows,
                           int64_t first_head);
  absl::Status NormAlone(const float* x, const float* weight, float* y, int64_t rows, int64_t cols);
  absl::Status ToHalf(const float* x, int64_t rows, int64_t cols, uint16_t* h, float* h_scale);
  absl::Status RunWide(const ProductParams& p);
  template <typename T>
  T* Scratch(uint64_t offset) const {
    return reinterpret_cast<T*>(work_.scratch() + offset);
  }
  absl::Status FeedForward(int64_t layer, RoutedExperts* experts, int32_t defer);
  RouteParams RouteOf(const DeviceLayer& w, const Piece& piece) const;
  absl::Status DenseExpert(const DeviceLayer& w, const Activations& a, const Piece& piece);
  template <typename F>
  absl::Status ForPieces(int64_t rows, const F& f) const;

  const model::ModelConfig& c_;
  const DeviceWeights& weights_;
  const LatentCache& cache_;
  Workspace& work_;
  const float scale_;
  cudaStream_t stream_ = nullptr;  // of the call under way
  bool few_ = false;               // all rows of the step are a few, and pass together
  bool factors_ = false;           // and the experts take their factors
  // The norm in front of the next attention or feed-forward, where it has been made already.
  std::optional<Activations> formed_;
};

}  // namespace tandem::attention::cuda
