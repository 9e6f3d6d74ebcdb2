#include "cli/synth/synth.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>

#include "cli/serve/memory_plan.h"
#include "cli/synth/random_blocks.h"
#include "cli/synth/vocabulary.h"
#include "common/model/tensors.h"
#include "common/quant/quant.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::cli {
namespace {

using gguf::TensorType;
using ::testing::HasSubstr;

class SynthTest : public ::testing::Test {
 protected:
  SynthTest() : folder_(::testing::TempDir() + "/tandem_synth_" + std::to_string(getpid())) {
    std::filesystem::create_directories(folder_);
  }
  ~SynthTest() override { std::filesystem::remove_all(folder_); }

  SynthOptions Tiny(const std::string& name) const {
    SynthOptions options;
    options.out = folder_ + "/" + name;
    options.shape = "tiny";
    return options;
  }
  static std::string Bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  struct Result {
    int code;
    std::string out, err;
  };
  static Result Run(const SynthOptions& options) {
    std::ostringstream out, err;
    const int code = RunSynth(options, out, err);
    return {code, out.str(), err.str()};
  }
  // Opens the file, binds all of its tensors.
  static std::unique_ptr<gguf::File> Bind(const std::string& path) {
    auto file = gguf::File::Open(path);
    EXPECT_TRUE(file.ok()) << file.status();
    if (!file.ok()) return nullptr;
    const auto config = model::ReadModelConfig(**file);
    EXPECT_TRUE(config.ok()) << config.status();
    if (!config.ok()) return nullptr;
    EXPECT_TRUE(model::BindTensors(**file, *config).ok()) << model::BindTensors(**file, *config).status();
    for (int64_t l = config->first_k_dense_replace; l < config->num_hidden_layers; ++l) {
      EXPECT_TRUE(model::BindExperts(**file, *config, l).ok())
          << model::BindExperts(**file, *config, l).status();
    }
    return *std::move(file);
  }

