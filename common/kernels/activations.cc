#include "common/kernels/activations.h"

#include <algorithm>

#include "common/base/check.h"
#include "common/kernels/dispatch.h"

namespace tandem::kernels {

ActivationForm FormFor(gguf::TensorType type) {
  switch (type) {
    case gguf::TensorType::kF32:
    case gguf::TensorType::kF16:
    case gguf::TensorType::kBF16:
      return ActivationForm::kFloat;
    case gguf::TensorType::kQ4_0:
    case gguf::TensorType::kQ4_1:
    case gguf::TensorType::kQ5_0:
    case gguf::TensorType::kQ5_1:
    case gguf::TensorType::kQ8_0:
      return ActivationForm::kBlocks32;
    case gguf::TensorType::kQ2_K:
    case gguf::TensorType::kQ3_K:
    case gguf::TensorType::kQ4_K:
    case gguf::TensorType::kQ5_K:
    case gguf::TensorType::kQ6_K:
      return ActivationForm::kBlocks256;
  }
  CheckFailed(__FILE__, __LINE__, "weight type without kernels");
}

Activations::Activations() : impl_(std::make_unique<Impl>()) {}
Activations::~Activations() = default;
Activations::Activations(Activations&&) noexcept = default;
Activations& Activations::operator=(Activations&&) noexcept = default;

int64_t Activations::tokens() const { return impl_->n; }
int64_t Activations::cols() const { return impl_->cols; }

void Activations::Assign(const float* x, int64_t n, int64_t cols, int64_t stride) {
  TANDEM_CHECK(n >= 0 && cols >= 0);
  impl_->x = x;
  impl_->n = n;
  impl_->cols = cols;
  impl_->stride = stride;
  impl_->has_256 = false;
  impl_->has_32 = false;
}

void Activations::Prepare(gguf::TensorType type, Precision precision) {
  if (!Reserve(type, precision)) return;
  PrepareTokens(type, 0, impl_->n);
}

bool Activations::Reserve(gguf::TensorType type, Precision precision) {
  Impl& a = *impl_;
  const ActivationForm form = FormFor(type);
  if (precision == Precision::kReference || form == ActivationForm::kFloat) return false;
  const int64_t units = (a.cols + internal::kUnit - 1) / internal::kUnit;
  const int64_t cells = units * a.n;
  if (form == ActivationForm::kBlocks256) {
    TANDEM_CHECK(a.cols % 256 == 0);
    if (a.has_256) return false;
    a.b256.q.Resize(cells * internal::kUnit);
    a.b256.d.Resize(cells);
    a.b256.bsum16.Resize(cells * 16);
    a.b256.bsum32.Resize(cells * 8);
    a.has_256 = true;
  } else {
    TANDEM_CHECK(a.cols % 32 == 0);
    if (a.has_32) return false;
    a.b32.q.Resize(cells * internal::kUnit);
    a.b32.d.Resize(cells * internal::kSubBlocks);
    a.b32.neg_bsum.Resize(cells * internal::kSubBlocks);
    a.b32.dsum.Resize(cells * internal::kSubBlocks);
    a.has_32 = true;
  }
  return true;
}

void Activations::PrepareTokens(gguf::TensorType type, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) PrepareColumns(type, t, 0, impl_->cols);
}

void Activations::PrepareColumns(gguf::TensorType type, int64_t token, int64_t col_begin, int64_t col_end) {
  Impl& a = *impl_;
  TANDEM_CHECK(col_begin % internal::kUnit == 0 && col_end <= a.cols &&
               (col_end % internal::kUnit == 0 || col_end == a.cols));
  const internal::KTables& tables = internal::ActiveTables();
  const bool k = FormFor(type) == ActivationForm::kBlocks256;
  for (int64_t col = col_begin; col < col_end; col += internal::kUnit) {
    const float* x = a.x + token * a.stride + col;
    const int64_t at = col / internal::kUnit * a.n + token;
    if (k) {
      tables.quantize_k(x, a.b256.q.data() + at * internal::kUnit, a.b256.d.data() + at,
                        a.b256.bsum16.data() + at * 16, a.b256.bsum32.data() + at * 8);
    } else {
      const int n = static_cast<int>(std::min<int64_t>(a.cols - col, internal::kUnit));
      const int64_t s = at * internal::kSubBlocks;
      tables.quantize_32(x, n, a.b32.q.data() + at * internal::kUnit, a.b32.d.data() + s,
                         a.b32.neg_bsum.data() + s, a.b32.dsum.data() + s);
    }
  }
}

void Activations::Gather(const Activations& from, std::span<const int32_t> token_ids) {
  const Impl& f = from.impl();
  Assign(nullptr, static_cast<int64_t>(token_ids.size()), f.cols, 0);
  Impl& a = *impl_;
  const int64_t units = (a.cols + internal::kUnit - 1) / internal::kUnit;
  // [units][tokens][each]
  const auto copy = [&](const auto& source, auto& to, int64_t each) {
    to.Resize(units * a.n * each);
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t i = 0; i < a.n; ++i) {
        const auto* value = source.data() + (u * f.n + token_ids[static_cast<size_t>(i)]) * each;
        std::copy(value, value + each, to.data() + (u * a.n + i) * each);
      }
    }
  };
  if (f.has_256) {
    copy(f.b256.q, a.b256.q, internal::kUnit);
    copy(f.b256.d, a.b256.d, 1);
    copy(f.b256.bsum16, a.b256.bsum16, 16);
    copy(f.b256.bsum32, a.b256.bsum32, 8);
    a.has_256 = true;
  }
  if (f.has_32) {
    copy(f.b32.q, a.b32.q, internal::kUnit);
    copy(f.b32.d, a.b32.d, internal::kSubBlocks);
    copy(f.b32.neg_bsum, a.b32.neg_bsum, internal::kSubBlocks);
    copy(f.b32.dsum, a.b32.dsum, internal::kSubBlocks);
    a.has_32 = true;
  }
}

}  // namespace tandem::kernels
