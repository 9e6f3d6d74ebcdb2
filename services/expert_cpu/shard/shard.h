// The weights that a process holds, in its own memory, and how they get there from the GGUF files.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/kernels/kernels.h"
#include "services/expert_cpu/shard/arena.h"
#include "services/expert_cpu/shard/plan.h"

namespace tandem::expert {

// Matrices of one kind (gate, up or down) of one layer: those of expert i begin i * expert_bytes after
// `data`.
struct ExpertStack {
  gguf::TensorType type = gguf::TensorType::kF32;
  const uint8_t* data = nullptr;
  uint64_t expert_bytes = 0;  // a multiple of 64
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_bytes = 0;

  kernels::Matrix Expert(int64_t i) const {
    kernels::Matrix m;
    m.type = type;
    m.data = data + static_cast<uint64_t>(i) * expert_bytes;
    m.rows = rows;
    m.cols = cols;
    m.row_bytes = row_bytes;
    return m;
  }
};

struct ShardLayer {
  ExpertStack gate;  // rows(): the slice of the intermediate dimension, cols: hidden
  ExpertStack up;
  ExpertStack down;                  // rows: hidden, cols: the slice of the intermediate dimension
  uint64_t expert_weight_bytes = 0;  // of one expert, all three, without padding
};

struct LoadProgress {
  std::atomic<uint64_t> bytes_read{0};
  std::atomic<uint64_t> bytes_total{0};
  std::atomic<bool> cancel{false};  // set by anyone: loading ends with Cancelled
};

struct LoadOptions {
  ShardRequest request;
  int threads = 8;  // reading at once
  ArenaKind arena = ArenaKind::kAuto;
  LoadProgress* progress = nullptr;  // may be null
  // What the process may take; tests set it. nullopt: as the system says.
  std::optional<uint64_t> usable_memory_bytes;
  // Called with the untouched memory before anything is read into it, to bind it to a node.
  std::function<void(void* data, uint64_t bytes)> bind_memory;
};

// Immutable after loading; thread-safe.
class Shard {
 public:
  // `path` as gguf::File::Open takes it. Only the shard's bytes are kept, and no map of the file. Errors:
  // those of gguf::File, model::ReadModelConfig, model::BindExperts and MakeShardPlan; ResourceExhausted with
  // both numbers if the memory does not suffice (before anything is read); DataLoss naming the file if it
  // ends early; Cancelled.
  static absl::StatusOr<std::unique_ptr<Shard>> Load(const std::string& path, const LoadOptions& options);

  const ShardPlan& plan() const { return plan_; }
  const std::string& model_name() const { return model_name_; }
  const std::string& fingerprint() const { return fingerprint_; }
  uint64_t resident_bytes() const { return arena_.bytes(); }
  const uint8_t* memory() const { return arena_.data(); }  // resident_bytes() of weights
  const Arena& arena() const { return arena_; }
  // nullptr: not a MoE layer of the model.
  const ShardLayer* FindLayer(int64_t block) const;
  std::vector<std::string> WeightTypes() const;  // each once, in the order of the file

 private:
  friend class ShardLoader;
  friend class ShardGenerator;
  Shard() = default;
  ShardPlan plan_;
  std::string model_name_;
  std::string fingerprint_;
  Arena arena_;
  std::vector<ShardLayer> layers_;  // by block number; empty entries for dense layers
};

}  // namespace tandem::expert