  const std::string folder_;
};

constexpr TensorType kAllTypes[] = {
    TensorType::kF32,  TensorType::kF16,  TensorType::kBF16, TensorType::kQ4_0, TensorType::kQ4_1,
    TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ8_0, TensorType::kQ2_K, TensorType::kQ3_K,
    TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K};

TEST(RandomBlocks, HaveTheWantedSizeAndMeanInEveryType) {
  constexpr int64_t kValues = 1 << 18;
  for (const TensorType type : kAllTypes) {
    for (const double rms : {0.0118, 1.0}) {
      std::vector<uint8_t> bytes(static_cast<size_t>(gguf::RowBytes(type, kValues)));
      FillRandomBlocks(type, rms, 7, 0, bytes);
      std::vector<float> values(kValues);
      quant::Dequantize(type, bytes.data(), values.data(), kValues);
      double sum = 0, squares = 0;
      for (const float v : values) {
        ASSERT_TRUE(std::isfinite(v)) << gguf::TypeName(type);
        sum += v, squares += static_cast<double>(v) * v;
      }
      EXPECT_NEAR(std::sqrt(squares / kValues) / rms, 1, 0.02) << gguf::TypeName(type);
      // Integers that reach one further down than up: half a step, 0.11 rms for four bits and 0.22 for three.
      const double most = type == TensorType::kQ3_K ? 0.02 : type == TensorType::kQ4_0 ? 0.12 : 0.07;
      EXPECT_LT(std::abs(sum / kValues) / rms, most) << gguf::TypeName(type);
    }
  }
}

TEST(RandomBlocks, ABlockDependsOnItsNumberAlone) {
  for (const TensorType type : kAllTypes) {
    const size_t block = gguf::GetTypeInfo(type).type_size;
    std::vector<uint8_t> whole(50 * block), part(20 * block), other(50 * block);
    FillRandomBlocks(type, 0.1, 3, 100, whole);
    FillRandomBlocks(type, 0.1, 3, 117, part);
    FillRandomBlocks(type, 0.1, 4, 100, other);
    EXPECT_EQ(std::memcmp(whole.data() + 17 * block, part.data(), part.size()), 0) << gguf::TypeName(type);
    EXPECT_NE(whole, other) << gguf::TypeName(type);
    EXPECT_NE(std::memcmp(whole.data(), whole.data() + block, block), 0) << gguf::TypeName(type);
  }
  EXPECT_NE(TensorSeed(1, "blk.1.a"), TensorSeed(1, "blk.2.a"));
  EXPECT_NE(TensorSeed(1, "blk.1.a"), TensorSeed(2, "blk.1.a"));
}

TEST(Vocabulary, WorksWithOurTokenizerAtEverySize) {
  for (const int64_t size : {276, 512, 102400, 129280, 130000}) {
    const auto v = MakeVocabulary(size);
    ASSERT_TRUE(v.ok()) << v.status();
    EXPECT_EQ(v->tokens.size(), static_cast<size_t>(size));
    tokenizer::VocabularySpec spec;
    spec.tokens = v->tokens;
    spec.token_types = v->types;
    spec.merges = v->merges;
    spec.bos_id = v->bos_id;
    spec.eos_id = v->eos_id;
    const auto t = tokenizer::Tokenizer::FromVocabulary(spec);
    ASSERT_TRUE(t.ok()) << t.status();
    const std::string text = "hello big world 123 \xE4\xBD\xA0\xE5\xA5\xBD\n";
    EXPECT_EQ((*t)->Decode((*t)->Encode(text)), text);
    EXPECT_LT((*t)->Encode(text).size(), text.size() + 1);
    EXPECT_TRUE((*t)->IsControl((*t)->FindToken("<｜User｜>")));
    EXPECT_TRUE((*t)->IsEndOfGeneration(1));
    if (size >= 129280) {
      EXPECT_EQ((*t)->FindToken("</think>"), 128799);
    }
  }
  EXPECT_THAT(std::string(MakeVocabulary(275).status().message()), HasSubstr("at least 276"));
}

TEST(Shapes, R1HasTheTensorsTypesAndBytesOfThePublishedFile) {
  SynthOptions options;
  const auto plan = PlanSynth(options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->tensors.size(), 1086u);
  std::map<TensorType, int> count;
  for (const SynthTensor& tensor : plan->tensors) ++count[tensor.type];
  EXPECT_EQ(count[TensorType::kF32], 361);
  EXPECT_EQ(count[TensorType::kQ4_K], 606);
  EXPECT_EQ(count[TensorType::kQ6_K], 58);
  EXPECT_EQ(count[TensorType::kQ5_0], 61);
  EXPECT_NEAR(static_cast<double>(plan->bytes) / (1 << 30), 376.71, 0.01);
  options.layout = "legacy";
  const auto legacy = PlanSynth(options);
  ASSERT_TRUE(legacy.ok());
  EXPECT_EQ(legacy->tensors.size(), 1025u);
  EXPECT_EQ(legacy->bytes, 404'424'884'224u);
}

TEST(Shapes, RowsThatDoNotFitABlockGetTheNextType) {
  const auto types = TypeScheme::Find("q4_k_m");
  ASSERT_TRUE(types.ok());
  EXPECT_EQ(types->TypeOf(TensorRole::kDown, 0, 27, 1408), TensorType::kQ8_0);
  EXPECT_EQ(types->TypeOf(TensorRole::kDown, 3, 27, 1408), TensorType::kQ5_0);
  EXPECT_EQ(types->TypeOf(TensorRole::kOther, 0, 27, 100), TensorType::kF16);
}

TEST(AliasSources, KeepTypesAndShares) {
  const TensorType a = TensorType::kQ4_K, b = TensorType::kQ6_K;
  EXPECT_EQ(AliasSources({a, b, a, b}, 0), (std::vector<size_t>{0, 1, 2, 3}));
  EXPECT_EQ(AliasSources({a, b, a, b, a}, 2), (std::vector<size_t>{0, 1, 0, 1, 0}));
  EXPECT_EQ(AliasSources({b, b, b, a, a, b, a, a}, 4), (std::vector<size_t>{0, 1, 0, 3, 4, 1, 3, 4}));
  EXPECT_EQ(AliasSources({a, a, a}, 2), (std::vector<size_t>{0, 1, 0}));
  EXPECT_EQ(AliasSources({a, a, b}, 1), (std::vector<size_t>{0, 0, 2}));  // one of each type at least
}

TEST_F(SynthTest, OpensAndBindsInEveryTypeAndLayout) {
  for (const char* layout : {"mla", "legacy"}) {
    for (const std::string& type : TypeScheme::Names()) {
      SynthOptions options = Tiny(type + layout + ".gguf");
      options.type = type;
      options.layout = layout;
      const Result r = Run(options);
      ASSERT_EQ(r.code, 0) << type << ": " << r.err;
      const auto file = Bind(options.out);
      ASSERT_NE(file, nullptr) << type;
      EXPECT_EQ(file->FindTensor("blk.0.attn_kv_b.weight") != nullptr, std::string(layout) == "legacy");
      const auto t = tokenizer::Tokenizer::FromGguf(*file);
      EXPECT_TRUE(t.ok()) << t.status();
    }
  }
}

TEST_F(SynthTest, TheSameSeedGivesTheSameBytes) {
  SynthOptions a = Tiny("a.gguf"), b = Tiny("b.gguf"), c = Tiny("c.gguf"), d = Tiny("d.gguf");
  a.threads = 1;
  b.threads = 3;
  c.seed = 2;
  d.experts = 8;
  for (const SynthOptions& options : {a, b, c, d}) ASSERT_EQ(Run(options).code, 0);
  EXPECT_EQ(Bytes(a.out), Bytes(b.out));
  EXPECT_NE(Bytes(a.out), Bytes(c.out));
  EXPECT_LT(Bytes(d.out).size(), Bytes(a.out).size());
  const auto file = Bind(a.out);
  ASSERT_NE(file, nullptr);
  const gguf::Tensor* norm = file->FindTensor("blk.1.attn_norm.weight");
  ASSERT_NE(norm, nullptr);
  float value;
  std::memcpy(&value, norm->data, sizeof value);
  EXPECT_EQ(value, 1.0f);
}

TEST_F(SynthTest, AliasedLayersShareTheirBytes) {
  SynthOptions own = Tiny("own.gguf"), shared = Tiny("shared.gguf");
  own.moe_layers = shared.moe_layers = 9;
  shared.alias_layers = 2;
  ASSERT_EQ(Run(own).code, 0);
  const Result r = Run(shared);
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("with the bytes that layers share"));
  EXPECT_LT(Bytes(shared.out).size(), Bytes(own.out).size() / 2);
  const auto a = Bind(own.out), b = Bind(shared.out);
  ASSERT_NE(a, nullptr);
  ASSERT_NE(b, nullptr);
  std::set<uint64_t> gates, downs;
  for (int layer = 1; layer <= 9; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    gates.insert(b->FindTensor(block + "ffn_gate_exps.weight")->file_offset);
    const gguf::Tensor* down = b->FindTensor(block + "ffn_down_exps.weight");
    downs.insert(down->file_offset);
    EXPECT_EQ(down->type, a->FindTensor(block + "ffn_down_exps.weight")->type);
  }
  EXPECT_EQ(gates.size(), 2u);
  EXPECT_EQ(downs.size(), 2u);
  // They are loaded once, and `tandem serve` counts on that.
  const auto config = model::ReadModelConfig(*a);
  const auto all = PlanMemory(*a, *config, 0, 1), once = PlanMemory(*b, *config, 0, 1);
  ASSERT_TRUE(all.ok() && once.ok());
  EXPECT_EQ(once->parameters, all->parameters);
  EXPECT_LT(once->expert_bytes, all->expert_bytes / 3);
  EXPECT_EQ(once->dense_bytes, all->dense_bytes);
}

TEST_F(SynthTest, SplitFilesAreOneModel) {
  SynthOptions options = Tiny("parts.gguf");
  options.split_max_size = "3M";
  const Result r = Run(options);
  ASSERT_EQ(r.code, 0) << r.err;
  size_t files = 0;
  std::string first;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    ++files;
    if (entry.path().string().find("-00001-of-") != std::string::npos) first = entry.path();
  }
  EXPECT_GT(files, 1u);
  const auto file = Bind(first);
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(file->paths().size(), files);
}

