// tandem-expert: routed experts of a Mixture-of-Experts model, on the CPU.
#include "common/rpc/lifecycle.h"
#include "services/expert_cpu/app.h"
#include "services/expert_cpu/options.h"

int main(int argc, char** argv) {
  tandem::rpc::PrepareProcess();
  int exit_code = 0;
  const auto options = tandem::expert::ParseOptions(argc, argv, &exit_code);
  return options.has_value() ? tandem::expert::Run(*options) : exit_code;
}
