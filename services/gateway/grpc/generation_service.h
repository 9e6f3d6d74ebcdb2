// The Generation service: what the REST interface does, for gRPC clients.
#pragma once

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "services/gateway/admission/admission.h"
#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/session.h"
#include "services/gateway/session/work_queue.h"

namespace grpc {
class Service;
}

namespace tandem::gateway {

struct GenerationServiceOptions {
  std::string api_key;  // empty: none; else the metadata "authorization: Bearer KEY" is asked for
  float temperature = 0.6f;
  float top_p = 0.95f;
  absl::Duration request_timeout = absl::InfiniteDuration();
  size_t max_output_bytes = 4 << 20;  // unsent text of one stream; beyond, it is cancelled
};

// What the service works on; all must outlive it.
struct GenerationServiceParts {
  EnginePool* engines;
  Admission* admission;
  SessionEnvironment* sessions;
  GatewayMetrics* metrics;
  WorkQueue* work;
};

std::string GenerationServiceName();  // for health checks
std::unique_ptr<grpc::Service> MakeGenerationService(const GenerationServiceOptions& options,
                                                     const GenerationServiceParts& parts);

}  // namespace tandem::gateway
