// Arithmetic on sizes that come from outside: nullopt instead of wrapping.
#pragma once

#include <concepts>
#include <optional>

namespace tandem {

template <std::integral T>
[[nodiscard]] constexpr std::optional<T> CheckedAdd(T a, T b) {
  T out;
  if (__builtin_add_overflow(a, b, &out)) return std::nullopt;
  return out;
}

template <std::integral T>
[[nodiscard]] constexpr std::optional<T> CheckedMul(T a, T b) {
  T out;
  if (__builtin_mul_overflow(a, b, &out)) return std::nullopt;
  return out;
}

// Rounds `value` up to a multiple of `alignment` (> 0).
template <std::unsigned_integral T>
[[nodiscard]] constexpr std::optional<T> CheckedRoundUp(T value, T alignment) {
  const T remainder = value % alignment;
  if (remainder == 0) return value;
  return CheckedAdd<T>(value, static_cast<T>(alignment - remainder));
}

}  // namespace tandem
