#include "services/expert_cpu/moe/bulk_experts.h"

#include <algorithm>

#include "common/kernels/bulk.h"
#include "common/model/expert_sum.h"

namespace tandem::expert {
namespace {

// Tokens whose tiles for gate and up are made at once: bounds that buffer. Where a wave ends all wait for the
// slowest, so they should be few.
constexpr int64_t kWaveTiles = 1024;
// Tiles that a unit of work takes at once: bounds its sums.
constexpr int64_t kChunkTiles = 16;
// From so many tiles of an expert on, tokens are the larger part of what products read, and many rows at a
// time read them less often.
constexpr int64_t kManyTiles = 4;
constexpr int64_t kFewRows = 64, kManyRows = 256;

}  // namespace

struct BulkExperts::Job {
  const ShardLayer& layer;
  const Grouping& grouping;
  int64_t n_tokens;
  double* sum;

  int64_t rows() const { return layer.gate.rows; }
  int64_t hidden() const { return layer.gate.cols; }
  bool many(size_t group) const { return kernels::BulkTiles(grouping.groups()[group].pairs) >= kManyTiles; }
};

bool BulkExperts::Serves(const ShardLayer& layer) {
  return kernels::BulkAvailable() && kernels::BulkSameOrder(layer.gate.type, layer.up.type) &&
         kernels::BulkFits(layer.gate.type, layer.gate.rows, layer.gate.cols) &&
         kernels::BulkFits(layer.up.type, layer.up.rows, layer.up.cols) &&
         kernels::BulkFits(layer.down.type, layer.down.rows, layer.down.cols);
}

void BulkExperts::Forward(const ShardLayer& layer, const Grouping& grouping, int64_t n_tokens,
                          std::span<const uint8_t> activations, bool is_bf16, double* sum) {
  if (grouping.groups().empty()) return;
  const Job job{layer, grouping, n_tokens, sum};
  sums_.resize(static_cast<size_t>(pool_.threads()));
  ReadActivations(job, activations, is_bf16);
  const std::vector<Wave> waves = MakeTiles(job);
  h_tiles_.Resize(kernels::BulkTokenWords(first_tile_.back(), job.rows()));
  for (const Wave& wave : waves) {
    Pack(job, wave);
    GateUp(job, wave);
  }
  Down(job);
}

void BulkExperts::ReadActivations(const Job& job, std::span<const uint8_t> activations, bool is_bf16) {
  const int64_t hidden = job.hidden();
  x_.Resize(job.n_tokens * hidden);
  pool_.ParallelFor(job.n_tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      uint16_t* to = x_.data() + t * hidden;
      if (is_bf16) {
        kernels::BulkOrderBf16(job.layer.gate.type, activations.data() + 2 * t * hidden, hidden, to);
      } else {
        kernels::BulkOrderFloat(job.layer.gate.type, activations.data() + 4 * t * hidden, hidden, to);
      }
    }
  });
}

std::vector<BulkExperts::Wave> BulkExperts::MakeTiles(const Job& job) {
  tiles_.clear();
  first_tile_.clear();
  std::vector<Wave> waves;
  int64_t wave_first = 0;
  for (size_t g = 0; g < job.grouping.groups().size(); ++g) {
    const ExpertGroup& group = job.grouping.groups()[g];
    const auto first = static_cast<int64_t>(tiles_.size());
    const int64_t tiles = kernels::BulkTiles(group.pairs);
    if (waves.empty() || first + tiles - wave_first > kWaveTiles) {
      waves.push_back({g, g});
      wave_first = first;
    }
    waves.back().end = g + 1;
    first_tile_.push_back(first);
    for (int64_t i = 0; i < group.pairs; i += kernels::kBulkTileTokens) {
      tiles_.push_back({group.first_pair + i, std::min(kernels::kBulkTileTokens, group.pairs - i)});
    }
  }
  first_tile_.push_back(static_cast<int64_t>(tiles_.size()));
  return waves;
}

void BulkExperts::Pack(const Job& job, const Wave& wave) {
  const int64_t first = first_tile_[wave.begin], count = first_tile_[wave.end] - first;
  x_tiles_.Resize(kernels::BulkTokenWords(count, job.hidden()));
  pool_.ParallelFor(count, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = tiles_[static_cast<size_t>(first + i)];
      kernels::BulkPack(x_.data(), job.hidden(),
                        {job.grouping.tokens().data() + tile.first_pair, static_cast<size_t>(tile.pairs)},
                        x_tiles_.data() + kernels::BulkTokenWords(i, job.hidden()));
    }
  });
}

