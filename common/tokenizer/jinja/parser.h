// Tokens to syntax tree.
#pragma once

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "common/tokenizer/jinja/ast.h"

namespace tandem::jinja {

// How deep expressions and statements may nest.
inline constexpr int kMaxTreeDepth = 400;

absl::StatusOr<NodePtr> ParseTemplate(std::string_view source);

}  // namespace tandem::jinja
