// An engine for tests: the Engine service over the demo model's tokenizer, with tokens from a script.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/rpc/server.h"
#include "common/tokenizer/tokenizer.h"
#include "tandem/v1/engine.grpc.pb.h"

namespace tandem::gateway::testing {

// Says the same text to everybody. What it says depends on the position alone, so a sequence that is cut off
// and resumed must come out whole.
class FakeEngine final : public v1::Engine::Service {
 public:
  FakeEngine();
  ~FakeEngine() override;

  // (Re)starts the server, on the same Unix socket each time.
  void Start();
  void Stop();  // as kill -9 would: calls break off
  const std::string& address() const { return address_; }

  struct Script {
    std::string text = "hm\n</think>\n\nHello there.";
    std::chrono::microseconds delay{0};  // before each token
    std::optional<int> fail_after;       // tokens of a call, then `failure`
    grpc::Status failure;
    int tokens_per_event = 1;
    bool finish = true;  // false: the call ends without a reason
    bool hang = false;   // no token until cancelled
    bool stay = false;   // after the text, which then has no end, until cancelled
  };
  void SetScript(Script script);
  void SetServing(bool serving) { serving_.store(serving); }
  void SetDegraded(const std::string& why);
  void SetContext(uint32_t tokens) { context_.store(tokens); }

  std::vector<v1::GenerateRequest> requests() const;
  int cancelled() const { return cancelled_.load(); }
  bool WaitCancelled(int count) const;
  int running() const { return running_.load(); }
  const tokenizer::Tokenizer& tokenizer() const { return *tokenizer_; }

  grpc::Status Describe(grpc::ServerContext*, const v1::DescribeEngineRequest*,
                        v1::EngineDescription*) override;
  grpc::Status ReadMetadata(grpc::ServerContext*, const v1::ReadMetadataRequest*,
                            grpc::ServerWriter<v1::MetadataChunk>*) override;
  grpc::Status Generate(grpc::ServerContext*, const v1::GenerateRequest*,
                        grpc::ServerWriter<v1::GenerateEvent>*) override;

 private:
  std::string metadata_;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer_;
  std::string address_;
  std::unique_ptr<rpc::Server> server_;
  std::atomic<bool> serving_{true};
  std::atomic<uint32_t> context_{4096};
  std::atomic<int> instance_{0};
  std::atomic<int> cancelled_{0};
  std::atomic<int> running_{0};
  mutable std::mutex mutex_;
  Script script_;
  std::string degraded_;
  std::vector<v1::GenerateRequest> requests_;
};

// Of the demo model in the repository.
std::string DemoModelPath();

}  // namespace tandem::gateway::testing
