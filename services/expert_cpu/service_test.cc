// The gRPC service over a Unix socket.
#include "services/expert_cpu/service.h"

#include <gmock/gmock.h>

#include <cstring>
#include <thread>

#include "absl/time/clock.h"
#include "services/expert_cpu/testing/served_shard.h"

namespace tandem::expert {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::RandomFloats;
using testing::RandomIds;

constexpr auto kInvalid = static_cast<uint32_t>(absl::StatusCode::kInvalidArgument);
constexpr auto kNotFound = static_cast<uint32_t>(absl::StatusCode::kNotFound);

template <typename T>
std::string Packed(const std::vector<T>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
}

class ServiceTest : public testing::ServedShard {
 protected:
  ServiceTest() : ServedShard("service", {.numa_node = 1, .threads = 2}) { Serve(); }

  void MakeReady() { Load(/*max_tokens=*/64, /*read_ceiling=*/1e9); }

  v1::ForwardRequest Request(uint64_t sequence, int64_t n) const {
    v1::ForwardRequest request;
    request.set_sequence(sequence);
    request.set_layer(1);
    request.set_n_tokens(static_cast<uint32_t>(n));
    request.set_experts_per_token(2);
    request.set_expert_ids(Packed(RandomIds(n, 2, 4, sequence)));
    request.set_expert_weights(Packed(RandomFloats(n * 2, sequence)));
    request.set_activations(Packed(RandomFloats(n * 256, sequence + 1)));
    request.set_activation_type(v1::DATA_TYPE_F32);
    request.set_answer_type(v1::DATA_TYPE_F32);
    return request;
  }

  // What the service must answer, from the Moe itself.
  std::string Direct(const v1::ForwardRequest& request) {
    const auto bytes = [](const std::string& s) {
      return std::span<const uint8_t>(reinterpret_cast<const uint8_t*>(s.data()), s.size());
    };
    Call call;
    call.layer = request.layer();
    call.n_tokens = request.n_tokens();
    call.experts_per_token = request.experts_per_token();
    call.expert_ids = bytes(request.expert_ids());
    call.expert_weights = bytes(request.expert_weights());
    call.activations = bytes(request.activations());
    call.bulk = request.precision() == v1::PRECISION_BULK;
    std::string answer(moe_->AnswerBytes(call.n_tokens, call.answer_type), '\0');
    EXPECT_TRUE(moe_->Forward(call, {reinterpret_cast<uint8_t*>(answer.data()), answer.size()}).ok());
    return answer;
  }

  grpc::Status Describe(v1::ShardDescription& out) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    return stub_->Describe(&context, {}, &out);
  }
};

TEST_F(ServiceTest, TellsTheProgressWhileLoading) {
  v1::ShardDescription description;
  grpc::Status status = Describe(description);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("loading"));
  progress_.bytes_total = 4'000'000'000;
  progress_.bytes_read = 1'000'000'000;
  status = Describe(description);
  EXPECT_THAT(status.error_message(), HasSubstr("loading: 25 % (1.00 of 4.00 GB)"));
  grpc::ClientContext context;
  auto stream = stub_->Forward(&context);
  stream->Write(Request(1, 1));
  v1::ForwardResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ServiceTest, DescribesTheShard) {
  MakeReady();
  v1::ShardDescription d;
  ASSERT_TRUE(Describe(d).ok());
  EXPECT_EQ(d.model_fingerprint(), shard_->fingerprint());
  EXPECT_EQ(d.model_name(), "synthetic");
  EXPECT_EQ(d.hidden_size(), 256u);
  EXPECT_EQ(d.moe_intermediate_size(), 256u);
  EXPECT_EQ(d.n_routed_experts(), 4u);
  EXPECT_EQ(d.num_experts_per_tok(), 2u);
  EXPECT_THAT(d.layers(), ElementsAre(1u));
  EXPECT_EQ(d.expert_begin(), 0u);
  EXPECT_EQ(d.expert_end(), 4u);
  EXPECT_EQ(d.row_begin(), 0u);
  EXPECT_EQ(d.row_end(), 256u);
  EXPECT_THAT(d.weight_types(), ElementsAre("Q4_K", "Q6_K"));
  EXPECT_EQ(d.isa(), std::string(kernels::IsaName(kernels::ActiveIsa())));
  EXPECT_EQ(d.numa_node(), 1);
  EXPECT_EQ(d.threads(), 2u);
  EXPECT_EQ(d.max_tokens(), 64u);
  EXPECT_EQ(d.precision(), v1::PRECISION_FAST);
  EXPECT_EQ(d.resident_bytes(), shard_->resident_bytes());
  EXPECT_EQ(d.instance_id().size(), 16u);
  ExpertsService other(metrics_, progress_, {});
  (void)other;
}

