// The three services of one model, connected over Unix sockets in a folder of their own.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "common/testing/process.h"
#include "tests/integration/rest_client.h"

namespace grpc {
class Channel;
}

namespace tandem::integration {

using testing::BinaryPath;
using testing::DemoModel;
using testing::kPatience;
using testing::Process;
using testing::SourcePath;
using testing::TempFolder;
using testing::WaitUntil;

struct StackOptions {
  std::string model = DemoModel();
  std::string expert_model;  // empty: the same
  // Additional flags; one list for each expert process.
  std::vector<std::vector<std::string>> experts = {{}};
  std::vector<std::string> attention;
  std::vector<std::string> gateway;
};

class Stack {
 public:
  // Starts everything; WaitReady says when it serves.
  explicit Stack(StackOptions options = {});

  // Until /ready says yes. The failure holds the logs.
  ::testing::AssertionResult WaitReady();

  // Starts the program, also in place of one that has ended; the addresses stay, but not the ports of
  // metrics.
  void StartExpert(size_t index);
  void StartAttention();
  Process& expert(size_t index = 0) { return *experts_[index]; }
  Process& attention() { return *attention_; }
  Process& gateway() { return *gateway_; }

  RestClient rest();
  int rest_port();
  RestClient expert_metrics(size_t index = 0);  // for Metric()
  RestClient attention_metrics();

  // "unix:..." of their gRPC ports.
  std::string expert_address(size_t index = 0) const;
  std::string attention_address() const;
  std::string gateway_address() const;

  std::string Logs() const;

 private:
  int PortFromLog(Process& process, const std::string& regex);

  TempFolder folder_;
  const StackOptions options_;
  std::vector<std::unique_ptr<Process>> experts_;
  std::unique_ptr<Process> attention_;
  std::unique_ptr<Process> gateway_;
};

}  // namespace tandem::integration
