// Traces of requests as they arrived somewhere: when, how long, and what their prompts have in common.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

struct TraceRequest {
  double seconds = 0;           // since the trace's first request
  int64_t prompt_tokens = 0;    // > 0
  int64_t output_tokens = 0;    // > 0
  std::vector<int64_t> blocks;  // ids of kTraceBlockTokens prompt tokens each; empty: nothing is known
};

// Tokens of a Mooncake block; the last block of a prompt may have fewer.
inline constexpr int64_t kTraceBlockTokens = 512;

// Mooncake's JSON lines: {"timestamp": milliseconds, "input_length", "output_length", "hash_ids": [...]},
// equal ids for equal prefixes. Azure's CSV: TIMESTAMP,ContextTokens,GeneratedTokens under that heading, with
// timestamps as "2023-11-16 18:15:46.6805900". Requests come out in the order of their times.
// InvalidArgument: "NAME:LINE: what is wrong".
absl::StatusOr<std::vector<TraceRequest>> ParseMooncake(std::string_view text, const std::string& name);
absl::StatusOr<std::vector<TraceRequest>> ParseAzure(std::string_view text, const std::string& name);

// `format`: mooncake, azure, or auto: by the file's first character. NotFound names the file.
absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path, const std::string& format);

}  // namespace tandem::cli
