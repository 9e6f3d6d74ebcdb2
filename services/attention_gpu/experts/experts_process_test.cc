// Calls to real expert processes over both transports; processes that are killed and come back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/gguf/gguf.h"
#include "common/testing/process.h"
#include "common/threading/thread_pool.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/round_trip.h"

namespace tandem::attention {
namespace {

using tandem::testing::DemoModel;
using tandem::testing::Process;
using ::testing::HasSubstr;

class ExpertsProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("TANDEM_BINARY_DIR") == nullptr) GTEST_SKIP() << "TANDEM_BINARY_DIR is not set";
    auto file = gguf::File::Open(DemoModel());
    ASSERT_TRUE(file.ok()) << file.status();
    fingerprint_ = (*file)->Fingerprint();
    auto config = model::ReadModelConfig(**file, "auto");
    ASSERT_TRUE(config.ok()) << config.status();
    config_ = *config;
  }

  std::string Address(int i) const {
    return absl::StrCat("unix:", ::testing::TempDir(), "/tandem_ring_", getpid(), "_", i, ".sock");
  }
  std::unique_ptr<Process> StartExpert(int i, std::vector<std::string> more = {}) const {
    std::vector<std::string> args = {"--model", DemoModel(), "--listen", Address(i), "--threads", "2"};
    args.insert(args.end(), more.begin(), more.end());
    return std::make_unique<Process>("tandem-expert", args);
  }
  absl::StatusOr<std::unique_ptr<ExpertGroup>> Connect(int processes, ExpertTransport transport,
                                                       absl::Duration timeout = absl::Seconds(60),
                                                       absl::Duration spin = absl::ZeroDuration()) const {
    ExpertOptions options;
    for (int i = 0; i < processes; ++i) options.addresses.push_back(Address(i));
    options.transport = transport;
    options.call_timeout = timeout;
    options.attach_patience = absl::Seconds(60);
    options.max_call_tokens = 64;
    options.spin = spin;
    return ConnectExperts(options, config_, fingerprint_);
  }

  struct Batch {
    ExpertCall call;
    std::vector<int32_t> ids;
    std::vector<float> weights, x;
  };
  std::unique_ptr<Batch> MakeBatch(int32_t n, uint32_t seed) const {
    auto out = std::make_unique<Batch>();
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto k = static_cast<int32_t>(config_.num_experts_per_tok);
    for (int32_t i = 0; i < n * k; ++i) {
      out->ids.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(config_.n_routed_experts)));
      out->weights.push_back(0.1F + 0.3F * std::abs(normal(random)));
    }
    for (int64_t i = 0; i < n * config_.hidden_size; ++i) out->x.push_back(normal(random));
    const auto layer = static_cast<int32_t>(config_.first_k_dense_replace + seed % config_.num_moe_layers());
    out->call = {layer, n, k, out->ids.data(), out->weights.data(), out->x.data()};
    return out;
  }
  absl::StatusOr<std::vector<float>> Call(ExpertGroup& group, int32_t n, uint32_t seed) const {
    const auto batch = MakeBatch(n, seed);
    std::vector<float> out(static_cast<size_t>(n * config_.hidden_size));
    if (const absl::Status s = group.Start(batch->call); !s.ok()) return s;
    if (const absl::Status s = group.Finish(out.data()); !s.ok()) return s;
    return out;
  }
  // Until the process is back, as the scheduler does it.
  absl::Status Recover(ExpertGroup& group) const {
    absl::Status status;
    for (int i = 0; i < 30; ++i) {
      status = group.Recover(absl::Seconds(1));
      if (status.ok()) break;
    }
    return status;
  }

  model::ModelConfig config_;
  std::string fingerprint_;
};

TEST_F(ExpertsProcessTest, BothTransportsAndAnySlicesGiveTheSameBits) {
  auto whole = StartExpert(0);
  auto over_grpc = Connect(1, ExpertTransport::kGrpc), over_ring = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(over_grpc.ok() && over_ring.ok()) << over_grpc.status() << over_ring.status();
  std::vector<std::vector<float>> want;
  for (const int32_t n : {1, 2, 5, 64}) {
    const auto seed = static_cast<uint32_t>(n);
    const auto a = Call(**over_grpc, n, seed), b = Call(**over_ring, n, seed);
    ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
    EXPECT_EQ(*a, *b) << n << " tokens";
    want.push_back(*a);
  }
  over_ring->reset();
  over_grpc->reset();
  whole = StartExpert(0, {"--experts", "0-7"});  // the other address is the same shards' rest
  const auto rest = StartExpert(1, {"--experts", "7-16"});
  for (const auto transport : {ExpertTransport::kGrpc, ExpertTransport::kRing, ExpertTransport::kAuto}) {
    auto group = Connect(2, transport);
    ASSERT_TRUE(group.ok()) << group.status();
    size_t at = 0;
    for (const int32_t n : {1, 2, 5, 64}) {
      const auto got = Call(**group, n, static_cast<uint32_t>(n));
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(*got, want[at++]) << n << " tokens";
    }
  }
}

