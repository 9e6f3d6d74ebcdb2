// For tests and benchmarks that need a GPU: whether there is one, and arrays in its memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "common/kernels/test_util.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda::testing {

// Empty if GPU 0 can be used, else what is missing.
inline const std::string& NoGpu() {
  static const std::string reason = [] {
    const auto device = OpenDevice(0);
    return device.ok() ? std::string() : std::string(device.status().message());
  }();
  return reason;
}
#define TANDEM_NEEDS_GPU()                                                     \
  if (!::tandem::attention::cuda::testing::NoGpu().empty()) {                  \
    GTEST_SKIP() << "no GPU: " << ::tandem::attention::cuda::testing::NoGpu(); \
  }

inline void Check(cudaError_t e) { ASSERT_EQ(e, cudaSuccess) << cudaGetErrorString(e); }

// Device memory of n values. Filled with 0xff bytes (NaN as float) at first, so that what is not written
// shows.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n) : n_(n) {
    Check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(n, 1) * sizeof(T)));
    Check(cudaMemset(data_, 0xff, n * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { Upload(host); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void Upload(const std::vector<T>& host) {
    Check(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  // Waits for all work on the device.
  std::vector<T> Download() const {
    std::vector<T> host(n_);
    Check(cudaDeviceSynchronize());
    Check(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  T* get() const { return data_; }
  size_t size() const { return n_; }

 private:
  T* data_ = nullptr;
  size_t n_;
};

// A weight in device memory, from blocks in host memory.
class DeviceWeight {
 public:
  DeviceWeight(const kernels::Matrix& m, int64_t batches = 1)
      : bytes_(static_cast<size_t>(DeviceRowBytes(static_cast<int32_t>(m.type), m.cols) * m.rows)) {
    const auto type = static_cast<int32_t>(m.type);
    std::vector<uint8_t> raw(m.data, m.data + m.row_bytes * m.rows);
    const DeviceArray<uint8_t> staging(raw);
    Check(LaunchRepack({type, staging.get(), bytes_.get(), m.rows, m.cols}, nullptr));
    Check(cudaDeviceSynchronize());
    matrix_ = {type, bytes_.get(), m.rows / batches, m.cols, DeviceRowBytes(type, m.cols)};
  }
  const DeviceMatrix& matrix() const { return matrix_; }

 private:
  DeviceArray<uint8_t> bytes_;
  DeviceMatrix matrix_;
};

// All forms of `rows` vectors.
class DeviceActivations {
 public:
  DeviceActivations(const std::vector<float>& x, int64_t rows, int64_t cols, int64_t stride,
                    int64_t heads = 1)
      : rows_(rows),
        heads_(heads),
        x_(x),
        q_(Int8FormRows(rows, heads) * cols),
        meta_(Int8FormRows(rows, heads) * cols / 32),
        h_(rows * cols),
        scale_(rows) {
    const QuantizeParams p{x_.get(), stride,      rows,     cols,        heads,
                           q_.get(), meta_.get(), h_.get(), scale_.get()};
    Check(LaunchQuantize(p, nullptr));
    Check(LaunchToHalf(p, nullptr));
    activations_ = {x_.get(), stride, q_.get(), meta_.get(), h_.get(), scale_.get(), cols, {}};
  }
  const Activations& get() const { return activations_; }
  // The int8 form, row by row: [rows, cols] and [rows, cols / 32].
  std::vector<int8_t> q() const { return InRows(q_.Download(), 32); }
  std::vector<float2> meta() const { return InRows(meta_.Download(), 1); }

 private:
  template <typename T>
  std::vector<T> InRows(const std::vector<T>& form, int64_t a_block) const {
    const int64_t blocks = activations_.cols / 32, groups = (rows_ / heads_ + 7) / 8;
    std::vector<T> out;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t column = r / heads_, head = r % heads_;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = ((head * groups + column / 8) * blocks + b) * 8 + column % 8;
        out.insert(out.end(), form.begin() + at * a_block, form.begin() + (at + 1) * a_block);
      }
    }
    return out;
  }

  int64_t rows_, heads_;
  DeviceArray<float> x_;
  DeviceArray<int8_t> q_;
  DeviceArray<float2> meta_;
  DeviceArray<uint16_t> h_;
  DeviceArray<float> scale_;
  Activations activations_;
};

inline const std::vector<gguf::TensorType>& DeviceTypes() {
  static const std::vector<gguf::TensorType> types = [] {
    std::vector<gguf::TensorType> t;
    for (gguf::TensorType type : kernels::testing::AllTypes()) {
      if (IsDeviceType(static_cast<int32_t>(type))) t.push_back(type);
    }
    return t;
  }();
  return types;
}

inline bool SameBits(const float* a, const float* b, size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

}  // namespace tandem::attention::cuda::testing
