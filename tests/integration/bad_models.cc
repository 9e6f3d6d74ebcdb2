#include "tests/integration/bad_models.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "common/gguf/gguf.h"
#include "common/model/tensors.h"
#include "common/testing/process.h"
#include "common/topology/limits.h"

namespace tandem::integration {
namespace {

using testing::DemoModel;

std::string ReadFile(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  if (!out.good()) throw std::runtime_error("cannot write " + path);
}

void Check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.ToString());
}

std::unique_ptr<gguf::File> OpenDemo() {
  auto file = gguf::File::Open(DemoModel());
  Check(file.status());
  return std::move(*file);
}

gguf::Writer MetadataOf(const gguf::File& file) {
  gguf::Writer writer;
  for (const auto& [key, value] : file.metadata()) writer.AddValue(key, value);
  return writer;
}

void AddTensors(const gguf::File& file, size_t count, gguf::Writer* writer) {
  for (size_t i = 0; i < count; ++i) {
    const gguf::Tensor& t = file.tensors()[i];
    Check(writer->AddTensor(t.name, t.type, std::vector<int64_t>(t.ne, t.ne + t.n_dims),
                            {t.data, static_cast<size_t>(t.nbytes)}));
  }
}

// The header with another type id for one tensor: its name, uint32 n_dims, uint64 ne[n_dims], uint32 type.
std::string WithTensorType(std::string bytes, const std::string& tensor, uint32_t type) {
  const size_t name = bytes.find(tensor);
  if (name == std::string::npos) throw std::runtime_error("no tensor " + tensor);
  uint32_t dimensions = 0;
  std::memcpy(&dimensions, bytes.data() + name + tensor.size(), sizeof dimensions);
  std::memcpy(bytes.data() + name + tensor.size() + sizeof dimensions + dimensions * sizeof(uint64_t), &type,
              sizeof type);
  return bytes;
}

template <typename T>
void Put(T value, std::string* bytes) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof value);
}

bool IsOneOf(const std::string& name, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](const char* part) { return name.find(part) != std::string::npos; });
}

}  // namespace

HugeModel WriteHugeModel(const std::string& folder) {
  constexpr uint64_t kAlignment = 32;
  constexpr int64_t kInner = 32768;  // rows of an expert
  const std::unique_ptr<gguf::File> demo = OpenDemo();
  const auto bytes_for = [&](int64_t experts, HugeModel* huge, std::string* header) {
    gguf::Writer metadata = MetadataOf(*demo);
    metadata.AddUint("deepseek2.expert_count", static_cast<uint64_t>(experts));
    metadata.AddUint("deepseek2.expert_feed_forward_length", kInner);
    *header = metadata.SerializeMetadata();
    const uint64_t count = demo->tensors().size();
    std::memcpy(header->data() + 8, &count, sizeof count);  // after magic and version
    huge->expert_bytes = 0;
    uint64_t offset = 0;
    for (const gguf::Tensor& t : demo->tensors()) {
      std::vector<int64_t> ne(t.ne, t.ne + t.n_dims);
      const bool routed = model::IsRoutedExpertTensor(t.name);
      if (routed || IsOneOf(t.name, {"ffn_gate_inp.", "exp_probs_b"})) ne.back() = experts;
      if (routed || IsOneOf(t.name, {"_shexp."})) {
        ne[IsOneOf(t.name, {"ffn_down"}) ? 0 : 1] = kInner;
      }
      auto bytes = static_cast<uint64_t>(gguf::RowBytes(t.type, ne[0]));
      for (size_t i = 1; i < ne.size(); ++i) bytes *= static_cast<uint64_t>(ne[i]);
      if (routed) huge->expert_bytes += bytes;
      Put<uint64_t>(t.name.size(), header);
      *header += t.name;
      Put(static_cast<uint32_t>(ne.size()), header);
      for (const int64_t n : ne) Put(n, header);
      Put(static_cast<uint32_t>(t.type), header);
      Put(offset, header);
      offset += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    header->resize((header->size() + kAlignment - 1) / kAlignment * kAlignment, '\0');
    return offset;
  };
  HugeModel huge{folder + "/huge.gguf"};
  std::string header;
  int64_t experts = 16;  // a multiple, for the groups
  uint64_t data = bytes_for(experts, &huge, &header);
  const uint64_t wanted = 2 * topology::ReadMemoryInfo().total_bytes;
  experts *= static_cast<int64_t>(wanted / huge.expert_bytes + 1);
  data = bytes_for(experts, &huge, &header);
  WriteFile(huge.path, header);
  std::filesystem::resize_file(huge.path, header.size() + data);
  return huge;
}

void WriteRenamedModel(const std::string& path) {
  const std::unique_ptr<gguf::File> demo = OpenDemo();
  gguf::Writer writer = MetadataOf(*demo);
  writer.AddString("general.name", "Other");
  AddTensors(*demo, demo->tensors().size(), &writer);
  Check(writer.WriteFile(path));
}

std::vector<BadModel> MakeBadModels(const std::string& folder) {
  const std::unique_ptr<gguf::File> demo = OpenDemo();
  const std::string bytes = ReadFile(DemoModel());
  std::vector<BadModel> out;
  const auto add = [&](const std::string& what, const std::string& file, std::vector<std::string> words) {
    out.push_back({what, folder + "/" + file, std::move(words)});
    return out.back().path;
  };

  add("missing", "missing.gguf", {"missing.gguf"});

  WriteFile(add("truncated in the weights", "half.gguf", {"half.gguf", "truncated"}),
            bytes.substr(0, bytes.size() / 2));
  WriteFile(add("truncated in the header", "head.gguf", {"head.gguf"}), bytes.substr(0, 1000));
  WriteFile(add("empty", "empty.gguf", {"empty.gguf"}), "");
  WriteFile(add("not GGUF", "text.gguf", {"text.gguf", "GGUF"}), std::string(4096, 'x'));

  gguf::Writer llama = MetadataOf(*demo);
  llama.AddString("general.architecture", "llama");
  AddTensors(*demo, 3, &llama);
  Check(llama.WriteFile(add("another architecture", "llama.gguf", {"llama.gguf", "\"llama\"", "deepseek2"})));

  const std::string tensor = "blk.2.ffn_gate_exps.weight";
  constexpr uint32_t kIq2Xxs = 16;
  WriteFile(add("a quantization that is not supported", "quant.gguf", {"quant.gguf", tensor, "IQ2_XXS"}),
            WithTensorType(bytes, tensor, kIq2Xxs));

  gguf::Writer lacking = MetadataOf(*demo);
  AddTensors(*demo, 3, &lacking);
  Check(lacking.WriteFile(add("tensors missing", "lacking.gguf", {"lacking.gguf", "is missing"})));

  gguf::Writer shard = MetadataOf(*demo);
  shard.AddUint("split.no", 0, gguf::ValueType::kUint16);
  shard.AddUint("split.count", 3, gguf::ValueType::kUint16);
  shard.AddInt("split.tensors.count", static_cast<int64_t>(demo->tensors().size()));
  AddTensors(*demo, 3, &shard);
  Check(shard.WriteFile(add("shards missing", "split-00001-of-00003.gguf",
                            {"split-00002-of-00003.gguf", "2 of 3 files", "missing"})));

  std::filesystem::create_directory(add("an empty folder", "nothing", {"nothing"}));
  return out;
}

}  // namespace tandem::integration
