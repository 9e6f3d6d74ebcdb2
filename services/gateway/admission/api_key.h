// Comparison of secrets.
#pragma once

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

// Is `authorization` ("Bearer KEY") the word of a client that knows `key`? An empty key asks for nothing.
inline bool BearerMatches(std::string_view authorization, std::string_view key) {
  constexpr std::string_view kBearer = "Bearer ";
  if (key.empty()) return true;
  return authorization.starts_with(kBearer) && SameSecret(authorization.substr(kBearer.size()), key);
}

}  // namespace tandem::gateway
