// The public products: checks of shapes, the reference precision, and the way to the kernels in use.
#include "common/kernels/dispatch.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/base/check.h"
#include "common/kernels/activations.h"
#include "common/quant/quant.h"

namespace tandem::kernels {
namespace {

using gguf::TensorType;

static_assert(static_cast<uint32_t>(TensorType::kF32) == internal::kTypeF32);
static_assert(static_cast<uint32_t>(TensorType::kF16) == internal::kTypeF16);
static_assert(static_cast<uint32_t>(TensorType::kBF16) == internal::kTypeBF16);
static_assert(static_cast<uint32_t>(TensorType::kQ4_0) == internal::kTypeQ4_0);
static_assert(static_cast<uint32_t>(TensorType::kQ4_1) == internal::kTypeQ4_1);
static_assert(static_cast<uint32_t>(TensorType::kQ5_0) == internal::kTypeQ5_0);
static_assert(static_cast<uint32_t>(TensorType::kQ5_1) == internal::kTypeQ5_1);
static_assert(static_cast<uint32_t>(TensorType::kQ8_0) == internal::kTypeQ8_0);
static_assert(static_cast<uint32_t>(TensorType::kQ2_K) == internal::kTypeQ2_K);
static_assert(static_cast<uint32_t>(TensorType::kQ3_K) == internal::kTypeQ3_K);
static_assert(static_cast<uint32_t>(TensorType::kQ4_K) == internal::kTypeQ4_K);
static_assert(static_cast<uint32_t>(TensorType::kQ5_K) == internal::kTypeQ5_K);
static_assert(static_cast<uint32_t>(TensorType::kQ6_K) == internal::kTypeQ6_K);
static_assert(kLeaf == internal::kUnit);

// One product: which rows, which tokens, where to.
struct Job {
  const Matrix* w;
  int64_t row_begin;
  int64_t row_end;
  const Activations::Impl* x;
  const int32_t* ids;  // nullptr: all tokens
  int64_t n;
  float* y;
  int64_t ldy;
  bool leaves;
  const LeafSum* sum = nullptr;  // with leaves, integer kernels only: where they go instead
  const Flow* flow = nullptr;
};

// Weights as floats, sums in double. Rows are dequantized whole, once for all tokens.
void RunReference(const Job& job) {
  thread_local std::vector<float> row;
  const Matrix& w = *job.w;
  row.resize(static_cast<size_t>(w.cols));
  const int64_t leaf = job.leaves ? kLeaf : w.cols;
  const int64_t n_leaves = job.leaves ? (w.cols + kLeaf - 1) / kLeaf : 1;
  for (int64_t r = job.row_begin; r < job.row_end; ++r) {
    quant::Dequantize(w.type, w.data + r * w.row_bytes, row.data(), w.cols);
    for (int64_t i = 0; i < job.n; ++i) {
      const float* x = job.x->x + (job.ids == nullptr ? i : job.ids[i]) * job.x->stride;
      for (int64_t b = 0; b < n_leaves; ++b) {
        double sum = 0.0;
        const int64_t end = std::min(w.cols, (b + 1) * leaf);
        for (int64_t c = b * leaf; c < end; ++c) {
          sum += static_cast<double>(row[static_cast<size_t>(c)]) * static_cast<double>(x[c]);
        }
        const float value = static_cast<float>(sum);
        if (job.leaves) {
          job.y[(i * (job.row_end - job.row_begin) + r - job.row_begin) * n_leaves + b] = value;
        } else {
          job.y[i * job.ldy + r] = value;
        }
      }
    }
  }
}

void RunFloat(const Job& job) {
  const Matrix& w = *job.w;
  internal::FloatArgs a = {};
  a.type = static_cast<uint32_t>(w.type);
  a.row_bytes = w.row_bytes;
  a.rows = job.row_end - job.row_begin;
  a.x_stride = job.x->stride;
  a.ids = job.ids;
  a.n = job.n;
  const uint8_t* first = w.data + job.row_begin * w.row_bytes;
  const internal::KTables& tables = internal::ActiveTables();
  if (!job.leaves) {
    a.w = first;
    a.cols = w.cols;
    a.x = job.x->x;
    a.y = job.y + job.row_begin;
    a.ldy = job.ldy;
    a.row_step = 1;
    tables.float_matmul(a);
    return;
  }
  const int64_t n_leaves = (w.cols + kLeaf - 1) / kLeaf;
  const int64_t value_bytes = w.type == TensorType::kF32 ? 4 : 2;
  for (int64_t b = 0; b < n_leaves; ++b) {
    a.w = first + b * kLeaf * value_bytes;
    a.cols = std::min(kLeaf, w.cols - b * kLeaf);
    a.x = job.x->x + b * kLeaf;
    a.y = job.y + b;
    a.ldy = a.rows * n_leaves;
    a.row_step = n_leaves;
    tables.float_matmul(a);
  }
}

void RunQuant(const Job& job, ActivationForm form) {
  const Matrix& w = *job.w;
  internal::QuantArgs a = {};
  a.type = static_cast<uint32_t>(w.type);
  a.w = w.data + job.row_begin * w.row_bytes;
  a.row_bytes = w.row_bytes;
  a.rows = job.row_end - job.row_begin;
  a.cols = w.cols;
  if (form == ActivationForm::kBlocks256) {
    TANDEM_CHECK(job.x->has_256);
    a.q = job.x->b256.q.data();
    a.d = job.x->b256.d.data();
    a.bsum16 = job.x->b256.bsum16.data();
    a.bsum32 = job.x->b256.bsum32.data();
  } else {
    TANDEM_CHECK(job.x->has_32);
    a.q = job.x->b32.q.data();
    a.d = job.x->b32.d.data();
    a.neg_bsum = job.x->b32.neg_bsum.data();
    a.dsum = job.x->b32.dsum.data();
  }
  a.tokens = job.x->n;
  a.ids = job.ids;
  a.n = job.n;
  a.y = job.leaves ? job.y : job.y + job.row_begin;
  a.ldy = job.ldy;
  a.leaves = job.leaves;
  a.scratch = internal::ThreadScratch();
  const internal::Reading reading = internal::ReadingOf(a.cols, a.n);
  a.requests = reading.requests;
  a.by_rows = reading.by_rows;
  a.run_ahead = reading.run_ahead;
  if (job.sum != nullptr) {
    a.sum = job.sum->sum + job.row_begin;
    a.sum_ids = job.sum->ids;
    a.sum_weights = job.sum->weights;
    a.ld_sum = job.sum->ld;
    a.grid = job.sum->grid;
  }
  if (job.flow != nullptr) {
    a.asked = job.flow->asked;
    const Upcoming& next = job.flow->next;
    if (next.w != nullptr && next.row < next.row_end) {
      a.next = next.w->data + next.row * next.w->row_bytes;
      a.next_row_bytes = next.w->row_bytes;
      a.next_used = gguf::RowBytes(next.w->type, next.w->cols);
      a.next_rows = next.row_end - next.row;
      a.next_n = next.tokens;
    }
  }
  internal::ActiveTables().quant_matmul(a);
}

void Run(const Job& job, Precision precision) {
  const Matrix& w = *job.w;
  TANDEM_CHECK(job.row_begin >= 0 && job.row_end <= w.rows && job.x->cols == w.cols);
  if (job.row_begin >= job.row_end || job.n == 0) return;
  if (precision == Precision::kReference) {
    RunReference(job);
    return;
  }
  const ActivationForm form = FormFor(w.type);
  if (form == ActivationForm::kFloat) {
    RunFloat(job);
  } else {
    RunQuant(job, form);
  }
}

}  // namespace

namespace internal {

uint8_t* ThreadScratch() {
  thread_local Buffer<uint8_t> scratch;
  scratch.Resize(kScratchBytes);
  return scratch.data();
}

}  // namespace internal

Matrix Matrix::Of(gguf::TensorType type, const uint8_t* data, int64_t rows, int64_t cols) {
  return {type, data, rows, cols, gguf::RowBytes(type, cols)};
}

void MatMul(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x, float* y, int64_t ldy,
            Precision precision, const Flow& flow) {
  Run({&w, row_begin, row_end, &x.impl(), nullptr, x.impl().n, y, ldy, false, nullptr, &flow}, precision);
}

void MatMulGather(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                  std::span<const int32_t> token_ids, float* y, int64_t ldy, Precision precision,
                  const Flow& flow) {
  Run({&w, row_begin, row_end, &x.impl(), token_ids.data(), static_cast<int64_t>(token_ids.size()), y, ldy,
       false, nullptr, &flow},
      precision);
}

void MatMulLeaves(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                  std::span<const int32_t> token_ids, float* y, Precision precision) {
  Run({&w, row_begin, row_end, &x.impl(), token_ids.data(), static_cast<int64_t>(token_ids.size()), y, 0,
       true},
      precision);
}

void MatMulLeafSum(const Matrix& w, int64_t row_begin, int64_t row_end, const Activations& x,
                   std::span<const int32_t> token_ids, const LeafSum& to, Precision precision,
                   const Flow& flow) {
  const auto n = static_cast<int64_t>(token_ids.size());
  if (precision == Precision::kFast && FormFor(w.type) != ActivationForm::kFloat) {
    Run({&w, row_begin, row_end, &x.impl(), token_ids.data(), n, nullptr, 0, true, &to, &flow}, precision);
    return;
  }
  constexpr int64_t kTokens = 64;  // at a time: bounds the buffer
  thread_local std::vector<float> leaves;
  const int64_t rows = row_end - row_begin, n_leaves = (w.cols + kLeaf - 1) / kLeaf;
  for (int64_t first = 0; first < n; first += kTokens) {
    const int64_t count = std::min(kTokens, n - first);
    leaves.resize(static_cast<size_t>(count * rows * n_leaves));
    MatMulLeaves(w, row_begin, row_end, x,
                 token_ids.subspan(static_cast<size_t>(first), static_cast<size_t>(count)), leaves.data(),
                 precision);
    const float* leaf = leaves.data();
    for (int64_t i = first; i < first + count; ++i) {
      const double weight = static_cast<double>(to.weights[i]);
      double* sum = to.sum + to.ids[i] * to.ld + row_begin;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t b = 0; b < n_leaves; ++b) {
          sum[r] += (weight * static_cast<double>(*leaf++) + to.grid) - to.grid;
        }
      }
    }
  }
}

float Dot(const float* a, const float* b, int64_t n) { return internal::ActiveTables().dot(a, b, n); }

void Axpy(float a, const float* x, float* y, int64_t n) { internal::ActiveTables().axpy(a, x, y, n); }

void RmsNorm(const float* x, const float* weight, float eps, float* y, int64_t n) {
  const float mean = Dot(x, x, n) / static_cast<float>(n);
  const float inverse = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

void SiluMul(const float* gate, const float* up, float* y, int64_t n) {
  internal::ActiveTables().silu_mul(gate, up, y, n);
}

}  // namespace tandem::kernels
