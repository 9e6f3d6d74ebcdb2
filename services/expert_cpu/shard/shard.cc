#include "services/expert_cpu/shard/shard.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/model/config.h"
#include "common/model/tensors.h"
#include "common/topology/limits.h"
#include "services/expert_cpu/shard/reader.h"

namespace tandem::expert {
namespace {

constexpr uint64_t kAlignment = 64;
// What the process takes beside the weights: code, buffers of calls and of loading.
constexpr uint64_t kOverheadBytes = uint64_t{256} << 20;

std::string Gigabytes(uint64_t bytes) { return absl::StrFormat("%.2f GB", static_cast<double>(bytes) / 1e9); }

}  // namespace

// Lays out the stacks one after another, remembers what to read for each, then allocates and reads.
class ShardLoader {
 public:
  ShardLoader(const gguf::File& file, Shard& shard) : file_(file), shard_(shard) {}

  absl::Status Plan(const model::ModelConfig& config) {
    const ShardPlan& plan = shard_.plan_;
    shard_.layers_.resize(static_cast<size_t>(config.num_hidden_layers));
    for (const int64_t block : plan.layers) {
      TANDEM_ASSIGN_OR_RETURN(const model::ExpertTensors t, model::BindExperts(file_, config, block));
      ShardLayer& layer = shard_.layers_[static_cast<size_t>(block)];
      const bool fused = t.gate_up != nullptr;
      TANDEM_RETURN_IF_ERROR(AddRows(fused ? *t.gate_up : *t.gate, 0, layer.gate));
      TANDEM_RETURN_IF_ERROR(
          AddRows(fused ? *t.gate_up : *t.up, fused ? plan.moe_intermediate_size : 0, layer.up));
      TANDEM_RETURN_IF_ERROR(AddColumns(*t.down, layer.down));
      for (const ExpertStack* stack : {&layer.gate, &layer.up, &layer.down}) {
        layer.expert_weight_bytes += static_cast<uint64_t>(stack->rows * stack->row_bytes);
      }
    }
    return absl::OkStatus();
  }

  uint64_t arena_bytes() const { return bytes_; }

  // The arena must be there.
  absl::Status Read(const LoadOptions& options) {
    uint8_t* base = shard_.arena_.data();
    if (options.bind_memory) options.bind_memory(base, bytes_);
    for (const Placed& placed : placed_) placed.stack->data = base + placed.offset;
    std::vector<ReadPiece> pieces;
    for (const Placed& placed : placed_) {
      if (placed.alias) continue;
      for (int64_t e = 0; e < shard_.plan_.experts(); ++e) {
        ReadPiece piece = placed.first;
        piece.offset += static_cast<uint64_t>(e) * placed.file_expert_bytes;
        piece.to = base + placed.offset + static_cast<uint64_t>(e) * placed.stack->expert_bytes;
        pieces.push_back(piece);
      }
    }
    LoadProgress own;
    LoadProgress& progress = options.progress != nullptr ? *options.progress : own;
    progress.bytes_total = WantedBytes(pieces);
    return ReadPieces(file_.paths(), pieces, options.threads, progress);
  }

 private:
  struct Placed {
    ExpertStack* stack;
    uint64_t offset;             // in the arena
    ReadPiece first;             // of the first expert held, `to` not yet set
    uint64_t file_expert_bytes;  // distance of experts in the file
    bool alias;                  // the bytes are another tensor's, too: read and kept once
  };
  // What tells the bytes of two stacks apart: file, offset, begin in a row, type, rows, columns.
  using Source = std::tuple<int, uint64_t, uint64_t, uint32_t, int64_t, int64_t>;

  // Rows [row_offset + row_begin, row_offset + row_end) of every expert held.
  absl::Status AddRows(const gguf::Tensor& tensor, int64_t row_offset, ExpertStack& stack) {
    const ShardPlan& plan = shard_.plan_;
    stack.type = tensor.type;
    stack.rows = plan.rows();
    stack.cols = tensor.ne[0];
    stack.row_bytes = gguf::RowBytes(tensor.type, tensor.ne[0]);
    const auto row_bytes = static_cast<uint64_t>(stack.row_bytes);
    ReadPiece piece;
    piece.offset = static_cast<uint64_t>(row_offset + plan.row_begin) * row_bytes;
    piece.row_stride = row_bytes;
    return Place(tensor, piece, stack);
  }

  // Columns [row_begin, row_end) of every row of every expert held.
  absl::Status AddColumns(const gguf::Tensor& tensor, ExpertStack& stack) {
    const ShardPlan& plan = shard_.plan_;
    stack.type = tensor.type;
    stack.rows = tensor.ne[1];
    stack.cols = plan.rows();
    const int64_t block = gguf::GetTypeInfo(tensor.type).block_size;
    // Slices begin at multiples of kLeaf, which all block sizes divide, and end there or with the row.
    TANDEM_CHECK(plan.row_begin % block == 0 && stack.cols % block == 0);
    stack.row_bytes = gguf::RowBytes(tensor.type, stack.cols);
    ReadPiece piece;
    piece.row_begin = static_cast<uint64_t>(gguf::RowBytes(tensor.type, plan.row_begin));
    piece.row_stride = static_cast<uint64_t>(gguf::RowBytes(tensor.type, tensor.ne[0]));
    return Place(tensor, piece, stack);
  }

