// Template text to tokens, with the white space control of jinja2 under trim_blocks and lstrip_blocks.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace tandem::jinja {

enum class TokenKind {
  kData,
  kBlockBegin,
  kBlockEnd,
  kPrintBegin,
  kPrintEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  int line = 1;
  std::string text;  // data; name; the string's value; digits; the operator

  bool IsOperator(std::string_view op) const { return kind == TokenKind::kOperator && text == op; }
  bool IsName(std::string_view name) const { return kind == TokenKind::kName && text == name; }
};

// The error of a template at a line.
absl::Status TemplateError(int line, std::string_view what);

// Appends the tokens of `source`, the last of them kEnd.
absl::Status Tokenize(std::string_view source, std::vector<Token>* tokens);

}  // namespace tandem::jinja