TEST_F(ServiceTest, AnswersInOrderAndGoesOnAfterBadCalls) {
  MakeReady();
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
  auto stream = stub_->Forward(&context);
  std::vector<v1::ForwardRequest> requests;
  requests.push_back(Request(10, 3));
  requests.push_back(Request(11, 3));
  requests.back().set_layer(7);  // not held
  requests.push_back(Request(12, 3));
  requests.back().set_n_tokens(4);  // announces more than there is
  requests.push_back(Request(13, 3));
  requests.back().set_activation_type(v1::DATA_TYPE_F64);
  requests.push_back(Request(14, 3));
  requests.back().set_answer_type(v1::DATA_TYPE_UNSPECIFIED);
  requests.push_back(Request(15, 3));
  requests.back().set_n_tokens(0xffffffff);
  requests.push_back(Request(16, 3));
  requests.back().set_expert_ids(Packed(std::vector<int32_t>{0, 1, 2, 3, 0, 99}));
  requests.push_back(Request(17, 5));
  requests.push_back(Request(18, 5));
  requests.back().set_precision(v1::PRECISION_REFERENCE);  // not for a call to choose
  requests.push_back(Request(19, 40));
  requests.back().set_precision(v1::PRECISION_BULK);
  for (const v1::ForwardRequest& request : requests) ASSERT_TRUE(stream->Write(request));
  const uint32_t codes[] = {0, kNotFound, kInvalid, kInvalid, kInvalid, kInvalid, kInvalid, 0, kInvalid, 0};
  for (size_t i = 0; i < requests.size(); ++i) {
    v1::ForwardResponse response;
    ASSERT_TRUE(stream->Read(&response)) << i;
    EXPECT_EQ(response.sequence(), requests[i].sequence());
    EXPECT_EQ(response.status_code(), codes[i]) << i << ": " << response.status_message();
    if (codes[i] != 0) {
      EXPECT_TRUE(response.answer().empty());
      EXPECT_FALSE(response.status_message().empty());
      continue;
    }
    EXPECT_EQ(response.answer(), Direct(requests[i]));
    EXPECT_GT(response.compute_nanoseconds(), 0u);
    EXPECT_GT(response.weight_bytes_read(), 0u);
    EXPECT_GT(response.distinct_experts(), 0u);
  }
  stream->WritesDone();
  v1::ForwardResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
  const std::string metrics = metrics_.Expose();
  EXPECT_THAT(metrics,
              HasSubstr("tandem_expert_calls_total{service=\"expert\",numa_node=\"1\",outcome=\"ok\"} 3\n"));
  EXPECT_THAT(metrics, HasSubstr("outcome=\"error\"} 7\n"));
  EXPECT_THAT(metrics, HasSubstr("tandem_expert_call_seconds_count{service=\"expert\",numa_node=\"1\"} 3\n"));
  EXPECT_THAT(metrics, HasSubstr("tandem_expert_resident_bytes{"));
  EXPECT_THAT(metrics,
              Not(HasSubstr("tandem_expert_bandwidth_ratio{service=\"expert\",numa_node=\"1\"} 0\n")));
  EXPECT_THAT(metrics, HasSubstr("tandem_expert_bandwidth_ratio{service=\"expert\",numa_node=\"1\"} "));
}

TEST_F(ServiceTest, SeveralStreamsAtOnce) {
  MakeReady();
  std::vector<std::thread> clients;
  for (uint64_t c = 0; c < 3; ++c) {
    clients.emplace_back([&, c] {
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
      auto stream = stub_->Forward(&context);
      for (uint64_t i = 0; i < 20; ++i) {
        const v1::ForwardRequest request = Request(100 * c + i, static_cast<int64_t>(1 + i % 5));
        v1::ForwardResponse response;
        ASSERT_TRUE(stream->Write(request));
        ASSERT_TRUE(stream->Read(&response));
        EXPECT_EQ(response.answer(), Direct(request));
      }
      stream->WritesDone();
      EXPECT_TRUE(stream->Finish().ok());
    });
  }
  for (std::thread& client : clients) client.join();
}

TEST_F(ServiceTest, StopEndsIdleStreamsAtOnce) {
  MakeReady();
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
  auto stream = stub_->Forward(&context);
  v1::ForwardResponse response;
  ASSERT_TRUE(stream->Write(Request(1, 1)));
  ASSERT_TRUE(stream->Read(&response));
  const absl::Time before = absl::Now();
  service_.Stop();
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_FALSE(stream->Finish().ok());
  server_->Shutdown(absl::Seconds(20));
  EXPECT_LT(absl::Now() - before, absl::Seconds(10)) << "waited for a stream that does nothing";
}

TEST_F(ServiceTest, ClientsThatLeaveDoNoHarm) {
  MakeReady();
  for (int i = 0; i < 5; ++i) {
    grpc::ClientContext context;
    auto stream = stub_->Forward(&context);
    stream->Write(Request(1, 8));
    context.TryCancel();
    stream->Finish();
  }
  v1::ShardDescription d;
  EXPECT_TRUE(Describe(d).ok());
}

}  // namespace
}  // namespace tandem::expert
