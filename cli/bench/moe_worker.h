// A shard of generated weights with its threads: what both kinds of MoeRunner compute with.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "cli/bench/moe_runner.h"
#include "common/threading/thread_pool.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::cli {

class MoeWorker {
 public:
  static absl::StatusOr<std::unique_ptr<MoeWorker>> Make(const MoeRunnerOptions& options,
                                                         const expert::ShardRequest& request);
  expert::Moe& moe() { return *moe_; }
  const expert::Shard& shard() const { return *shard_; }
  // Bytes a second of a read of `bytes` at the next place of the memory.
  double Read(uint64_t bytes);

 private:
  MoeWorker() = default;
  std::unique_ptr<threading::ThreadPool> pool_;
  std::unique_ptr<expert::Shard> shard_;
  std::unique_ptr<expert::Moe> moe_;
  uint64_t next_ = 0;
};

}  // namespace tandem::cli
