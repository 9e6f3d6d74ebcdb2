#include "services/attention_gpu/backend/cuda/step_graph.h"

#include "common/base/status_macros.h"

namespace tandem::attention::cuda {

absl::StatusOr<std::unique_ptr<StepGraph>> StepGraph::Capture(cudaStream_t stream, Bell* bell,
                                                              const std::function<absl::Status()>& put) {
  std::unique_ptr<StepGraph> out(new StepGraph());
  out->bell_ = bell;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
  if (bell != nullptr) bell->Record(&out->bell_nodes_);
  absl::Status status = put();
  if (bell != nullptr) bell->Record(nullptr);
  // Also after an error: the stream must leave the capture.
  status.Update(ToStatus(cudaStreamEndCapture(stream, &out->graph_), "capturing a step"));
  TANDEM_RETURN_IF_ERROR(status);
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaGraphGetNodes(out->graph_, nullptr, &out->node_count_), "capturing a step"));
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaGraphInstantiate(&out->exec_, out->graph_, 0), "a step's graph"));
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaGraphUpload(out->exec_, stream), "a step's graph"));
  return out;
}

StepGraph::~StepGraph() {
  if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
  if (graph_ != nullptr) cudaGraphDestroy(graph_);
}

absl::Status StepGraph::Launch(cudaStream_t stream) {
  if (bell_ != nullptr) TANDEM_RETURN_IF_ERROR(bell_->Renew(exec_, bell_nodes_));
  return ToStatus(cudaGraphLaunch(exec_, stream), "launching a step");
}

}  // namespace tandem::attention::cuda
