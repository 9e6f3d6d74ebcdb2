// TANDEM_CHECK(condition): for our own invariants only. What a file, a peer or a user controls is answered
// with absl::Status and never reaches one of these.
#pragma once

namespace tandem {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);

}  // namespace tandem

#define TANDEM_CHECK(condition)                              \
  do {                                                       \
    if (!(condition)) [[unlikely]] {                         \
      ::tandem::CheckFailed(__FILE__, __LINE__, #condition); \
    }                                                        \
  } while (false)
