#include <cstdio>

#include "common/rpc/lifecycle.h"
#include "common/telemetry/log.h"
#include "services/attention_gpu/service/engine.h"
#include "services/attention_gpu/service/options.h"

int main(int argc, char** argv) {
  tandem::rpc::PrepareProcess();
  const tandem::attention::ParsedOptions parsed = tandem::attention::ParseOptions(argc, argv);
  if (!parsed.run) return parsed.exit_code;
  tandem::rpc::StopSignal stop;
  tandem::telemetry::InitLog("attention");
  const absl::Status status = tandem::attention::RunEngine(parsed.options, stop);
  if (!status.ok()) {
    spdlog::error("{}", std::string(status.message()));
    return 1;
  }
  return 0;
}
