// For the tests of common/rpc: a temporary folder and a service that answers with what it got.
#pragma once

#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <string>

#include "absl/time/clock.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::rpc::testing {

class TempFolder {
 public:
  TempFolder() {
    char name[] = "/tmp/tandem_rpc_XXXXXX";
    path_ = mkdtemp(name);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& file) const { return path_ + "/" + file; }

 private:
  std::string path_;
};

// Describe takes `describe_milliseconds`; Forward echoes the activations as the answer.
class EchoExperts : public v1::Experts::Service {
 public:
  grpc::Status Describe(grpc::ServerContext* context, const v1::DescribeRequest*,
                        v1::ShardDescription* answer) override {
    started = true;
    const absl::Time end = absl::Now() + absl::Milliseconds(describe_milliseconds.load());
    while (absl::Now() < end) {
      if (context->IsCancelled()) {
        cancelled = true;
        return grpc::Status::CANCELLED;
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
    answer->set_model_name("echo");
    return grpc::Status::OK;
  }

  grpc::Status Forward(grpc::ServerContext*,
                       grpc::ServerReaderWriter<v1::ForwardResponse, v1::ForwardRequest>* stream) override {
    v1::ForwardRequest request;
    while (stream->Read(&request)) {
      v1::ForwardResponse response;
      response.set_sequence(request.sequence());
      response.set_answer(request.activations());
      if (!stream->Write(response)) break;
    }
    return grpc::Status::OK;
  }

  std::atomic<int> describe_milliseconds{0};
  std::atomic<bool> started{false};
  std::atomic<bool> cancelled{false};
};

}  // namespace tandem::rpc::testing
