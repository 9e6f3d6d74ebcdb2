#include "services/attention_gpu/backend/cuda/stream_memory_ops.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/bell_kernels.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/driver_function.h"

namespace tandem::attention::cuda {
namespace {

template <typename F>
absl::Status Resolve(const char* name, F* function) {
  void* const found = DriverFunction(name);
  if (found == nullptr) {
    return absl::UnimplementedError(absl::StrCat("the driver has no ", name));
  }
  *function = reinterpret_cast<F>(found);
  return absl::OkStatus();
}

absl::Status ToStatus(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": error ", static_cast<int>(result), " of the driver"));
}

// Their parameters differ between the toolkit's versions.
cudaError_t CaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, cudaGraph_t* graph,
                        const cudaGraphNode_t** last, size_t* count) {
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, nullptr, graph, last, nullptr, count);
#else
  return cudaStreamGetCaptureInfo_v2(stream, status, nullptr, graph, last, count);
#endif
}
cudaError_t ContinueAfter(cudaStream_t stream, cudaGraphNode_t* node) {
#if CUDART_VERSION >= 13000
  return cudaStreamUpdateCaptureDependencies(stream, node, nullptr, 1, cudaStreamSetCaptureDependencies);
#else
  return cudaStreamUpdateCaptureDependencies(stream, node, 1, cudaStreamSetCaptureDependencies);
#endif
}

using Params = std::array<CUstreamBatchMemOpParams, kMostRings>;

Params ParamsOf(MemoryOpKind kind, std::span<const MemoryOp> ops) {
  Params out = {};
  for (size_t i = 0; i < ops.size(); ++i) {
    if (kind == MemoryOpKind::kWrite) {
      out[i].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
      out[i].writeValue.address = ops[i].address;
      out[i].writeValue.value = ops[i].value;
    } else {
      out[i].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
      out[i].waitValue.address = ops[i].address;
      out[i].waitValue.value = ops[i].value;
      out[i].waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<StreamMemoryOps> StreamMemoryOps::Find(int device) {
  StreamMemoryOps out;
  decltype(&cuDeviceGetAttribute) get_attribute = nullptr;
  decltype(&cuCtxGetCurrent) get_context = nullptr;
  TANDEM_RETURN_IF_ERROR(Resolve("cuDeviceGetAttribute", &get_attribute));
  TANDEM_RETURN_IF_ERROR(Resolve("cuCtxGetCurrent", &get_context));
  TANDEM_RETURN_IF_ERROR(Resolve("cuStreamBatchMemOp", &out.batch));
  TANDEM_RETURN_IF_ERROR(Resolve("cuGraphAddBatchMemOpNode", &out.add_node));
  TANDEM_RETURN_IF_ERROR(Resolve("cuGraphExecBatchMemOpNodeSetParams", &out.set_params));
  int can = 0;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(get_attribute(&can, CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR, device),
               "stream memory operations"));
  if (can == 0) return absl::UnimplementedError("the device has no stream memory operations");
  TANDEM_RETURN_IF_ERROR(ToStatus(get_context(&out.context), "the GPU's context"));
  return out;
}

absl::StatusOr<CUgraphNode> PutMemoryOps(const StreamMemoryOps& driver, MemoryOpKind kind,
                                         std::span<const MemoryOp> ops, cudaStream_t stream) {
  Params params = ParamsOf(kind, ops);
  const auto count = static_cast<unsigned>(ops.size());
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* before = nullptr;
  size_t before_count = 0;
  TANDEM_RETURN_IF_ERROR(
      cuda::ToStatus(CaptureInfo(stream, &capture, &graph, &before, &before_count), "capturing a step"));
  if (capture == cudaStreamCaptureStatusNone) {
    TANDEM_RETURN_IF_ERROR(
        ToStatus(driver.batch(stream, count, params.data(), 0), "a stream memory operation"));
    return nullptr;
  }
  CUDA_BATCH_MEM_OP_NODE_PARAMS node_params = {};
  node_params.ctx = driver.context;
  node_params.count = count;
  node_params.paramArray = params.data();
  CUgraphNode node = nullptr;
  TANDEM_RETURN_IF_ERROR(ToStatus(driver.add_node(&node, graph, before, before_count, &node_params),
                                  "a node of stream memory operations"));
  TANDEM_RETURN_IF_ERROR(cuda::ToStatus(ContinueAfter(stream, &node), "capturing a step"));
  return node;
}

absl::Status SetMemoryOps(const StreamMemoryOps& driver, cudaGraphExec_t graph, CUgraphNode node,
                          MemoryOpKind kind, std::span<const MemoryOp> ops) {
  Params params = ParamsOf(kind, ops);
  CUDA_BATCH_MEM_OP_NODE_PARAMS node_params = {};
  node_params.ctx = driver.context;
  node_params.count = static_cast<unsigned>(ops.size());
  node_params.paramArray = params.data();
  return ToStatus(driver.set_params(graph, node, &node_params), "a graph's stream memory operations");
}

}  // namespace tandem::attention::cuda
