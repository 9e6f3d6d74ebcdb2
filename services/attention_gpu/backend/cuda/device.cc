#include "services/attention_gpu/backend/cuda/device.h"

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/prefill_attention.h"

namespace tandem::attention::cuda {

absl::Status ToStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat(std::string(what), ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(message);
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInitializationError:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady:
    case cudaErrorNoKernelImageForDevice:
      return absl::NotFoundError(message);
    default:
      return absl::InternalError(message);
  }
}

absl::StatusOr<Device> OpenDevice(int index) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return absl::NotFoundError("no NVIDIA driver (libcuda.so.1) is installed");
    return absl::NotFoundError(absl::StrCat("the NVIDIA driver is for CUDA ", driver / 1000, ".",
                                            driver % 1000 / 10, ", this build needs ", CUDART_VERSION / 1000,
                                            ".0 or newer"));
  }
  TANDEM_RETURN_IF_ERROR(ToStatus(found, "looking for GPUs"));
  if (index < 0 || index >= count) {
    return absl::NotFoundError(absl::StrCat("there is no GPU ", index, ": CUDA sees ", count));
  }
  cudaDeviceProp properties;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaGetDeviceProperties(&properties, index), "asking for the GPU's properties"));
  Device d;
  d.index = index;
  d.name = properties.name;
  d.major = properties.major;
  d.minor = properties.minor;
  if (d.major < 8) {
    return absl::NotFoundError(absl::StrCat("GPU ", index, " (", d.name, ") has compute capability ", d.major,
                                            ".", d.minor, "; 8.0 (Ampere) is the least"));
  }
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(index), "opening the GPU"));
  size_t free = 0, total = 0;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free, &total), "asking for the GPU's memory"));
  d.free_bytes = free;
  d.total_bytes = total;
  const std::string what = absl::StrCat("the kernels of this build on GPU ", index, " (", d.name,
                                        ", compute capability ", d.major, ".", d.minor, ")");
  TANDEM_RETURN_IF_ERROR(ToStatus(PrepareMatMul(), what));
  TANDEM_RETURN_IF_ERROR(ToStatus(PrepareAttention(), what));
  TANDEM_RETURN_IF_ERROR(ToStatus(PreparePrefillAttention(), what));
  return d;
}

Arena::~Arena() {
  if (memory_ == nullptr) return;
  if (kind_ == Kind::kDevice) {
    cudaFree(memory_);
  } else {
    cudaFreeHost(memory_);
  }
}

absl::Status Arena::Allocate(std::string_view what) {
  if (bytes_ == 0) return absl::OkStatus();
  const std::string text =
      absl::StrCat(kind_ == Kind::kDevice ? "GPU memory for " : "page-locked memory for ", std::string(what),
                   ", ", bytes_ / 1000000, " MB");
  const cudaError_t e =
      kind_ == Kind::kDevice ? cudaMalloc(&memory_, bytes_) : cudaMallocHost(&memory_, bytes_);
  if (e != cudaSuccess) memory_ = nullptr;
  TANDEM_RETURN_IF_ERROR(ToStatus(e, text));
  for (const Piece& piece : wants_) {
    piece.set(piece.slot, static_cast<uint8_t*>(memory_) + piece.offset);
  }
  return absl::OkStatus();
}

}  // namespace tandem::attention::cuda