TEST_F(ExpertsProcessTest, ErrorsOfACallLeaveTheSessionWhole) {
  const auto expert = StartExpert(0);
  auto group = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(group.ok()) << group.status();
  auto bad = MakeBatch(2, 1);
  std::vector<float> out(static_cast<size_t>(2 * config_.hidden_size));
  bad->call.layer = 0;  // dense
  ASSERT_TRUE((*group)->Start(bad->call).ok());
  absl::Status status = (*group)->Finish(out.data());
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 0 is not held"));
  bad = MakeBatch(2, 1);
  bad->ids[3] = 1000;
  ASSERT_TRUE((*group)->Start(bad->call).ok());
  status = (*group)->Finish(out.data());
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_TRUE(absl::IsInvalidArgument((*group)->Start(MakeBatch(65, 1)->call)));
  EXPECT_TRUE(Call(**group, 64, 1).ok());
  for (const int32_t n : {0, 1}) {
    EXPECT_TRUE(
        MeasureEmptyCalls(**group, bad->call.layer, n, 4, config_.hidden_size, 50, absl::Seconds(5)).ok());
  }
}

TEST_F(ExpertsProcessTest, WithoutARingAutoGoesInBand) {
  const auto expert = StartExpert(0, {"--ring", "off"});
  auto group = Connect(1, ExpertTransport::kAuto);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_TRUE(Call(**group, 1, 1).ok());
  const auto forced = Connect(1, ExpertTransport::kRing);
  EXPECT_TRUE(absl::IsFailedPrecondition(forced.status())) << forced.status();
  EXPECT_THAT(std::string(forced.status().message()), HasSubstr("no shared-memory ring"));
}

// Two ways to the same processes at once, with the same bits; one of them lives without the other.
TEST_F(ExpertsProcessTest, AnotherGroupBesideThisOne) {
  const auto first = StartExpert(0, {"--experts", "0-7"}), second = StartExpert(1, {"--experts", "7-16"});
  auto group = Connect(2, ExpertTransport::kAuto);
  ASSERT_TRUE(group.ok()) << group.status();
  auto beside = (*group)->Beside(200);
  ASSERT_TRUE(beside.ok()) << beside.status();
  EXPECT_NE((*beside)->device_calls(), nullptr);
  const auto want = Call(**group, 64, 3), many = Call(**beside, 200, 4);
  ASSERT_TRUE(want.ok() && many.ok()) << want.status() << many.status();
  EXPECT_TRUE(absl::IsInvalidArgument(Call(**group, 65, 1).status()));
  std::thread other([&] {
    for (int i = 0; i < 20; ++i) {
      const auto got = Call(**beside, 200, 4);
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(*got, *many);
    }
  });
  for (int i = 0; i < 50; ++i) {
    const auto got = Call(**group, 64, 3);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(*got, *want);
  }
  other.join();
  group->reset();
  const auto alone = Call(**beside, 64, 3);
  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_EQ(*alone, *want);
}

TEST_F(ExpertsProcessTest, ExpertKilledAtEachStageComesBack) {
  auto expert = StartExpert(0);
  auto group = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(group.ok()) << group.status();
  const auto want = Call(**group, 3, 7);
  ASSERT_TRUE(want.ok()) << want.status();
  std::vector<float> out(static_cast<size_t>(3 * config_.hidden_size));
  const auto batch = MakeBatch(3, 7);
  for (const char* stage : {"between calls", "before the bell", "in the call", "after the answer"}) {
    SCOPED_TRACE(stage);
    const std::string_view at = stage;
    absl::Status lost;
    if (at == "between calls") {
      expert->Kill();
      absl::SleepFor(absl::Milliseconds(100));
      lost = Call(**group, 3, 7).status();
    } else if (at == "before the bell") {
      expert->Kill();  // the client does not know yet
      lost = Call(**group, 3, 7).status();
    } else if (at == "in the call") {
      expert->Stop();
      ASSERT_TRUE((*group)->Start(batch->call).ok());
      std::thread killer([&] {
        absl::SleepFor(absl::Milliseconds(50));
        expert->Kill();
      });
      lost = (*group)->Finish(out.data());
      killer.join();
    } else {
      ASSERT_TRUE((*group)->Start(batch->call).ok());
      absl::SleepFor(absl::Milliseconds(200));  // the answer is there, but not looked at
      expert->Kill();
      absl::SleepFor(absl::Milliseconds(100));
      EXPECT_TRUE((*group)->Finish(out.data()).ok());
      EXPECT_EQ(out, *want);
      lost = Call(**group, 3, 7).status();
    }
    EXPECT_TRUE(absl::IsUnavailable(lost)) << lost;
    EXPECT_THAT(std::string(lost.message()), HasSubstr(Address(0)));
    EXPECT_FALSE(Call(**group, 3, 7).ok()) << "not before Recover";
    expert = StartExpert(0);
    const absl::Status back = Recover(**group);
    ASSERT_TRUE(back.ok()) << back << expert->Output();
    EXPECT_EQ(*Call(**group, 3, 7), *want);
  }
}

