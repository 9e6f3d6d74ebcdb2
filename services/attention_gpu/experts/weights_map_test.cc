// The weights of real expert processes, mapped; offers that do not hold water.
#include "services/attention_gpu/experts/weights_map.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <functional>

#include "absl/strings/str_cat.h"
#include "common/model/tensors.h"
#include "common/rpc/channel.h"
#include "common/rpc/lifecycle.h"
#include "common/shm/handover.h"
#include "common/testing/process.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

using tandem::testing::DemoModel;
using tandem::testing::Process;
using ::testing::HasSubstr;

class WeightsMapTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("TANDEM_BINARY_DIR") == nullptr) GTEST_SKIP() << "TANDEM_BINARY_DIR is not set";
    file_ = std::move(*gguf::File::Open(DemoModel()));
    config_ = *model::ReadModelConfig(*file_, "auto");
  }

  std::string Address(int i) const {
    return absl::StrCat("unix:", ::testing::TempDir(), "/tandem_map_", getpid(), "_", i, ".sock");
  }
  std::unique_ptr<Process> StartExpert(int i, const std::vector<std::string>& more) const {
    std::vector<std::string> args = {"--model", DemoModel(), "--listen", Address(i), "--threads", "2"};
    args.insert(args.end(), more.begin(), more.end());
    return std::make_unique<Process>("tandem-expert", args);
  }
  absl::StatusOr<std::unique_ptr<ExpertGroup>> Connect(int processes) const {
    ExpertOptions options;
    for (int i = 0; i < processes; ++i) options.addresses.push_back(Address(i));
    options.attach_patience = absl::Seconds(60);
    options.max_call_tokens = 8;
    return ConnectExperts(options, config_, file_->Fingerprint());
  }

  // That every matrix of the shard has the bytes of the file.
  void ExpectFile(const ShardWeights& shard) const {
    ASSERT_EQ(static_cast<int64_t>(shard.layers.size()), config_.num_moe_layers());
    for (const LayerWeights& l : shard.layers) {
      const auto t = model::BindExperts(*file_, config_, l.layer);
      ASSERT_TRUE(t.ok()) << t.status();
      ASSERT_EQ(t->gate_up, nullptr);
      ExpectStack(shard, l.gate, *t->gate, true);
      ExpectStack(shard, l.up, *t->up, true);
      ExpectStack(shard, l.down, *t->down, false);
    }
  }
  void ExpectStack(const ShardWeights& shard, const WeightStack& stack, const gguf::Tensor& tensor,
                   bool rows_cut) const {
    ASSERT_EQ(stack.type, tensor.type);
    const int64_t file_row = gguf::RowBytes(tensor.type, tensor.ne[0]);
    const int64_t first_row = rows_cut ? shard.row_begin : 0;
    const int64_t first_byte = rows_cut ? 0 : gguf::RowBytes(tensor.type, shard.row_begin);
    const auto* data = reinterpret_cast<const std::byte*>(tensor.data);
    for (int64_t e = 0; e < shard.experts(); ++e) {
      for (int64_t r = 0; r < stack.rows; ++r) {
        const std::byte* want =
            data + (((shard.expert_begin + e) * tensor.ne[1]) + first_row + r) * file_row + first_byte;
        const std::byte* got =
            stack.data + static_cast<uint64_t>(e) * stack.expert_bytes + r * stack.row_bytes;
        ASSERT_EQ(std::memcmp(got, want, static_cast<size_t>(stack.row_bytes)), 0)
            << tensor.name << ", expert " << e << ", row " << r;
      }
    }
  }

  std::unique_ptr<gguf::File> file_;
  model::ModelConfig config_;
};

TEST_F(WeightsMapTest, TheFilesBytesAndTheyOutliveTheProcess) {
  auto expert = StartExpert(0, {"--arena", "shared"});
  auto group = Connect(1);
  ASSERT_TRUE(group.ok()) << group.status();
  auto maps = (*group)->MapWeights();
  ASSERT_TRUE(maps.ok()) << maps.status();
  ASSERT_EQ(maps->size(), 1u);
  ExpectFile(*maps->front());
  // A second time: a client may come again.
  EXPECT_TRUE((*group)->MapWeights().ok());
  expert->Kill();
  ExpectFile(*maps->front());
  EXPECT_TRUE(absl::IsUnavailable((*group)->MapWeights().status()));
}

TEST_F(WeightsMapTest, SharedOutExperts) {
  const auto a = StartExpert(0, {"--arena", "shared", "--experts", "0-7"});
  const auto b = StartExpert(1, {"--arena", "shared", "--experts", "7-16"});
  auto group = Connect(2);
  ASSERT_TRUE(group.ok()) << group.status();
  const auto maps = (*group)->MapWeights();
  ASSERT_TRUE(maps.ok()) << maps.status();
  ASSERT_EQ(maps->size(), 2u);
  EXPECT_EQ((*maps)[0]->expert_end, 7);
  EXPECT_EQ((*maps)[1]->expert_begin, 7);
  for (const auto& map : *maps) ExpectFile(*map);
}

