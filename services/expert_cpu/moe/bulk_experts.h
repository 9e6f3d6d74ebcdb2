// A call's experts by the bf16 tiles of common/kernels/bulk.h: for prefill, where the caller does not ask for
// the exactness of the integer kernels. A token's answer does not depend on the batch or on threads here
// either; but it does, in its last bits, on how the intermediate rows are sliced.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/kernels/activations.h"
#include "common/kernels/kernels.h"
#include "common/threading/claims.h"
#include "common/threading/thread_pool.h"
#include "services/expert_cpu/moe/grouping.h"
#include "services/expert_cpu/moe/work_units.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {

// One call at a time.
class BulkExperts {
 public:
  // All must outlive it.
  BulkExperts(threading::ThreadPool& pool, threading::Claims& claims) : pool_(pool), claims_(claims) {}

  // Whether machine and build have the tiles, and kernels for the layer's weights.
  static bool Serves(const ShardLayer& layer);

  // activations: [n_tokens, hidden] as bf16 or float32, read once. Adds to sum, [n_tokens, hidden].
  void Forward(const ShardLayer& layer, const Grouping& grouping, int64_t n_tokens,
               std::span<const uint8_t> activations, bool is_bf16, double* sum);

 private:
  // Up to 16 tokens of an expert.
  struct Tile {
    int64_t first_pair;
    int64_t pairs;
  };
  // Groups [begin, end), whose tokens are prepared at once.
  struct Wave {
    size_t begin;
    size_t end;
  };
  struct Sums {  // of a worker
    kernels::Buffer<float> gate, up;
  };
  struct Job;  // what a call is about

  void ReadActivations(const Job& job, std::span<const uint8_t> activations, bool is_bf16);
  void Pack(const Job& job, const Wave& wave);
  void GateUp(const Job& job, const Wave& wave);
  void Down(const Job& job);
  std::vector<Wave> MakeTiles(const Job& job);

  threading::ThreadPool& pool_;
  threading::Claims& claims_;
  std::vector<Tile> tiles_;            // of all groups, one after the other
  std::vector<int64_t> first_tile_;    // of each group, and the end
  kernels::Buffer<uint16_t> x_;        // [n_tokens, hidden]
  kernels::Buffer<uint16_t> x_tiles_;  // of a wave
  kernels::Buffer<uint16_t> h_tiles_;  // of all groups: SiLU(gate) * up
  std::vector<Sums> sums_;             // by worker
  WorkUnits down_units_;
};

}  // namespace tandem::expert
