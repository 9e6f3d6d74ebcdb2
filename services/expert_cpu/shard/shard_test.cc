#include "services/expert_cpu/shard/shard.h"

#include <sys/mman.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "services/expert_cpu/shard/reader.h"
#include "services/expert_cpu/testing/synthetic_model.h"

namespace tandem::expert {
namespace {

using gguf::TensorType;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::SyntheticModel;
using testing::SyntheticShape;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

model::ModelConfig R1() {
  model::ModelConfig c;
  c.hidden_size = 7168;
  c.moe_intermediate_size = 2048;
  c.n_routed_experts = 256;
  c.num_experts_per_tok = 8;
  c.num_hidden_layers = 61;
  c.first_k_dense_replace = 3;
  return c;
}

TEST(PlanTest, R1SlicesEvenly) {
  for (const int64_t n : {1, 2, 4, 8}) {
    int64_t next = 0;
    for (int64_t k = 0; k < n; ++k) {
      const auto plan = MakeShardPlan(R1(), {.slice_index = k, .slice_count = n});
      ASSERT_TRUE(plan.ok()) << plan.status();
      EXPECT_EQ(plan->row_begin, next);
      EXPECT_EQ(plan->rows(), 2048 / n);
      EXPECT_EQ(plan->experts(), 256);
      EXPECT_EQ(plan->layers.size(), 58u);
      EXPECT_EQ(plan->layers.front(), 3);
      next = plan->row_end;
    }
    EXPECT_EQ(next, 2048);
  }
  const auto whole = MakeShardPlan(R1(), {});
  EXPECT_EQ(whole->DebugString(), "experts 0-255 of 256, rows 0-2047 of 2048, 58 layers");
}

TEST(PlanTest, OddSizesAreCutAtLeaves) {
  model::ModelConfig v2_lite = R1();
  v2_lite.moe_intermediate_size = 1408;  // five leaves and a half
  const auto first = MakeShardPlan(v2_lite, {.slice_index = 0, .slice_count = 2});
  const auto second = MakeShardPlan(v2_lite, {.slice_index = 1, .slice_count = 2});
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->row_end, 768);
  EXPECT_EQ(second->row_begin, 768);
  EXPECT_EQ(second->row_end, 1408);
}

TEST(PlanTest, ErrorsTellTheNumbers) {
  const auto nine = MakeShardPlan(R1(), {.slice_index = 0, .slice_count = 9});
  EXPECT_EQ(nine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(nine.status()), HasSubstr("2048"));
  EXPECT_THAT(Message(nine.status()), HasSubstr("at most 8 slices"));
  EXPECT_THAT(Message(nine.status()), HasSubstr("--experts"));
  for (const ShardRequest& bad :
       {ShardRequest{.slice_index = 2, .slice_count = 2}, ShardRequest{.slice_index = -1, .slice_count = 2},
        ShardRequest{.slice_index = 0, .slice_count = 0}, ShardRequest{.expert_begin = 0, .expert_end = 257},
        ShardRequest{.expert_begin = 256}, ShardRequest{.expert_begin = 9, .expert_end = 9},
        ShardRequest{.expert_begin = -1, .expert_end = 9}}) {
    EXPECT_EQ(MakeShardPlan(R1(), bad).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_THAT(Message(MakeShardPlan(R1(), {.expert_begin = 0, .expert_end = 257}).status()),
              HasSubstr("[0, 257) are asked for, the model has [0, 256)"));
  model::ModelConfig dense = R1();
  dense.n_routed_experts = 0;
  EXPECT_THAT(Message(MakeShardPlan(dense, {}).status()), HasSubstr("no routed experts"));
}

// That `stack` holds rows [row_begin, +rows) and columns [col_begin, +cols) of the experts from `expert` on.
void ExpectPart(const ExpertStack& stack, const gguf::Tensor& tensor, int64_t experts, int64_t expert,
                int64_t row_begin, int64_t col_begin) {
  EXPECT_EQ(reinterpret_cast<uintptr_t>(stack.data) % 64, 0u);
  EXPECT_EQ(stack.expert_bytes % 64, 0u);
  const int64_t file_row = gguf::RowBytes(tensor.type, tensor.ne[0]);
  for (int64_t e = 0; e < experts; ++e) {
    const kernels::Matrix m = stack.Expert(e);
    EXPECT_EQ(m.row_bytes, gguf::RowBytes(tensor.type, m.cols));
    for (int64_t r = 0; r < m.rows; ++r) {
      const uint8_t* want = tensor.data + ((expert + e) * tensor.ne[1] + row_begin + r) * file_row +
                            gguf::RowBytes(tensor.type, col_begin);
      ASSERT_EQ(std::memcmp(m.data + r * m.row_bytes, want, static_cast<size_t>(m.row_bytes)), 0)
          << tensor.name << ", expert " << e << ", row " << r;
    }
  }
}

void ExpectShardHolds(const std::string& path, const ShardRequest& request) {
  LoadOptions options;
  options.request = request;
  LoadProgress progress;
  options.progress = &progress;
  const auto shard = Shard::Load(path, options);
  ASSERT_TRUE(shard.ok()) << shard.status();
  const auto file = gguf::File::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*shard)->fingerprint(), (*file)->Fingerprint());
  const ShardPlan& plan = (*shard)->plan();
  uint64_t weights = 0;
  for (const int64_t block : plan.layers) {
    const ShardLayer* layer = (*shard)->FindLayer(block);
    ASSERT_NE(layer, nullptr);
    const std::string blk = "blk." + std::to_string(block) + ".ffn_";
    const gguf::Tensor* fused = (*file)->FindTensor(blk + "gate_up_exps.weight");
    const gguf::Tensor* gate = fused != nullptr ? fused : (*file)->FindTensor(blk + "gate_exps.weight");
    const gguf::Tensor* up = fused != nullptr ? fused : (*file)->FindTensor(blk + "up_exps.weight");
    const int64_t up_row = fused != nullptr ? plan.moe_intermediate_size : 0;
    ExpectPart(layer->gate, *gate, plan.experts(), plan.expert_begin, plan.row_begin, 0);
    ExpectPart(layer->up, *up, plan.experts(), plan.expert_begin, up_row + plan.row_begin, 0);
    ExpectPart(layer->down, *(*file)->FindTensor(blk + "down_exps.weight"), plan.experts(), plan.expert_begin,
               0, plan.row_begin);
    weights += layer->expert_weight_bytes * static_cast<uint64_t>(plan.experts());
  }
  EXPECT_EQ((*shard)->FindLayer(plan.layers.front() - 1), nullptr);
  EXPECT_EQ((*shard)->FindLayer(plan.layers.back() + 1), nullptr);
  EXPECT_GE((*shard)->resident_bytes(), weights);
  EXPECT_LE((*shard)->resident_bytes(), weights + weights / 100);
  EXPECT_EQ(progress.bytes_read, progress.bytes_total);
  EXPECT_EQ(progress.bytes_total, weights);
}

TEST(ShardTest, HoldsExactlyItsPart) {
  SyntheticShape shape;
  shape.inner = 672;
  shape.experts = 5;
  shape.layers = 3;
  shape.up = TensorType::kQ5_K;
  shape.down = TensorType::kQ5_1;
  const SyntheticModel model(shape);
  ExpectShardHolds(model.path(), {});
  ExpectShardHolds(model.path(), {.slice_index = 0, .slice_count = 2});
  ExpectShardHolds(model.path(), {.slice_index = 1, .slice_count = 2});
  ExpectShardHolds(model.path(), {.slice_index = 2, .slice_count = 3, .expert_begin = 2, .expert_end = 4});
  ExpectShardHolds(model.path(), {.expert_begin = 3});
}

TEST(ShardTest, FusedGateAndUp) {
  SyntheticShape shape;
  shape.inner = 512;
  shape.fused_gate_up = true;
  const SyntheticModel model(shape);
  ExpectShardHolds(model.path(), {});
  ExpectShardHolds(model.path(), {.slice_index = 1, .slice_count = 2, .expert_begin = 1, .expert_end = 3});
}

TEST(ShardTest, DemoModel) {
  const char* root = std::getenv("TANDEM_SOURCE_DIR");
  if (root == nullptr) GTEST_SKIP() << "TANDEM_SOURCE_DIR is not set";
  const std::string path = std::string(root) + "/models/tinyr1-Q4_K_M.gguf";
  ExpectShardHolds(path, {});
  ExpectShardHolds(path, {.expert_begin = 8, .expert_end = 16});
  const auto shard = Shard::Load(path, {});
  ASSERT_TRUE(shard.ok()) << shard.status();
  EXPECT_EQ((*shard)->model_name(), "TinyR1");
  EXPECT_THAT((*shard)->WeightTypes(), ElementsAre("Q4_K", "Q6_K"));
  const auto sliced = Shard::Load(path, {.request = {.slice_index = 0, .slice_count = 2},
                                         .progress = nullptr,
                                         .usable_memory_bytes = std::nullopt,
                                         .bind_memory = nullptr});
  EXPECT_EQ(sliced.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(sliced.status()), HasSubstr("at most 1 slice;"));
}

TEST(ShardTest, TooLittleMemoryIsSaidWithTheNumbersBeforeReading) {
  const SyntheticModel model(SyntheticShape{});
  LoadOptions options;
  LoadProgress progress;
  options.progress = &progress;
  options.usable_memory_bytes = 123'000'000;
  const auto shard = Shard::Load(model.path(), options);
  EXPECT_EQ(shard.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(shard.status()), HasSubstr("0.12 GB are available"));
  EXPECT_THAT(Message(shard.status()), HasSubstr("needs 0.27 GB"));
  EXPECT_EQ(progress.bytes_read, 0u);
}

TEST(ShardTest, BindsTheMemoryBeforeItIsTouched) {
  const SyntheticModel model(SyntheticShape{});
  LoadOptions options;
  uint64_t bound = 0;
  bool untouched = false;
  options.bind_memory = [&](void* data, uint64_t bytes) {
    bound = bytes;
    untouched = static_cast<uint8_t*>(data)[bytes - 1] == 0;
  };
  const auto shard = Shard::Load(model.path(), options);
  ASSERT_TRUE(shard.ok());
  EXPECT_EQ(bound, (*shard)->resident_bytes());
  EXPECT_TRUE(untouched);
}

TEST(ShardTest, Cancelled) {
  const SyntheticModel model(SyntheticShape{});
  LoadOptions options;
  LoadProgress progress;
  progress.cancel = true;
  options.progress = &progress;
  EXPECT_EQ(Shard::Load(model.path(), options).status().code(), absl::StatusCode::kCancelled);
}

TEST(ShardTest, BadFiles) {
  EXPECT_THAT(Message(Shard::Load("/no/such/model.gguf", {}).status()), HasSubstr("/no/such/model.gguf"));
  const SyntheticModel model(SyntheticShape{});
  const std::string cut = model.path() + ".cut";
  std::filesystem::copy_file(model.path(), cut);
  std::filesystem::resize_file(cut, std::filesystem::file_size(cut) - 5000);
  const auto truncated = Shard::Load(cut, {});
  EXPECT_FALSE(truncated.ok());
  EXPECT_THAT(Message(truncated.status()), HasSubstr(cut));
  std::filesystem::remove(cut);

  gguf::Writer other;
  other.AddString("general.architecture", "llama");
  const std::string llama = model.path() + ".llama";
  ASSERT_TRUE(other.WriteFile(llama).ok());
  EXPECT_THAT(Message(Shard::Load(llama, {}).status()), HasSubstr("llama"));
  std::filesystem::remove(llama);
}

TEST(ReaderTest, GathersColumnsAndReportsShortFiles) {
  const std::string path = ::testing::TempDir() + "/tandem_reader_" + std::to_string(getpid());
  std::string text;
  for (int i = 0; i < 3'000'000; ++i) text += static_cast<char>('a' + i % 23);
  std::ofstream(path, std::ios::binary) << text;
  const int64_t rows = 2900;
  std::vector<uint8_t> out(static_cast<size_t>(rows) * 7, 0);
  std::vector<ReadPiece> pieces(1);
  pieces[0].offset = 11;
  pieces[0].rows = rows;
  pieces[0].row_stride = 1000;
  pieces[0].row_begin = 333;
  pieces[0].row_bytes = 7;
  pieces[0].to = out.data();
  LoadProgress progress;
  ASSERT_TRUE(ReadPieces({path}, pieces, 3, progress).ok());
  EXPECT_EQ(progress.bytes_read, out.size());
  for (int64_t r = 0; r < rows; ++r) {
    ASSERT_EQ(
        std::memcmp(&out[static_cast<size_t>(r * 7)], &text[static_cast<size_t>(11 + r * 1000 + 333)], 7), 0)
        << r;
  }
  pieces[0].rows = 3001;
  out.resize(3001 * 7);
  pieces[0].to = out.data();
  const absl::Status cut = ReadPieces({path}, pieces, 3, progress);
  EXPECT_EQ(cut.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(cut), HasSubstr(path));
  std::filesystem::remove(path);
  EXPECT_EQ(ReadPieces({path}, pieces, 3, progress).code(), absl::StatusCode::kNotFound);
}

TEST(ArenaTest, SharedMemoryCanBeMappedByOthers) {
  auto arena = Arena::Allocate(3'000'000, ArenaKind::kSharedSmall);
  ASSERT_TRUE(arena.ok()) << arena.status();
  ASSERT_GE(arena->fd(), 0);
  arena->data()[2'999'999] = 42;
  void* other = mmap(nullptr, arena->bytes(), PROT_READ, MAP_SHARED, arena->fd(), 0);
  ASSERT_NE(other, MAP_FAILED);
  EXPECT_EQ(static_cast<const uint8_t*>(other)[2'999'999], 42);
  munmap(other, arena->bytes());
  EXPECT_EQ(arena->Description(), "4 KB pages, shared");
}

TEST(ArenaTest, TooFewReservedPagesAreAnErrorWithTheNumbers) {
  const auto arena = Arena::Allocate(uint64_t{1} << 45, ArenaKind::kHugeTlb);
  EXPECT_EQ(arena.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(arena.status()), HasSubstr("16777216 reserved huge pages"));
}

TEST(ArenaTest, AlignedAndMovable) {
  auto arena = Arena::Allocate(5'000'000);
  ASSERT_TRUE(arena.ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(arena->data()) % (2 << 20), 0u);
  std::memset(arena->data(), 7, arena->bytes());
  Arena moved = std::move(*arena);
  EXPECT_EQ(moved.data()[4'999'999], 7);
  EXPECT_EQ(Arena::Allocate(uint64_t{1} << 60).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Arena::Allocate(~uint64_t{0}).status().code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace tandem::expert
