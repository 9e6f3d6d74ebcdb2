// The kernels of the CUDA backend: plain parameters in, work on a stream out. This header is read by the host
// compiler and by nvcc. All pointers are device memory unless said otherwise; all sizes are in elements.
// Launchers return the launch's error; what a kernel does later is seen at the next synchronization.
//
// Numerics. Weights keep their GGUF values. A product with few columns (up to kMaxColumns) quantizes the
// activations to int8 in blocks of 32 (scale = largest / 127), sums each block exactly in int32 and the
// blocks in float32; F16, BF16 and F32 weights meet float32 activations on tensor cores, both factors cut
// into terms of 11 bits. A row and column give the same bits whatever other columns are in the call. A
// product with more columns rounds activations and decoded weights to float16 (11 bits; rows of activations
// are scaled by a power of two first, so that nothing overflows) and sums in float32 on tensor cores. F32
// weights always meet float32 activations.
//
// Steps of a fixed number of rows: a row whose position is negative is padding. What reads StepRows leaves
// the cache and its output as they are for such a row; routing sends it to expert -1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "services/attention_gpu/backend/cuda/row_layout.h"

namespace tandem::attention::cuda {

constexpr int kMaxColumns = 64;  // of a product on int8 activations

// A weight in device memory: `rows` rows of `cols` inputs, each laid out as row_layout.h says.
struct DeviceMatrix {
  int32_t type = kF32;            // a GGUF id of row_layout.h
  const uint8_t* data = nullptr;  // aligned to 16 bytes
  int64_t rows = 0;
  int64_t cols = 0;       // a multiple of 32, for K types of 256
  int64_t row_bytes = 0;  // a multiple of 16
};

// What rows are still to be multiplied with: 1 / sqrt(mean of squares + eps), from the sums of squares of
// each 32 values, [rows, blocks], aligned to 16 bytes. Null: nothing. LaunchNormForm makes them.
struct RowFactors {
  const float* squares = nullptr;
  int32_t blocks = 0;
  float eps = 0;
};

// Activations in the forms that products read, for `rows` vectors of `cols` values. Row j * heads + h is
// column j of the product of head h; heads is 1 but for products that have a matrix for each head.
struct Activations {
  const float* x = nullptr;  // rows x_stride apart; F16, BF16 and F32 weights with few columns, F32 always
  int64_t x_stride = 0;
  // The int8 form, in the order in which tensor cores read it: for each head, and each group of 8 columns
  // (the last one padded), [cols / 32][8 columns][32 values], aligned to 16 bytes. Int8FormRows() * cols
  // integers.
  const int8_t* q = nullptr;
  const float2* q_meta = nullptr;  // of the same 32 values: (scale, scale * sum of the integers)
  const uint16_t* h = nullptr;     // [rows, cols] float16, aligned to 16 bytes; x = h * h_scale
  const float* h_scale = nullptr;  // [rows]; null: ones
  int64_t cols = 0;
  RowFactors factors;  // of x and q, which products multiply their results with; not with heads
};
inline int64_t Int8FormRows(int64_t rows, int64_t heads) { return (rows / heads + 7) / 8 * 8 * heads; }

// The int8 form of what a product gives, made in the same pass for the product behind it. Rows of all
// batches, one after the other, are the values of a column, or of a head's column for each `of_head` of them.
struct ResultForm {
  int8_t* q = nullptr;  // as Activations::q, of `columns` columns; null: not wanted
  float2* q_meta = nullptr;
  int64_t of_head = 0;  // a multiple of 32; 0: all rows are of one head
  int64_t values = 0;   // the first values of each head's that the form has, a multiple of 32; 0: all
};

// For each batch b and column j: y[b * y_batch + j * y_column + r] = sum_c w_b[r, c] x_row[c], or += with
// `accumulate`. Batch b uses the weight rows from b * w.rows on and the activation row b * x_batch + j *
// x_column.
struct ProductParams {
  DeviceMatrix w;  // of one batch
  Activations x;
  int64_t x_batch = 0;
  int64_t x_column = 1;
  float* y = nullptr;
  // LaunchMatMul: float16 in place of y, without `accumulate`; rows, y_batch and y_column are even then.
  uint16_t* y_half = nullptr;
  int64_t y_batch = 0;
  int64_t y_column = 0;
  int32_t columns = 0;
  int32_t batches = 1;
  bool accumulate = false;
  ResultForm form;   // LaunchMatVec, where CanForm
  int32_t tile = 0;  // LaunchMatMul: columns of a block, 64, 128 or 256; 0: as is best. The bits are the same
};

// Up to kMaxColumns columns. F32 weights: any number, beyond kMaxColumns with other bits.
cudaError_t LaunchMatVec(const ProductParams& p, cudaStream_t stream);
// Several of them, with the same bits: in one launch where neighbours have the same activations, type,
// columns and batches, and their outputs do not overlap.
cudaError_t LaunchMatVecs(const ProductParams* p, int count, cudaStream_t stream);
// Whether a launch of this product alone makes the form of its results, too: by type and shape alone.
bool CanForm(const ProductParams& p);
// Any number of columns; not for F32 weights.
cudaError_t LaunchMatMul(const ProductParams& p, cudaStream_t stream);
// Must be called once for the current device before LaunchMatMul: asks for its shared memory.
cudaError_t PrepareMatMul();
// Whether products of many columns, and attention, are made by warpgroups: on devices of compute
// capability 9.0, in builds with code for it (90a). Asked once, of the device that is current then: a process
// uses one kind of device. TANDEM_NO_WARPGROUPS=1 in the environment says no, so that tests cover what other
// devices run.
bool CanUseWarpgroups();

// int8 form of rows of float32, and the float16 form.
struct QuantizeParams {
  const float* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  int64_t cols = 0;   // a multiple of 32
  int64_t heads = 1;  // of which `rows` is a multiple; matters to the int8 form
  int8_t* q = nullptr;
  float2* q_meta = nullptr;
  uint16_t* h = nullptr;
  float* h_scale = nullptr;
};
cudaError_t LaunchQuantize(const QuantizeParams& p, cudaStream_t stream);  // writes q, q_meta
cudaError_t LaunchToHalf(const QuantizeParams& p, cudaStream_t stream);    // writes h, h_scale

// Blocks as they lie in a GGUF file to rows as row_layout.h says. `src` and `dst` must not overlap.
struct RepackParams {
  int32_t type = 0;
  const uint8_t* src = nullptr;  // rows one after the other, aligned to 2 bytes
  uint8_t* dst = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
};
cudaError_t LaunchRepack(const RepackParams& p, cudaStream_t stream);

// Words of 4 bytes from page-locked host memory to the device: the first `words`, and as many more as the
// word at `more` says. Both sides are aligned to 16 bytes and have room for `room` words, a multiple of 4, of
// which others than those may be copied, too.
struct FetchParams {
  const uint32_t* from = nullptr;
  uint32_t* to = nullptr;
  int64_t words = 0;
  int64_t more = 0;
  int64_t room = 0;
};
cudaError_t LaunchFetch(const FetchParams& p, cudaStream_t stream);

// out[i, :] = row ids[i] of w.
struct EmbedParams {
  DeviceMatrix w;
  const int32_t* ids = nullptr;  // each in [0, w.rows)
  float* out = nullptr;          // [n, w.cols]
  int64_t n = 0;
};
cudaError_t LaunchEmbed(const EmbedParams& p, cudaStream_t stream);

// y = x / sqrt(mean(x^2) + eps) * weight for each row.
struct RmsNormParams {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* row_ids = nullptr;  // row i reads row row_ids[i] of x; null: row i
  const float* weight = nullptr;     // [cols]
  float eps = 0;
  float* y = nullptr;  // [rows, cols], may be x if x_stride == cols and there are no row_ids
  int64_t rows = 0;
  int64_t cols = 0;  // a multiple of 32
};
cudaError_t LaunchRmsNorm(const RmsNormParams& p, cudaStream_t stream);

// The same but for the rows' factors: y = x * weight, its int8 form, and the squares of x that RowFactors
// wants. Nobody waits for a row's sum, so this costs no more than a copy.
struct NormFormParams {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* row_ids = nullptr;  // as in RmsNormParams
  const float* weight = nullptr;     // [cols], aligned to 16 bytes
  float* y = nullptr;                // as in RmsNormParams; null: not wanted
  int8_t* q = nullptr;               // null: not wanted
  float2* q_meta = nullptr;
  float* squares = nullptr;  // [rows, cols / 32]
  int64_t rows = 0;
  int64_t cols = 0;  // a multiple of 32
};
cudaError_t LaunchNormForm(const NormFormParams& p, cudaStream_t stream);
// y = x times its rows' factors, [rows, cols].
cudaError_t LaunchScaleRows(const float* x, const RowFactors& factors, float* y, int64_t rows, int64_t cols,
                            cudaStream_t stream);

// y = gate / (1 + exp(-gate)) * up; and, where q is given, the int8 form of y. All [rows, cols], dense.
struct SiluMulParams {
  const float* gate = nullptr;
  const float* up = nullptr;
  float* y = nullptr;  // may be gate
  int8_t* q = nullptr;
  float2* q_meta = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;  // a multiple of 32
};
cudaError_t LaunchSiluMul(const SiluMulParams& p, cudaStream_t stream);

cudaError_t LaunchAdd(float* x, const float* delta, int64_t n, cudaStream_t stream);  // x += delta

// What the kernels of one step read about each token row.
struct StepRows {
  const int32_t* position = nullptr;    // [n] in its sequence; negative: padding, nothing else of it is read
  const int32_t* first_page = nullptr;  // [n] where the page table of its sequence begins in `pages`
  const int32_t* pages = nullptr;       // entry i of a table: the page of positions from i * page_tokens on
  int32_t page_tokens = 0;
  const float* rope = nullptr;  // [n, rope / 2, (cos, sin)]
};

// How a token lies in the latent cache, one row for each: the normalized latent and the rotated shared key.
//   kCacheBf16  [lora + rope] bfloat16
//   kCacheInt8  [lora] bytes, [rope] float16, a float32 scale, padding to a multiple of 16 bytes; value i of
//   the
//               latent is (byte - 128) * scale, with the scale = largest magnitude / 127
enum CacheType : int32_t { kCacheBf16 = 0, kCacheInt8 = 1 };
TANDEM_HOST_DEVICE constexpr int64_t CacheRowBytes(CacheType type, int64_t lora, int64_t rope) {
  return type == kCacheBf16 ? 2 * (lora + rope) : (lora + 2 * rope + 4 + 15) / 16 * 16;
}

// One layer of the paged cache: [pages, page_tokens] rows of CacheRowBytes.
struct CacheWriteParams {
  StepRows rows;
  const float* kv = nullptr;      // [n, lora + rope], before norm and rotation
  const float* weight = nullptr;  // [lora]
  float eps = 0;
  void* cache = nullptr;  // aligned to 16 bytes
  int64_t n = 0;
  int32_t lora = 0, rope = 0;
  CacheType type = kCacheBf16;
};
cudaError_t LaunchCacheWrite(const CacheWriteParams& p, cudaStream_t stream);

// The query in the form that attention reads, [n, heads, lora + rope] bfloat16, or float16 for an int8 cache:
// the absorbed part, then the rotated rest of q, both times `scale`.
struct QueryParams {
  StepRows rows;
  const float* absorbed = nullptr;  // [n, heads, lora]
  const float* q = nullptr;         // [n, heads, nope + rope]
  float scale = 0;
  uint16_t* out = nullptr;
  int64_t n = 0;
  int32_t heads = 0, lora = 0, nope = 0, rope = 0;
  CacheType type = kCacheBf16;
};
cudaError_t LaunchQuery(const QueryParams& p, cudaStream_t stream);
// Both, of the same rows, in one launch.
cudaError_t LaunchQueryAndCacheWrite(const QueryParams& p, const CacheWriteParams& write,
                                     cudaStream_t stream);

// Absorbed MLA attention: for token row t, positions [0, position[t]] of its sequence's cache.
//   out[t, h, :] = softmax over p of (query[t, h, :] . key_p) applied to the first `lora` values of key_p.
// Operands of tensor cores in the query's type, float32 sums; the weights of the softmax are rounded to that
// type too. Row t is cut into splits[t] stretches of equal length, whose results are then combined. Where the
// caller chooses splits[t] by the row's own position alone, its bits do not depend on the batch. Only the
// grid depends on this struct's numbers (n, heads, most_splits); blocks without work leave at once.
struct AttentionParams {
  StepRows rows;                           // page_tokens: a multiple of kAttentionTile
  const int32_t* splits = nullptr;         // [n], in [1, kMaxSplits]
  const int32_t* first_partial = nullptr;  // [n] index of the row's first part, where splits > 1
  const uint16_t* query = nullptr;         // [n, heads, lora + rope]
  const void* cache = nullptr;             // the layer's, aligned to 16 bytes
  float* out = nullptr;                    // [n, heads, lora]
  float* partial = nullptr;                // [parts, heads, lora]
  float2* partial_state = nullptr;         // [parts, heads]: (largest score, sum of weights)
  int64_t n = 0;
  int32_t heads = 0, lora = 0, rope = 0;
  int32_t most_splits = 1;  // at least that of every row in this call
  CacheType type = kCacheBf16;
  // A block's shared memory at most, as on a smaller card: the kernel of other devices then
  // (WarpgroupsAttend). 0: what the device has.
  int32_t shared_bytes = 0;
  // In place of `out` (which rows with one split are still written to) its int8 form, as LaunchQuantize makes
  // it of form_rows rows of which these are form_first and those behind it, all of `heads` heads. Null: none.
  int8_t* q = nullptr;
  float2* q_meta = nullptr;
  int64_t form_rows = 0, form_first = 0;
};
constexpr int kAttentionTile = 32;  // positions handled together
constexpr int kSplitTokens = 128;   // the least worth a split
constexpr int kMaxSplits = 64;
// Whether attention of this shape has a kernel by warpgroups on the current device (warpgroup_attention.cu).
bool WarpgroupsAttend(CacheType type, int64_t heads, int64_t lora, int64_t rope);
// Splits of a row that sees `tokens` positions and is alone of its sequence in the step: the same in every
// company, since the sums of its parts are.
int SplitsOf(int64_t tokens);
bool AttentionSupports(int32_t lora, int32_t rope);
cudaError_t PrepareAttention();  // once for the current device, before the first launch
cudaError_t LaunchAttention(const AttentionParams& p, cudaStream_t stream);

// Which experts a token goes to; the definition is backend/cpu/router.h. At most 1024 experts and groups.
struct RouteParams {
  const float* logits = nullptr;  // [n, experts]
  const float* bias = nullptr;    // [experts] or null
  int32_t* ids = nullptr;         // [n, top_k]
  float* weights = nullptr;       // [n, top_k]
  int64_t n = 0;
  int32_t experts = 0, top_k = 0, groups = 1, top_groups = 1;
  bool sigmoid = false, normalize = false;
  float scale = 1;
  const int32_t* position =
      nullptr;  // [n]; a row with a negative one gets ids -1 and weights 0. Null: none has
};
cudaError_t LaunchRoute(const RouteParams& p, cudaStream_t stream);

// token[i] = the lowest id among the largest of logits[i, :]; NaN counts as -infinity.
struct ArgmaxParams {
  const float* logits = nullptr;  // [n, vocab]
  int32_t* token = nullptr;
  int64_t n = 0;
  int64_t vocab = 0;
};
cudaError_t LaunchArgmax(const ArgmaxParams& p, cudaStream_t stream);

}  // namespace tandem::attention::cuda
