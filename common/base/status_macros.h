// Propagation of absl::Status. Thread-safe: no state.
#pragma once

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the current function if `expr` (an absl::Status) is not OK.
#define TANDEM_RETURN_IF_ERROR(expr)                          \
  do {                                                        \
    if (::absl::Status tandem_s_ = (expr); !tandem_s_.ok()) { \
      return tandem_s_;                                       \
    }                                                         \
  } while (false)

// Evaluates `rexpr` (an absl::StatusOr<T>); assigns its value to `lhs` or returns its status.
#define TANDEM_ASSIGN_OR_RETURN(lhs, rexpr) \
  TANDEM_ASSIGN_OR_RETURN_IMPL_(TANDEM_CONCAT_(tandem_or_, __LINE__), lhs, rexpr)
#define TANDEM_ASSIGN_OR_RETURN_IMPL_(var, lhs, rexpr) \
  auto var = (rexpr);                                  \
  if (!var.ok()) return std::move(var).status();       \
  lhs = std::move(var).value()
#define TANDEM_CONCAT_(a, b) TANDEM_CONCAT2_(a, b)
#define TANDEM_CONCAT2_(a, b) a##b

namespace tandem {

// The same status with `context` and ": " put before its message. OK stays OK.
absl::Status Annotate(const absl::Status& status, std::string_view context);

}  // namespace tandem
