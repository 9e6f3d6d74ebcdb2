#include "cli/plan/model_bytes.h"

#include "common/base/status_macros.h"
#include "common/model/tensors.h"

namespace tandem::cli {
namespace {

// Adds one tensor of `values` values to where it belongs.
void Add(const std::string& name, uint64_t values, uint64_t bytes, ModelBytes* m) {
  m->parameters += values;
  if (model::IsRoutedExpertTensor(name)) {
    m->routed += bytes;
    return;
  }
  if (name == "token_embd.weight") {
    m->embedding += bytes;
    return;
  }
  m->dense_values += values;
  (name.find("_shexp.") != std::string::npos ? m->shared : m->every_step) += bytes;
}

uint64_t Values(const auto& ne) {
  uint64_t values = 1;
  for (const int64_t n : ne) values *= static_cast<uint64_t>(n);
  return values;
}

}  // namespace

double ModelBytes::ExpertBytes() const {
  const int64_t experts = config.num_moe_layers() * config.n_routed_experts;
  return experts > 0 ? static_cast<double>(routed) / static_cast<double>(experts) : 0.0;
}

double ModelBytes::RoutedMacs() const {
  return 3.0 * static_cast<double>(config.hidden_size * config.moe_intermediate_size) *
         static_cast<double>(config.num_experts_per_tok * config.num_moe_layers());
}

absl::StatusOr<ModelBytes> BytesOfFile(const gguf::File& file) {
  ModelBytes m;
  TANDEM_ASSIGN_OR_RETURN(m.config, model::ReadModelConfig(file));
  TANDEM_ASSIGN_OR_RETURN(const model::ModelTensors tensors, model::BindTensors(file, m.config));
  for (int64_t layer = 0; layer < m.config.num_hidden_layers; ++layer) {
    if (m.config.n_routed_experts == 0 || !m.config.IsMoe(layer)) continue;
    TANDEM_RETURN_IF_ERROR(model::BindExperts(file, m.config, layer).status());
  }
  for (const gguf::Tensor& t : file.tensors()) Add(t.name, Values(t.ne), t.nbytes, &m);
  if (tensors.output == tensors.token_embd) {  // one table for both ends: read whole at the second
    m.every_step += m.embedding;
    m.dense_values += Values(tensors.output->ne);
    m.embedding = 0;
  }
  return m;
}

ModelBytes BytesOfPlan(const SynthPlan& plan) {
  ModelBytes m;
  m.config = plan.config;
  for (const SynthTensor& t : plan.tensors) Add(t.name, Values(t.ne), t.nbytes(), &m);
  return m;
}

}  // namespace tandem::cli
