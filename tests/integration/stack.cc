#include "tests/integration/stack.h"

#include <cstdlib>
#include <stdexcept>

namespace tandem::integration {
namespace {

void Append(const std::vector<std::string>& more, std::vector<std::string>* args) {
  args->insert(args->end(), more.begin(), more.end());
}

}  // namespace

Stack::Stack(StackOptions options) : options_(std::move(options)) {
  experts_.resize(options_.experts.size());
  for (size_t i = 0; i < experts_.size(); ++i) StartExpert(i);
  StartAttention();
  std::vector<std::string> args = {"--engine",    attention_address(), "--listen",
                                   "127.0.0.1:0", "--grpc-listen",     gateway_address()};
  Append(options_.gateway, &args);
  gateway_ = std::make_unique<Process>("tandem-gateway", args);
}

void Stack::StartExpert(size_t index) {
  const std::string& model = options_.expert_model.empty() ? options_.model : options_.expert_model;
  std::vector<std::string> args = {"--model",          model,         "--listen",  expert_address(index),
                                   "--metrics-listen", "127.0.0.1:0", "--threads", "1"};
  Append(options_.experts[index], &args);
  experts_[index] = std::make_unique<Process>("tandem-expert", args);
}

void Stack::StartAttention() {
  std::vector<std::string> args = {"--model",           options_.model, "--listen",    attention_address(),
                                   "--metrics-listen",  "127.0.0.1:0",  "--threads",   "1",
                                   "--attach-patience", "60",           "--kv-tokens", "16384"};
  for (size_t i = 0; i < experts_.size(); ++i) Append({"--expert", expert_address(i)}, &args);
  Append(options_.attention, &args);
  attention_ = std::make_unique<Process>("tandem-attention", args);
}

::testing::AssertionResult Stack::WaitReady() {
  if (!gateway_->WaitForOutput("HTTP on .*:([0-9]+)").has_value()) {
    return ::testing::AssertionFailure() << "the gateway does not listen\n" << Logs();
  }
  const bool ready = WaitUntil([this] { return rest().Get("/ready").status == 200; });
  if (!ready) return ::testing::AssertionFailure() << "not ready\n" << Logs();
  return ::testing::AssertionSuccess();
}

int Stack::PortFromLog(Process& process, const std::string& regex) {
  const std::optional<std::string> port = process.WaitForOutput(regex);
  if (!port.has_value()) throw std::runtime_error("no port in the log:\n" + process.Output());
  return std::atoi(port->c_str());
}

int Stack::rest_port() { return PortFromLog(*gateway_, "HTTP on .*:([0-9]+)"); }
RestClient Stack::rest() { return RestClient(rest_port()); }
RestClient Stack::expert_metrics(size_t index) {
  return RestClient(PortFromLog(*experts_[index], "metrics at port ([0-9]+)"));
}
RestClient Stack::attention_metrics() {
  return RestClient(PortFromLog(*attention_, "metrics on port ([0-9]+)"));
}

std::string Stack::expert_address(size_t index) const {
  return "unix:" + (folder_ / ("expert" + std::to_string(index)));
}
std::string Stack::attention_address() const { return "unix:" + (folder_ / "attention"); }
std::string Stack::gateway_address() const { return "unix:" + (folder_ / "gateway"); }

std::string Stack::Logs() const {
  std::string all;
  for (size_t i = 0; i < experts_.size(); ++i) {
    all += "--- expert " + std::to_string(i) + "\n" + experts_[i]->Output();
  }
  all += "--- attention\n" + attention_->Output();
  if (gateway_ != nullptr) all += "--- gateway\n" + gateway_->Output();
  return all;
}

}  // namespace tandem::integration
