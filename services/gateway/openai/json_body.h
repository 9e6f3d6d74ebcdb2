// A request body as JSON, within bounds that keep its parsing cheap.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace tandem::gateway {

inline constexpr int kMaxJsonDepth = 64;
inline constexpr size_t kMaxJsonValues = 1'000'000;
inline constexpr size_t kMaxJsonKeys = 1024;  // of one object

// InvalidArgument says what is wrong and at which byte, line and column; text that is not UTF-8 is not JSON.
absl::StatusOr<nlohmann::ordered_json> ParseJsonBody(std::string_view body);

}  // namespace tandem::gateway