  absl::Status Place(const gguf::Tensor& tensor, ReadPiece piece, ExpertStack& stack) {
    const auto experts = static_cast<uint64_t>(shard_.plan_.experts());
    const auto file_expert_bytes = static_cast<uint64_t>(gguf::RowBytes(tensor.type, tensor.ne[0])) *
                                   static_cast<uint64_t>(tensor.ne[1]);
    piece.file = tensor.shard;
    piece.offset += tensor.file_offset + static_cast<uint64_t>(shard_.plan_.expert_begin) * file_expert_bytes;
    piece.rows = stack.rows;
    piece.row_bytes = static_cast<uint64_t>(stack.row_bytes);
    const auto bytes =
        CheckedRoundUp<uint64_t>(static_cast<uint64_t>(stack.rows) * piece.row_bytes, kAlignment);
    const auto all = bytes ? CheckedMul<uint64_t>(*bytes, experts) : std::nullopt;
    const auto end = all ? CheckedAdd<uint64_t>(bytes_, *all) : std::nullopt;
    if (!end)
      return absl::InvalidArgumentError(absl::StrCat(tensor.name, ": more bytes than can be counted"));
    stack.expert_bytes = *bytes;
    const Source source(piece.file, piece.offset, piece.row_begin, static_cast<uint32_t>(tensor.type),
                        stack.rows, stack.cols);
    const auto [at, is_new] = offsets_.emplace(source, bytes_);
    placed_.push_back({&stack, at->second, piece, file_expert_bytes, !is_new});
    if (is_new) bytes_ = *end;
    return absl::OkStatus();
  }

  const gguf::File& file_;
  Shard& shard_;
  std::vector<Placed> placed_;
  std::map<Source, uint64_t> offsets_;
  uint64_t bytes_ = 0;
};

absl::StatusOr<std::unique_ptr<Shard>> Shard::Load(const std::string& path, const LoadOptions& options) {
  gguf::File::Options header_only;
  header_only.map_data = false;
  TANDEM_ASSIGN_OR_RETURN(const std::unique_ptr<gguf::File> file, gguf::File::Open(path, header_only));
  // How experts are chosen is not this process's business: no group limit is read.
  TANDEM_ASSIGN_OR_RETURN(const model::ModelConfig config, model::ReadModelConfig(*file, "off"));
  std::unique_ptr<Shard> shard(new Shard());
  TANDEM_ASSIGN_OR_RETURN(shard->plan_, MakeShardPlan(config, options.request));
  shard->model_name_ = config.name;
  shard->fingerprint_ = file->Fingerprint();

  ShardLoader loader(*file, *shard);
  TANDEM_RETURN_IF_ERROR(loader.Plan(config));
  // Reserved huge pages do not count as available memory: try them before the numbers are looked at.
  if (options.arena == ArenaKind::kAuto || options.arena == ArenaKind::kHugeTlb) {
    auto reserved = Arena::Allocate(loader.arena_bytes(), ArenaKind::kHugeTlb);
    if (!reserved.ok() && options.arena == ArenaKind::kHugeTlb) return Annotate(reserved.status(), path);
    if (reserved.ok()) {
      shard->arena_ = std::move(*reserved);
      TANDEM_RETURN_IF_ERROR(loader.Read(options));
      return shard;
    }
  }
  const uint64_t usable = options.usable_memory_bytes.has_value() ? *options.usable_memory_bytes
                                                                  : topology::ReadMemoryInfo().UsableBytes();
  const uint64_t needed = loader.arena_bytes() + kOverheadBytes;
  if (needed > usable) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": the shard (", shard->plan_.DebugString(), ") needs ", Gigabytes(needed),
                     " of memory (", Gigabytes(loader.arena_bytes()), " of weights), ", Gigabytes(usable),
                     " are available: share the experts out over more machines, take a model with fewer "
                     "bits a weight, or say --memory-check=false to try all the same"));
  }
  TANDEM_ASSIGN_OR_RETURN(shard->arena_, Arena::Allocate(loader.arena_bytes(), options.arena));
  TANDEM_RETURN_IF_ERROR(loader.Read(options));
  return shard;
}

const ShardLayer* Shard::FindLayer(int64_t block) const {
  if (block < 0 || block >= static_cast<int64_t>(layers_.size())) return nullptr;
  const ShardLayer& layer = layers_[static_cast<size_t>(block)];
  return layer.expert_weight_bytes == 0 ? nullptr : &layer;
}

std::vector<std::string> Shard::WeightTypes() const {
  std::vector<std::string> out;
  for (const ShardLayer& layer : layers_) {
    if (layer.expert_weight_bytes == 0) continue;
    for (const ExpertStack* stack : {&layer.gate, &layer.up, &layer.down}) {
      std::string name(gguf::TypeName(stack->type));
      if (std::find(out.begin(), out.end(), name) == out.end()) out.push_back(std::move(name));
    }
  }
  return out;
}

}  // namespace tandem::expert