// A disk that is full, by the largest file that this process may write.
TEST_F(SynthTest, AFailedWriteLeavesNothing) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit limit = before;
  limit.rlim_cur = 4'000'000;
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const Result one = Run(Tiny("large.gguf"));
  SynthOptions split = Tiny("large.gguf");
  split.split_max_size = "3500000";  // the first files fit, one with a large tensor does not
  split.experts = 64;
  const Result several = Run(split);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, old_handler);
  for (const Result& r : {one, several}) {
    EXPECT_EQ(r.code, 1) << r.err;
    EXPECT_THAT(r.err, HasSubstr("cannot write"));
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(SynthTest, Cancelled) {
  SynthOptions options = Tiny("parts.gguf");
  options.split_max_size = "3M";
  const auto plan = PlanSynth(options);
  ASSERT_TRUE(plan.ok());
  uint64_t written = 0;
  const auto names = WriteSynth(
      *plan, options, [&](uint64_t bytes) { written = bytes; }, [&] { return written > plan->bytes / 2; });
  EXPECT_EQ(names.status().code(), absl::StatusCode::kCancelled);
  EXPECT_GT(written, 3'000'000u) << "a file was complete";
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(SynthTest, ErrorsSayWhatIsWrong) {
  const auto expect = [&](int code, const char* text, const auto& change) {
    SynthOptions options = Tiny("wrong.gguf");
    change(options);
    const Result r = Run(options);
    EXPECT_EQ(r.code, code) << r.err;
    EXPECT_THAT(r.err, HasSubstr(text));
    EXPECT_FALSE(std::filesystem::exists(options.out) && !options.out.ends_with("there.gguf"));
  };
  expect(2, "--experts 3: a token of this shape uses 4", [](SynthOptions& o) { o.experts = 3; });
  expect(2, "--alias-layers 3: the model has 2", [](SynthOptions& o) { o.alias_layers = 3; });
  expect(2, "at least one layer", [](SynthOptions& o) { o.moe_layers = o.dense_layers = 0; });
  expect(2, "--split-max-size 3X", [](SynthOptions& o) { o.split_max_size = "3X"; });
  expect(2, "--alias-layers: tensors", [](SynthOptions& o) { o.split_max_size = "3M", o.alias_layers = 1; });
  expect(1, "/no/such/folder", [](SynthOptions& o) { o.out = "/no/such/folder/x.gguf"; });
  expect(1, "left: fewer --moe-layers", [](SynthOptions& o) {
    o.shape = "r1";
    o.type = "f32";
    o.moe_layers = 1000;
  });
  std::ofstream(folder_ + "/there.gguf") << "x";
  expect(1, "--force", [&](SynthOptions& o) { o.out = folder_ + "/there.gguf"; });
  SynthOptions forced = Tiny("there.gguf");
  forced.force = true;
  EXPECT_EQ(Run(forced).code, 0);
}

}  // namespace
}  // namespace tandem::cli
