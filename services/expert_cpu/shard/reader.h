// Reading many pieces of files into memory with several large requests in flight.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace tandem::expert {

struct LoadProgress;

// `rows` rows of `row_bytes` bytes, `row_stride` apart in the file from `offset` on; of each row the bytes
// [row_begin, row_begin + row_bytes) are wanted. They go to `to` without gaps.
struct ReadPiece {
  int file = 0;  // index into the paths
  uint64_t offset = 0;
  int64_t rows = 0;
  uint64_t row_stride = 0;
  uint64_t row_begin = 0;
  uint64_t row_bytes = 0;
  uint8_t* to = nullptr;
};

// Bytes that land in memory; what is skipped between the rows does not count.
uint64_t WantedBytes(const std::vector<ReadPiece>& pieces);

// NotFound / DataLoss name the file. Rows that are contiguous in the file are read in place; others through a
// buffer, whole rows at once, as the runs between are shorter than what a disk reads anyway.
absl::Status ReadPieces(const std::vector<std::string>& paths, const std::vector<ReadPiece>& pieces,
                        int threads, LoadProgress& progress);

}  // namespace tandem::expert
