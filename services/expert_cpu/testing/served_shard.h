// What tests of the service have in common: a small model's shard and a server for it on a Unix socket.
#pragma once

#include <memory>
#include <string>

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "services/expert_cpu/service.h"
#include "services/expert_cpu/testing/synthetic_model.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::expert::testing {

class ServedShard : public ::testing::Test {
 protected:
  ServedShard(const std::string& name, const Identity& identity)
      : address_("unix:/tmp/tandem_" + name + "_" + std::to_string(getpid()) + ".sock"),
        service_(metrics_, progress_, identity) {}

  void Load(int64_t max_tokens, double read_ceiling) {
    auto shard = Shard::Load(model_.path(), {});
    ASSERT_TRUE(shard.ok()) << shard.status();
    shard_ = std::move(*shard);
    Moe::Options options;
    options.max_tokens = max_tokens;
    moe_ = std::make_unique<Moe>(*shard_, pool_, options);
    service_.SetReady(*shard_, *moe_, read_ceiling);
  }

  void Serve() {
    rpc::ServerOptions options;
    options.listen = {address_};
    auto server = rpc::Server::Start(options, {service_.service()});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    channel_ = *rpc::Connect(server_->addresses()[0]);
    stub_ = v1::Experts::NewStub(channel_);
  }

  const std::string address_;
  SyntheticModel model_{SyntheticShape{}};
  telemetry::Metrics metrics_{"expert"};
  LoadProgress progress_;
  threading::ThreadPool pool_{[] {
    threading::ThreadPool::Options options;
    options.threads = 2;
    return options;
  }()};
  std::unique_ptr<Shard> shard_;
  std::unique_ptr<Moe> moe_;
  ExpertsService service_;
  std::unique_ptr<rpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Experts::Stub> stub_;
};

}  // namespace tandem::expert::testing
