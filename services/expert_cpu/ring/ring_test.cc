// Attach as a client may use it that keeps to no rule: bad openings, regions filled with anything.
#include <gmock/gmock.h>

#include <cstring>
#include <random>

#include "absl/time/clock.h"
#include "common/shm/call_client.h"
#include "common/shm/handover.h"
#include "services/expert_cpu/testing/served_shard.h"

namespace tandem::expert {
namespace {

using ::testing::HasSubstr;

class RingTest : public testing::ServedShard {
 protected:
  RingTest() : ServedShard("ring_test", {}) {
    Load(/*max_tokens=*/8, /*read_ceiling=*/0);
    RingOptions ring;
    ring.socket_path = RingSocketPath(address_);
    ring.lease = absl::Milliseconds(400);
    EXPECT_TRUE(service_.EnableRing(ring).ok());
    Serve();
  }

  static v1::AttachRequest Open(uint32_t max_tokens, uint32_t pairs, uint32_t slots) {
    v1::AttachRequest request;
    request.mutable_open()->set_max_tokens(max_tokens);
    request.mutable_open()->set_experts_per_token(pairs);
    request.mutable_open()->set_slots(slots);
    return request;
  }

  // A session as the client holds it.
  struct Session {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>> stream;
    v1::AttachResponse response;
    shm::RegionLayout layout;
    shm::SharedMemory memory;
    shm::SessionId id;
    ~Session() {
      context.TryCancel();
      stream->Finish();
    }
  };
  std::unique_ptr<Session> Attach() {
    auto s = std::make_unique<Session>();
    s->context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    s->stream = stub_->Attach(&s->context);
    EXPECT_TRUE(s->stream->Write(Open(8, 2, 2)));
    EXPECT_TRUE(s->stream->Read(&s->response));
    const v1::AttachRegion& region = s->response.region();
    s->layout = *shm::RegionLayout::Of({2, 8, 2, 256});
    EXPECT_EQ(region.region_bytes(), s->layout.region_bytes());
    s->id = {region.epoch(), region.first_sequence()};
    auto fd = shm::ReceiveDescriptor(region.socket_path(), region.token(), absl::Seconds(10));
    EXPECT_TRUE(fd.ok()) << fd.status();
    s->memory = *shm::SharedMemory::Adopt(*std::move(fd), region.region_bytes());
    EXPECT_TRUE(shm::CallClient::CheckHeader(s->memory.data(), s->layout, s->id).ok());
    return s;
  }
};

TEST_F(RingTest, RefusesBadOpenings) {
  std::vector<v1::AttachRequest> bad = {Open(0, 2, 1), Open(9, 2, 1), Open(8, 0, 1),  Open(8, 5, 1),
                                        Open(8, 2, 0), Open(8, 2, 3), Open(8, 2, 16), v1::AttachRequest()};
  bad.emplace_back().mutable_heartbeat()->set_count(1);
  for (const v1::AttachRequest& request : bad) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
    auto stream = stub_->Attach(&context);
    stream->Write(request);
    v1::AttachResponse response;
    EXPECT_FALSE(stream->Read(&response)) << request.DebugString();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT) << request.DebugString();
  }
}

TEST_F(RingTest, ASilentClientLosesItsLease) {
  const auto s = Attach();
  v1::AttachRequest beat;
  for (uint64_t i = 1; i <= 8; ++i) {  // twice the lease
    beat.mutable_heartbeat()->set_count(i);
    ASSERT_TRUE(s->stream->Write(beat));
    ASSERT_TRUE(s->stream->Read(&s->response));
    EXPECT_EQ(s->response.heartbeat().count(), i);
    absl::SleepFor(absl::Milliseconds(100));
  }
  const absl::Time before = absl::Now();
  EXPECT_FALSE(s->stream->Read(&s->response));
  EXPECT_LT(absl::Now() - before, absl::Seconds(20));
}