TEST_F(WeightsMapTest, PrivateMemoryIsRefusedWithAdvice) {
  const auto expert = StartExpert(0, {"--arena", "private"});
  auto group = Connect(1);
  ASSERT_TRUE(group.ok()) << group.status();
  const absl::Status status = (*group)->MapWeights().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("private"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("vm.nr_hugepages"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(Address(0)));
}

TEST_F(WeightsMapTest, WithoutASocketThereIsNothingToFetch) {
  const auto expert = StartExpert(0, {"--arena", "shared", "--ring", "off"});
  auto group = Connect(1);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_TRUE(absl::IsFailedPrecondition((*group)->MapWeights().status()));
}

// What the descriptor is good for, and an offer as it comes, then bent in every number.
TEST_F(WeightsMapTest, OffersAreNotTrustedAndGiveNoRightToWrite) {
  const auto expert = StartExpert(0, {"--arena", "shared"});
  ASSERT_TRUE(Connect(1).ok());
  const auto channel = *rpc::Connect(Address(0));
  v1::Experts::Stub stub(channel);
  v1::WeightsOffer offer;
  grpc::ClientContext context;
  ASSERT_TRUE(stub.Weights(&context, {}, &offer).ok());
  const auto fd = shm::ReceiveDescriptor(offer.socket_path(), offer.token(), absl::Seconds(10));
  ASSERT_TRUE(fd.ok()) << fd.status();
  const off_t size = lseek(fd->get(), 0, SEEK_END);
  const auto bytes = static_cast<size_t>(size);
  EXPECT_EQ(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0), MAP_FAILED);
  EXPECT_NE(ftruncate(fd->get(), 0), 0);
  EXPECT_LT(pwrite(fd->get(), "x", 1, 0), 0);
  EXPECT_FALSE(shm::ReceiveDescriptor(offer.socket_path(), offer.token(), absl::Seconds(10)).ok())
      << "a token is good once";
  EXPECT_TRUE(absl::IsFailedPrecondition(
      WeightsMap::Open(channel, config_, "another model", absl::Seconds(10)).status()));

  const std::vector<std::byte> memory(16);  // only its address and the size below are looked at
  const std::span<const std::byte> all(memory.data(), bytes);
  ASSERT_TRUE(PlaceWeights(offer, config_, all).ok());
  EXPECT_FALSE(PlaceWeights(offer, config_, all.first(bytes / 2)).ok());
  using Bend = std::function<void(v1::WeightsOffer&)>;
  const std::vector<std::pair<const char*, Bend>> bends = {
      {"no experts", [](auto& o) { o.set_expert_begin(o.expert_end()); }},
      {"too many experts", [](auto& o) { o.set_expert_end(1000000); }},
      {"too many rows", [](auto& o) { o.set_row_end(o.row_end() + 256); }},
      {"no rows", [](auto& o) { o.set_row_begin(o.row_end()); }},
      {"a layer less", [](auto& o) { o.mutable_layers()->RemoveLast(); }},
      {"a dense layer", [](auto& o) { o.mutable_layers(0)->set_layer(0); }},
      {"a layer twice", [](auto& o) { o.mutable_layers(1)->set_layer(o.layers(0).layer()); }},
      {"a layer too high", [](auto& o) { o.mutable_layers()->rbegin()->set_layer(1 << 20); }},
      {"beyond the end", [&](auto& o) { o.mutable_layers(0)->mutable_up()->set_offset(bytes); }},
      {"around zero",
       [](auto& o) { o.mutable_layers(0)->mutable_up()->set_offset(uint64_t{0} - 64 * 1024); }},
      {"askew", [](auto& o) { o.mutable_layers(0)->mutable_up()->set_offset(2); }},
      {"experts too large",
       [](auto& o) { o.mutable_layers(0)->mutable_gate()->set_expert_bytes(uint64_t{1} << 62); }},
      {"experts too small", [](auto& o) { o.mutable_layers(0)->mutable_down()->set_expert_bytes(64); }},
      {"another row", [](auto& o) { o.mutable_layers(0)->mutable_down()->set_row_bytes(1); }},
      {"no type", [](auto& o) { o.mutable_layers(0)->mutable_down()->set_type(9999); }},
  };
  for (const auto& [what, bend] : bends) {
    v1::WeightsOffer bent = offer;
    bend(bent);
    EXPECT_TRUE(absl::IsFailedPrecondition(PlaceWeights(bent, config_, all).status())) << what;
  }
}

}  // namespace
}  // namespace tandem::attention
