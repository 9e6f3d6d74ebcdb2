#include "services/attention_gpu/service/engine_service.h"

#include <filesystem>
#include <thread>

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "services/attention_gpu/scheduler/hash_backend.h"
#include "tandem/v1/engine.grpc.pb.h"

namespace tandem::attention {
namespace {

using testing::HasSubstr;

constexpr int32_t kContext = 6000;

class EngineServiceTest : public testing::Test {
 protected:
  EngineServiceTest() {
    SchedulerOptions o;
    o.context_length = kContext;
    o.max_batch_size = 4;
    o.max_waiting = 4;
    o.chunk_size = 32;
    o.vocab_size = kHashVocab;
    o.expert_patience = absl::Milliseconds(100);
    scheduler_ =
        std::move(*Scheduler::Create(o, std::make_unique<HashBackend>(kContext / kHashPageTokens, script_)));
    rpc::ServerOptions s;
    path_ =
        absl::StrCat(std::filesystem::temp_directory_path().string(), "/tandem_engine_service_", getpid());
    s.listen = {"unix:" + path_};
    server_ = std::move(*rpc::Server::Start(s, {service_.service()}));
    stub_ = v1::Engine::NewStub(*rpc::Connect(s.listen[0]));
  }
  ~EngineServiceTest() override {
    server_->Shutdown(absl::Seconds(1));
    server_.reset();
    scheduler_.reset();
    std::filesystem::remove(path_);
  }
  void Ready(int64_t max_unread_tokens = 4096) {
    EngineInfo info;
    info.max_unread_tokens = max_unread_tokens;
    service_.SetReady(info, scheduler_.get());
  }
  static v1::GenerateRequest Request(int prompt, uint32_t n) {
    v1::GenerateRequest r;
    for (int i = 0; i < prompt; ++i) r.add_prompt_tokens(i % kHashVocab);
    r.set_max_new_tokens(n);
    return r;
  }
  struct Got {
    std::vector<int32_t> tokens;
    grpc::Status status;
    v1::GenerateEvent last;
  };
  Got Ask(const v1::GenerateRequest& request, absl::Duration deadline = absl::Seconds(60)) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
    auto reader = stub_->Generate(&context, request);
    Got got;
    v1::GenerateEvent e;
    while (reader->Read(&e)) {
      for (const auto& t : e.tokens()) got.tokens.push_back(t.token());
      got.last = e;
    }
    got.status = reader->Finish();
    return got;
  }
  void WaitUntilIdle() {
    while (scheduler_->Snapshot().running + scheduler_->Snapshot().waiting > 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(scheduler_->Snapshot().kv.used, 0);
  }

  HashScript script_;
  EngineService service_;
  std::string path_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<rpc::Server> server_;
  std::unique_ptr<v1::Engine::Stub> stub_;
};

TEST_F(EngineServiceTest, SaysWhatItWaitsForUntilItIsReady) {
  service_.SetProgress("counting the weights");
  const Got got = Ask(Request(3, 3));
  EXPECT_EQ(got.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(got.status.error_message(), HasSubstr("counting the weights"));
  Ready();
  EXPECT_TRUE(Ask(Request(3, 3)).status.ok());
}

TEST_F(EngineServiceTest, TokensAndStatistics) {
  Ready();
  const v1::GenerateRequest request = Request(50, 20);
  const std::vector<int32_t> prompt(request.prompt_tokens().begin(), request.prompt_tokens().end());
  for (const uint32_t cached : {0u, 49u}) {
    const Got got = Ask(request);
    ASSERT_TRUE(got.status.ok()) << got.status.error_message();
    EXPECT_EQ(got.tokens, HashAnswer(prompt, 20));
    EXPECT_EQ(got.last.finish_reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(got.last.statistics().prompt_tokens(), 50u);
    EXPECT_EQ(got.last.statistics().cached_prompt_tokens(), cached);
    EXPECT_EQ(got.last.statistics().generated_tokens(), 20u);
  }
}

// A reader that reads nothing: its stream is given up at the bound, and it hears of it once it reads again.
TEST_F(EngineServiceTest, AReaderThatFallsBehindIsCutOff) {
  Ready(/*max_unread_tokens=*/2000);
  grpc::ClientContext context;
  v1::GenerateRequest request = Request(3, kContext - 10);
  request.set_top_logprobs(20);  // so that what fits the connection's window is soon full
  const std::vector<int32_t> prompt(request.prompt_tokens().begin(), request.prompt_tokens().end());
  // A window that stays small: gRPC widens it where it finds the connection fast, up to all of this answer.
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 65536);
  const auto stub = v1::Engine::NewStub(
      grpc::CreateCustomChannel("unix:" + path_, grpc::InsecureChannelCredentials(), arguments));
  auto reader = stub->Generate(&context, request);
  WaitUntilIdle();
  std::vector<int32_t> tokens;
  v1::GenerateEvent e;
  while (reader->Read(&e)) {
    for (const auto& t : e.tokens()) tokens.push_back(t.token());
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("tokens behind"));
  EXPECT_LT(tokens.size(), static_cast<size_t>(kContext - 10));
  EXPECT_EQ(tokens, HashAnswer(prompt, static_cast<int>(tokens.size()))) << "no gap in what came";
}

TEST_F(EngineServiceTest, ACallThatIsCancelledFreesItsPages) {
  Ready();
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Request(3, kContext - 10));
  v1::GenerateEvent e;
  ASSERT_TRUE(reader->Read(&e));
  context.TryCancel();
  WaitUntilIdle();
  while (reader->Read(&e)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// Also one whose cancellation comes while a token is being written: else the server would wait for it for
// ever.
TEST_F(EngineServiceTest, CancelledCallsEnd) {
  Ready();
  for (int i = 0; i < 1000; ++i) {
    grpc::ClientContext context;
    auto reader = stub_->Generate(&context, Request(3, kContext - 10));
    v1::GenerateEvent e;
    ASSERT_TRUE(reader->Read(&e));
    for (int more = i % 8; more > 0; --more) reader->Read(&e);
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    WaitUntilIdle();
  }
  server_->Shutdown(absl::InfiniteDuration());  // comes back only when all calls have ended
}

TEST_F(EngineServiceTest, DeadlinesAreKeptForWhatRunsAndWhatWaits) {
  Ready();
  script_.Hold();
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([this] {
      const Got got = Ask(Request(3, kContext - 10), absl::Milliseconds(100));
      EXPECT_EQ(got.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
    });
  }
  for (std::thread& t : threads) t.join();
  script_.Go();
  WaitUntilIdle();
}

// By its code whoever calls tells it from an engine that is gone.
TEST_F(EngineServiceTest, PatienceThatHasEndedIsAborted) {
  Ready();
  script_.FailSteps({absl::UnavailableError("expert gone")});
  script_.SetRecovery(absl::UnavailableError("connection refused"));
  const Got got = Ask(Request(3, 3));
  EXPECT_EQ(got.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(got.status.error_message(), HasSubstr("connection refused; not back within 100ms"));
}

TEST_F(EngineServiceTest, RefusalsNameTheirReason) {
  Ready();
  EXPECT_EQ(Ask(Request(0, 5)).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Ask(Request(kContext, 5)).status.error_code(), grpc::StatusCode::OUT_OF_RANGE);
  script_.Hold();
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this] { EXPECT_TRUE(Ask(Request(3, 2)).status.ok()); });
  }
  while (scheduler_->Snapshot().running + scheduler_->Snapshot().waiting < 8) std::this_thread::yield();
  const Got refused = Ask(Request(3, 2));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("queue is full"));
  script_.Go();
  for (std::thread& t : threads) t.join();
}

}  // namespace
}  // namespace tandem::attention
