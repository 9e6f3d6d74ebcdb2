// tandem.v1.Engine over the scheduler.
#pragma once

#include <memory>
#include <string>

#include "common/gguf/gguf.h"
#include "services/attention_gpu/scheduler/scheduler.h"

namespace grpc {
class Service;
}

namespace tandem::attention {

struct EngineInfo {
  std::string model_name;
  std::string model_fingerprint;
  std::string architecture;
  int64_t vocab_size = 0;
  int32_t context_length = 0;
  int32_t max_batch_size = 0;
  int32_t max_waiting = 0;
  int64_t max_unread_tokens = 4096;  // of a stream, tokens and alternatives; past it, it is cancelled
  std::string isa;
  std::string instance_id;
  int32_t expert_processes = 0;
  std::string metadata;  // a GGUF header without tensors
};

// Answers UNAVAILABLE with the latest progress text until SetReady. Thread-safe.
class EngineService {
 public:
  EngineService();
  ~EngineService();
  grpc::Service* service();
  static std::string name();  // of the service, for health checks

  void SetProgress(const std::string& text);
  // `scheduler` must outlive the service's server.
  void SetReady(EngineInfo info, Scheduler* scheduler);
  // What EngineDescription.degraded says.
  void SetDegraded(const std::string& why);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::attention
