// Comparison of secrets.
#pragma once

#include <algorithm>
#include <string_view>

namespace tandem::gateway {

// Takes the same time wherever the first difference is.
inline bool SameSecret(std::string_view given, std::string_view secret) {
  unsigned difference = given.size() == secret.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    const char expected = secret.empty() ? '\0' : secret[i % secret.size()];
    difference |= static_cast<unsigned char>(given[i]) ^ static_cast<unsigned char>(expected);
  }
  return difference == 0;
}

// Is `authorization` ("Bearer KEY", the scheme in any case of letters, RFC 9110 11.1) the word of a client
// that knows `key`? An empty key asks for nothing.
inline bool BearerMatches(std::string_view authorization, std::string_view key) {
  constexpr std::string_view kBearer = "bearer ";
  if (key.empty()) return true;
  if (authorization.size() < kBearer.size()) return false;
  for (size_t i = 0; i < kBearer.size(); ++i) {
    const char c = authorization[i];
    if ((c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c) != kBearer[i]) return false;
  }
  authorization.remove_prefix(
      std::min(authorization.find_first_not_of(' ', kBearer.size()), authorization.size()));
  return SameSecret(authorization, key);
}

}  // namespace tandem::gateway
