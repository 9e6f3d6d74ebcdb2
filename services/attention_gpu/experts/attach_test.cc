// Attaching to an expert process that is lost meanwhile.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "common/rpc/server.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

// Says that it serves, cannot be had twice, and is of another model then.
class LostTwice : public v1::Experts::Service {
 public:
  grpc::Status Describe(grpc::ServerContext*, const v1::DescribeRequest*,
                        v1::ShardDescription* shard) override {
    if (++asked <= 2) return {grpc::StatusCode::UNAVAILABLE, "gone"};
    shard->set_model_fingerprint("another");
    return grpc::Status::OK;
  }
  std::atomic<int> asked = 0;
};

TEST(AttachTest, BeginsAnewWithAProcessThatIsLostMeanwhile) {
  LostTwice service;
  rpc::ServerOptions at;
  at.listen = {absl::StrCat("unix:", ::testing::TempDir(), "/tandem_attach_", getpid(), ".sock")};
  auto server = rpc::Server::Start(at, {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  (*server)->SetServing(true);
  ExpertOptions options;
  options.addresses = at.listen;
  options.attach_patience = absl::Seconds(60);
  // What waiting cannot mend is said at once.
  EXPECT_EQ(ConnectExperts(options, {}, "ours").status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(service.asked, 3);

  service.asked = 0;
  options.attach_patience = absl::Milliseconds(20);
  EXPECT_FALSE(ConnectExperts(options, {}, "ours").ok());
  EXPECT_LT(service.asked, 3) << "the patience ends between two tries";
}

}  // namespace
}  // namespace tandem::attention
