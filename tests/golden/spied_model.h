// The bundled model on the CPU backend, with experts that show what they are asked (spied_experts.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "tests/golden/golden_prompts.h"
#include "tests/golden/local_experts.h"
#include "tests/golden/spied_experts.h"

namespace tandem::golden {

struct SpiedModel {
  static constexpr int32_t kPageTokens = 32;

  SpiedModel(int32_t defer_experts, int32_t pages) {
    const std::string path = SourceDir() + "/models/tinyr1-Q4_K_M.gguf";
    file = std::move(*gguf::File::Open(path));
    config = *model::ReadModelConfig(*file);
    attention::CpuBackendOptions o;
    o.threads.threads = 2;
    o.page_tokens = kPageTokens;
    o.page_count = pages;
    o.defer_experts = defer_experts;
    auto experts = std::move(*MakeLocalExperts(path, {{}}, kernels::Precision::kFast, 2));
    backend = std::move(*attention::CreateCpuBackend(
        *file, config, o, std::make_unique<SpiedExperts>(std::move(experts), config.hidden_size, spy)));
  }

  std::unique_ptr<gguf::File> file;
  model::ModelConfig config;
  Spy spy;
  std::unique_ptr<attention::Backend> backend;
};

}  // namespace tandem::golden