// Units: (expert, range of rows), gate and up.
void BulkExperts::GateUp(const Job& job, const Wave& wave) {
  const ShardLayer& layer = job.layer;
  const int64_t unit_rows = std::min(job.rows(), job.many(wave.begin) ? kManyRows : kFewRows);
  const int64_t units_each = (job.rows() + unit_rows - 1) / unit_rows;
  claims_.Reset(static_cast<int64_t>(wave.end - wave.begin) * units_each);
  pool_.ParallelFor(pool_.threads(), 1, [&](int64_t, int64_t, int worker) {
    Sums& sums = sums_[static_cast<size_t>(worker)];
    sums.gate.Resize(kernels::BulkSums(kChunkTiles, unit_rows));
    sums.up.Resize(kernels::BulkSums(kChunkTiles, unit_rows));
    claims_.Run(worker, [&](int64_t unit, bool, int64_t next_unit) {
      const size_t g = wave.begin + static_cast<size_t>(unit / units_each);
      const int64_t row_begin = unit % units_each * unit_rows;
      const int64_t row_end = std::min(job.rows(), row_begin + unit_rows);
      const int64_t expert = job.grouping.groups()[g].expert;
      const kernels::Matrix gate = layer.gate.Expert(expert), up = layer.up.Expert(expert);
      kernels::Matrix next_gate;
      kernels::Upcoming next_unit_gate;
      if (next_unit >= 0) {
        const size_t next_group = wave.begin + static_cast<size_t>(next_unit / units_each);
        next_gate = layer.gate.Expert(job.grouping.groups()[next_group].expert);
        next_unit_gate = {&next_gate, next_unit % units_each * unit_rows, job.rows(), 0};
      }
      for (int64_t tile = first_tile_[g]; tile < first_tile_[g + 1]; tile += kChunkTiles) {
        const int64_t tiles = std::min(kChunkTiles, first_tile_[g + 1] - tile);
        const uint16_t* x =
            x_tiles_.data() + kernels::BulkTokenWords(tile - first_tile_[wave.begin], job.hidden());
        const bool last = tile + tiles == first_tile_[g + 1];
        kernels::BulkMatMul(gate, row_begin, row_end, x, tiles, sums.gate.data(),
                            {&up, row_begin, row_end, 0});
        kernels::BulkMatMul(up, row_begin, row_end, x, tiles, sums.up.data(),
                            last ? next_unit_gate : kernels::Upcoming{&gate, row_begin, row_end, 0});
        kernels::BulkSiluMul(layer.down.type, sums.gate.data(), sums.up.data(), tiles, row_begin, row_end,
                             job.rows(), h_tiles_.data() + kernels::BulkTokenWords(tile, job.rows()));
      }
    });
  });
}

// Units: ranges of rows over all experts, so that no two workers add to the same sums.
void BulkExperts::Down(const Job& job) {
  const std::vector<ExpertGroup>& groups = job.grouping.groups();
  const int64_t hidden = job.hidden();
  // Each unit reads the h of all experts: with many tokens that takes more of the memory than the weights do,
  // and as few units as let all workers end together are best. With few, a unit's sums stay in the caches.
  const int64_t most = job.many(0) ? kManyRows : kFewRows;
  down_units_.Cut(1, hidden, std::max(1, pool_.threads() * 3 / 4), {kernels::kBulkRowStep, most});
  claims_.Reset(down_units_.count());
  pool_.ParallelFor(pool_.threads(), 1, [&](int64_t, int64_t, int worker) {
    kernels::Buffer<float>& sums = sums_[static_cast<size_t>(worker)].gate;
    sums.Resize(kernels::BulkSums(kChunkTiles, most));
    claims_.Run(worker, [&](int64_t unit, bool, int64_t next_unit) {
      const int64_t row_begin = down_units_[unit].begin, row_end = down_units_[unit].end;
      for (size_t g = 0; g < groups.size(); ++g) {
        const kernels::Matrix down = job.layer.down.Expert(groups[g].expert);
        const bool last_group = g + 1 == groups.size();
        const kernels::Matrix next_down = job.layer.down.Expert(groups[last_group ? 0 : g + 1].expert);
        kernels::Upcoming next;
        if (!last_group) next = {&next_down, row_begin, row_end, 0};
        if (last_group && next_unit >= 0) {
          next = {&next_down, down_units_[next_unit].begin, down_units_[next_unit].end, 0};
        }
        for (int64_t tile = first_tile_[g]; tile < first_tile_[g + 1]; tile += kChunkTiles) {
          const int64_t tiles = std::min(kChunkTiles, first_tile_[g + 1] - tile);
          const bool last = tile + tiles == first_tile_[g + 1];
          const int64_t pair = tiles_[static_cast<size_t>(tile)].first_pair;
          const int64_t pairs =
              std::min(tiles * kernels::kBulkTileTokens, groups[g].first_pair + groups[g].pairs - pair);
          kernels::BulkMatMul(down, row_begin, row_end,
                              h_tiles_.data() + kernels::BulkTokenWords(tile, job.rows()), tiles, sums.data(),
                              last ? next : kernels::Upcoming{&down, row_begin, row_end, 0});
          kernels::BulkAdd(sums.data(), tiles, pairs, row_begin, row_end,
                           {job.grouping.weights().data() + pair, job.grouping.tokens().data() + pair,
                            job.sum, hidden, model::kGridShift});
        }
      }
    });
  });
}

}  // namespace tandem::expert
