// The header of one GGUF file (metadata and tensor list), parsed from untrusted bytes. Internal to
// common/gguf.
//
// Layout, little-endian: "GGUF", u32 version, u64 n_tensors, u64 n_kv, then n_kv times {string key, u32 type,
// value}, then n_tensors times {string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset}, then padding
// to general.alignment, then the data that the offsets count from. A string is {u64 length, bytes}; an array
// is {u32 element type, u64 count, elements}.
//
// Thread-safe: no state. Memory taken is at most a small multiple of the bytes given.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"

namespace tandem::gguf::internal {

struct Header {
  uint32_t version = 0;
  uint32_t alignment = 32;
  std::vector<std::pair<std::string, Value>> metadata;
  absl::flat_hash_map<std::string, size_t> metadata_index;
  std::vector<Tensor> tensors;  // file_offset from the start of the file; data nullptr, shard 0
  uint64_t data_start = 0;      // byte of the file where the data section starts
};

// `name` stands in errors for the file. Bytes behind the header are not looked at.
absl::StatusOr<Header> ParseHeader(std::span<const uint8_t> bytes, const std::string& name);

// Every tensor of `header` lies within a file of `file_bytes` bytes, and no two overlap in part. Tensors that
// share exactly one region are allowed. Offsets need not follow each other without gaps: files with
// alternative orders and holes exist and are harmless once every region is checked by itself.
absl::Status CheckDataLayout(const Header& header, uint64_t file_bytes, const std::string& name);

// `text` in single quotes, unprintable bytes escaped, shortened; safe to log whatever the file holds.
std::string Quoted(std::string_view text);

// What a file that does not start with "GGUF" looks like, with what to do about it.
std::string DescribeForeignMagic(std::span<const uint8_t> bytes);

}  // namespace tandem::gguf::internal
