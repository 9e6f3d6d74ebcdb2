// What Activations holds: float32 rows, and on demand their quantized forms, unit by unit (see QuantArgs).
#pragma once

#include <cstdint>
#include <memory>

#include "common/kernels/kernels.h"

namespace tandem::kernels {

// Memory that grows, aligned to cache lines, not initialised.
template <typename T>
class Buffer {
 public:
  void Resize(int64_t n) {
    if (n <= capacity_) return;
    data_.reset(static_cast<T*>(::operator new (static_cast<size_t>(n) * sizeof(T), std::align_val_t{64})));
    capacity_ = n;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Delete> data_;
  int64_t capacity_ = 0;
};

// The form that a weight type's integer kernels want.
enum class ActivationForm { kFloat, kBlocks256, kBlocks32 };
ActivationForm FormFor(gguf::TensorType type);

struct Activations::Impl {
  const float* x = nullptr;
  int64_t n = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  bool has_256 = false;
  bool has_32 = false;

  struct {
    Buffer<int8_t> q;
    Buffer<float> d;
    Buffer<int16_t> bsum16;
    Buffer<int16_t> bsum32;
  } b256;
  struct {
    Buffer<int8_t> q;
    Buffer<float> d;
    Buffer<int32_t> neg_bsum;
    Buffer<float> dsum;
  } b32;
};

}  // namespace tandem::kernels