TEST_F(RingTest, NoMoreSessionsThanThereIsRoomFor) {
  std::vector<std::unique_ptr<Session>> sessions;
  for (int i = 0; i < 16; ++i) sessions.push_back(Attach());
  grpc::ClientContext context;
  auto stream = stub_->Attach(&context);
  stream->Write(Open(8, 2, 1));
  v1::AttachResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

// Every call is answered, with an error or not, or ends its own session; another client notices nothing.
TEST_F(RingTest, SurvivesRegionsFullOfAnything) {
  std::mt19937_64 random(3);
  int good = 0, refused = 0, ended = 0;
  for (int round = 0; round < 40; ++round) {
    const auto s = Attach();
    shm::CallClient client(s->memory.data(), s->layout, s->id, {});
    for (int n = 0; n < 10; ++n) {
      const auto rows = static_cast<uint32_t>(random() % 9);
      auto to = client.Prepare(1, rows, 2, shm::ValueType::kF32, shm::ValueType::kF64);
      ASSERT_TRUE(to.ok());
      for (uint8_t& b : to->ids) b = random() % 8 == 0 ? static_cast<uint8_t>(random()) : 0;
      for (uint8_t& b : to->weights) b = static_cast<uint8_t>(random());  // NaN, infinity, anything
      for (uint8_t& b : to->input) b = static_cast<uint8_t>(random());
      shm::SlotControl& control = s->layout.Control(s->memory.data(), (s->id.first_sequence + n) % 2);
      if (random() % 4 == 0) control.request.layer = static_cast<uint32_t>(random());
      if (random() % 4 == 0) control.request.rows = static_cast<uint32_t>(random() % 12);
      if (random() % 4 == 0) control.request.pairs = static_cast<uint32_t>(random() % 4);
      if (random() % 8 == 0) control.request.input_type = static_cast<uint32_t>(random() % 5);
      if (random() % 8 == 0) control.request.output_type = static_cast<uint32_t>(random() % 5);
      if (random() % 4 == 0) control.request.precision = static_cast<uint32_t>(random() % 3);
      const bool out_of_turn = random() % 16 == 0;
      if (out_of_turn) control.request.sequence = random();
      std::memset(s->memory.data().data(), static_cast<int>(random()), shm::kHeaderBytes);
      ASSERT_TRUE(client.Ring().ok());
      const auto answer =
          client.Await(absl::Now() + (out_of_turn ? absl::Milliseconds(30) : absl::Seconds(30)));
      EXPECT_EQ(answer.ok(), !out_of_turn) << answer.status();
      if (!answer.ok()) {
        ++ended;
        EXPECT_FALSE(s->stream->Read(&s->response)) << "the session goes on";
        break;
      }
      ++(answer->status.ok() ? good : refused);
    }
  }
  EXPECT_GT(good, 10);
  EXPECT_GT(refused, 50);
  EXPECT_GT(ended, 5);
  v1::ShardDescription description;
  grpc::ClientContext context;
  EXPECT_TRUE(stub_->Describe(&context, {}, &description).ok());
}

TEST_F(RingTest, StopEndsSessions) {
  const auto s = Attach();
  service_.Stop();
  EXPECT_FALSE(s->stream->Read(&s->response));
  server_->Shutdown(absl::Seconds(20));
}

TEST(RingSocketPathTest, BesideTheSocketOrNamedAfterTheAddress) {
  EXPECT_EQ(RingSocketPath("unix:/run/tandem/x0.sock"), "/run/tandem/x0.sock.ring");
  EXPECT_EQ(RingSocketPath("unix:///run/tandem/x0.sock"), "/run/tandem/x0.sock.ring");
  EXPECT_EQ(RingSocketPath("unix:x0.sock").front(), '/');
  const std::string tcp = RingSocketPath("127.0.0.1:10020");
  EXPECT_THAT(tcp, HasSubstr("-127_0_0_1_10020"));
  EXPECT_EQ(tcp.front(), '/');
  const std::string deep = "unix:/" + std::string(101, 'd');  // itself not too long
  EXPECT_LE(RingSocketPath(deep).size(), 107u);
}

}  // namespace
}  // namespace tandem::expert