TEST_F(ExpertsProcessTest, AStoppedExpertIsTooLate) {
  const auto expert = StartExpert(0);
  auto group = Connect(1, ExpertTransport::kRing, absl::Milliseconds(300));
  ASSERT_TRUE(group.ok()) << group.status();
  const auto want = Call(**group, 3, 7);
  ASSERT_TRUE(want.ok());
  expert->Stop();
  const absl::Time before = absl::Now();
  const absl::Status late = Call(**group, 2, 8).status();
  EXPECT_TRUE(absl::IsUnavailable(late)) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("no answer within 300ms"));
  EXPECT_LT(absl::Now() - before, absl::Seconds(10));
  expert->Signal(SIGCONT);  // now it answers the old call, into the old region
  ASSERT_TRUE(Recover(**group).ok());
  EXPECT_EQ(*Call(**group, 3, 7), *want);
}

TEST_F(ExpertsProcessTest, AnExpertThatIsToldToStopEndsItsSessions) {
  auto expert = StartExpert(0);
  auto group = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(group.ok()) << group.status();
  ASSERT_TRUE(Call(**group, 3, 7).ok());
  const absl::Time before = absl::Now();
  expert->Signal(SIGTERM);
  EXPECT_EQ(expert->Wait(), 0) << expert->Output();
  EXPECT_LT(absl::Now() - before, absl::Seconds(9));
  EXPECT_TRUE(absl::IsUnavailable(Call(**group, 3, 7).status()));
  EXPECT_FALSE(std::filesystem::exists(Address(0).substr(5) + ".ring"));
}

// The client here is the engine's own program.
TEST_F(ExpertsProcessTest, ClientKilledIsForgottenAndOthersGoOn) {
  const auto expert = StartExpert(0);
  auto group = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(group.ok()) << group.status();
  const auto want = Call(**group, 3, 7);
  ASSERT_TRUE(want.ok());
  for (int i = 0; i < 2; ++i) {
    Process client("tandem-attention", {"--model", DemoModel(), "--listen", "127.0.0.1:0", "--metrics-listen",
                                        "", "--expert", Address(0), "--expert-transport", "ring"});
    ASSERT_TRUE(client.WaitForOutput("ready after").has_value()) << client.Output();
    EXPECT_THAT(client.Output(), HasSubstr("calls through shared memory"));
    EXPECT_EQ(*Call(**group, 3, 7), *want) << "two clients at once";
    client.Kill();
  }
  EXPECT_TRUE(expert->WaitForOutput("a client's session ended").has_value());
  EXPECT_EQ(*Call(**group, 3, 7), *want);
}

TEST_F(ExpertsProcessTest, IdleProcessesUseNoCpu) {
  const auto expert = StartExpert(0, {"--ring-spin-us", "200"});
  auto group = Connect(1, ExpertTransport::kRing);
  ASSERT_TRUE(group.ok()) << group.status();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Call(**group, 2, 1).ok());
  absl::SleepFor(absl::Seconds(1));
  const double before = expert->CpuSeconds();
  absl::SleepFor(absl::Seconds(2));
  EXPECT_LT(expert->CpuSeconds() - before, 0.06);
}

// Not a benchmark: prints what the two ways cost on this machine as it is.
TEST_F(ExpertsProcessTest, EmptyCallsAreAnsweredOnBothPaths) {
  std::vector<std::string> flags = {"--ring-spin-us", "10000"};
  if (shm::AllowedCpus() > 1) {  // each its own CPU, as far as others leave it to them
    flags.insert(flags.end(), {"--cpus", "1"});
    threading::PinCurrentThread(0);
  }
  const auto expert = StartExpert(0, flags);
  for (const bool ring : {false, true}) {
    auto group = Connect(1, ring ? ExpertTransport::kRing : ExpertTransport::kGrpc, absl::Seconds(60),
                         absl::Milliseconds(10));
    ASSERT_TRUE(group.ok()) << group.status();
    for (const int32_t n : {1, 0}) {
      const auto r = MeasureEmptyCalls(**group, 1, n, static_cast<int32_t>(config_.num_experts_per_tok),
                                       config_.hidden_size, 20'000, absl::Seconds(3));
      ASSERT_TRUE(r.ok()) << r.status();
      EXPECT_GT(r->calls, 0);
      std::printf("%s, %d tokens: %lld calls, min %.2f, p50 %.2f, p99 %.2f us\n", ring ? "ring" : "gRPC", n,
                  static_cast<long long>(r->calls), r->min, r->p50, r->p99);
    }
  }
}

}  // namespace
}  // namespace tandem::attention
