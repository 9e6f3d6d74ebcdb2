#include "common/tokenizer/jinja/lexer.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/jinja/text.h"
#include "common/tokenizer/unicode.h"

namespace tandem::jinja {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || static_cast<signed char>(c) < 0;
}

class Lexer {
 public:
  Lexer(std::string_view source, std::vector<Token>* tokens) : tokens_(tokens) {
    // Line ends become \n; one at the very end goes.
    source_.reserve(source.size());
    for (size_t i = 0; i < source.size(); ++i) {
      if (source[i] == '\r') {
        source_.push_back('\n');
        if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
      } else {
        source_.push_back(source[i]);
      }
    }
    if (!source_.empty() && source_.back() == '\n') source_.pop_back();
  }

  absl::Status Run() {
    while (pos_ < source_.size()) TANDEM_RETURN_IF_ERROR(NextTag());
    Add(TokenKind::kEnd, "");
    return absl::OkStatus();
  }

 private:
  void Add(TokenKind kind, std::string text) { tokens_->push_back(Token{kind, line_, std::move(text)}); }

  void AdvanceTo(size_t pos) {
    line_ += static_cast<int>(std::count(source_.begin() + pos_, source_.begin() + pos, '\n'));
    pos_ = pos;
  }

  bool At(size_t pos, std::string_view what) const { return source_.compare(pos, what.size(), what) == 0; }

  // The data before the tag at `tag`, cut as its sign and lstrip_blocks say.
  void AddData(size_t tag, char sign, bool is_print) {
    std::string_view data = std::string_view(source_).substr(pos_, tag - pos_);
    if (sign == '-') {
      data = Strip(data, kRight);
    } else if (sign != '+' && !is_print) {
      const size_t newline = data.rfind('\n');
      const size_t line_start = newline == std::string_view::npos ? 0 : newline + 1;
      if ((line_start > 0 || line_starting_) && line_start < data.size() &&
          Strip(data.substr(line_start), kBoth).empty()) {
        data = data.substr(0, line_start);
      }
    }
    if (!data.empty()) Add(TokenKind::kData, std::string(data));
    AdvanceTo(tag);
  }

  // Behind a closing "-%}", "%}" and their like: what white space goes with it.
  void FinishTag(size_t end, char sign, bool trims_newline) {
    size_t pos = end;
    if (sign == '-') {
      pos = source_.size() - Strip(std::string_view(source_).substr(end), kLeft).size();
    } else if (sign != '+' && trims_newline && pos < source_.size() && source_[pos] == '\n') {
      ++pos;
    }
    AdvanceTo(pos);
    line_starting_ = pos > 0 && source_[pos - 1] == '\n';
  }

  absl::Status NextTag() {
    size_t tag = pos_;
    while (true) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        Add(TokenKind::kData, source_.substr(pos_));
        AdvanceTo(source_.size());
        return absl::OkStatus();
      }
      const char c = source_[tag + 1];
      if (c == '%' || c == '{' || c == '#') break;
      ++tag;
    }
    const char type = source_[tag + 1];
    const char sign = tag + 2 < source_.size() && (source_[tag + 2] == '-' || source_[tag + 2] == '+')
                          ? source_[tag + 2]
                          : ' ';
    AddData(tag, sign, type == '{');
    const size_t inside = tag + 2 + (sign == ' ' ? 0 : 1);
    if (type == '#') {
      const size_t end = source_.find("#}", tag + 2);
      if (end == std::string::npos) return TemplateError(line_, "missing end of comment tag");
      const char before =
          end > tag + 2 && (source_[end - 1] == '-' || source_[end - 1] == '+') ? source_[end - 1] : ' ';
      FinishTag(end + 2, before, true);
      return absl::OkStatus();
    }
    if (type == '%') {
      if (const size_t raw = RawEnd(inside, "raw", false); raw != std::string::npos) return Raw(raw);
    }
    Add(type == '%' ? TokenKind::kBlockBegin : TokenKind::kPrintBegin, "");
    AdvanceTo(inside);
    return Expression(type == '%');
  }

  // The end of a "raw -%}" or "endraw %}" whose name may begin at `pos`, sign included; npos if it is none.
  size_t RawEnd(size_t pos, std::string_view name, bool may_keep) const {
    while (pos < source_.size() && IsSpaceChar(static_cast<unsigned char>(source_[pos]))) ++pos;
    if (!At(pos, name)) return std::string::npos;
    pos += name.size();
    while (pos < source_.size() && IsSpaceChar(static_cast<unsigned char>(source_[pos]))) ++pos;
    if (At(pos, "-%}") || (may_keep && At(pos, "+%}"))) return pos + 3;
    return At(pos, "%}") ? pos + 2 : std::string::npos;
  }

  absl::Status Raw(size_t begin) {
    const int first_line = line_;
    FinishTag(begin, source_[begin - 3], false);
    for (size_t tag = source_.find("{%", pos_); tag != std::string::npos; tag = source_.find("{%", tag + 2)) {
      size_t inside = tag + 2;
      char sign = ' ';
      if (inside < source_.size() && (source_[inside] == '-' || source_[inside] == '+'))
        sign = source_[inside++];
      const size_t end = RawEnd(inside, "endraw", true);
      if (end == std::string::npos) continue;
      AddData(tag, sign, false);
      FinishTag(end, source_[end - 3], true);
      return absl::OkStatus();
    }
    return TemplateError(first_line, "missing end of raw directive");
  }

  absl::Status Expression(bool is_block) {
    const int first_line = line_;
    const std::string_view close = is_block ? "%}" : "}}";
    std::string open;  // brackets that wait for their partner
    while (pos_ < source_.size()) {
      if (open.empty()) {
        const char c = source_[pos_];
        const bool signed_close = (c == '-' || (c == '+' && is_block)) && At(pos_ + 1, close);
        if (signed_close || At(pos_, close)) {
          Add(is_block ? TokenKind::kBlockEnd : TokenKind::kPrintEnd, "");
          FinishTag(pos_ + (signed_close ? 3 : 2), signed_close ? c : ' ', is_block);
          return absl::OkStatus();
        }
      }
      TANDEM_RETURN_IF_ERROR(ExpressionToken(&open));
    }
    return TemplateError(first_line,
                         is_block ? "the block tag is not closed" : "the print tag is not closed");
  }

  absl::Status ExpressionToken(std::string* open) {
    const char c = source_[pos_];
    size_t length;
    const uint32_t code = DecodeChar(source_, pos_, &length);
    if (IsSpaceChar(code)) {
      AdvanceTo(pos_ + length);
      return absl::OkStatus();
    }
    if (c == '\'' || c == '"') return StringToken(c);
    if (IsDigit(c)) return NumberToken();
    if (IsNameStart(c)) {
      size_t end = pos_;
      while (end < source_.size() && (IsNameStart(source_[end]) || IsDigit(source_[end]))) ++end;
      Add(TokenKind::kName, source_.substr(pos_, end - pos_));
      AdvanceTo(end);
      return absl::OkStatus();
    }
    static constexpr std::array<std::string_view, 26> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (const std::string_view op : kOperators) {
      if (!At(pos_, op)) continue;
      if (c == '(' || c == '[' || c == '{') open->push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
      if (c == ')' || c == ']' || c == '}') {
        if (open->empty() || open->back() != c) {
          return TemplateError(line_, absl::StrCat("unexpected '", std::string(1, c), "'"));
        }
        open->pop_back();
      }
      Add(TokenKind::kOperator, std::string(op));
      AdvanceTo(pos_ + op.size());
      return absl::OkStatus();
    }
    return TemplateError(line_, absl::StrCat("unexpected character ", source_.substr(pos_, length)));
  }

  absl::Status NumberToken() {
    size_t end = pos_;
    std::string digits;
    const auto run = [&](auto accepts) {
      while (end < source_.size() &&
             (accepts(source_[end]) ||
              (source_[end] == '_' && end + 1 < source_.size() && accepts(source_[end + 1])))) {
        if (source_[end] != '_') digits.push_back(source_[end]);
        ++end;
      }
    };
    const char base =
        source_[pos_] == '0' && pos_ + 1 < source_.size() ? static_cast<char>(source_[pos_ + 1] | 0x20) : ' ';
    if (base == 'x' || base == 'o' || base == 'b') {
      end += 2;
      digits = {'0', base};
      if (base == 'x') run([](char c) { return IsDigit(c) || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f'); });
      if (base == 'o') run([](char c) { return c >= '0' && c <= '7'; });
      if (base == 'b') run([](char c) { return c == '0' || c == '1'; });
      Add(TokenKind::kInteger, digits);
      AdvanceTo(end);
      return absl::OkStatus();
    }
    run(IsDigit);
    bool is_float = false;
    if (end + 1 < source_.size() && source_[end] == '.' && IsDigit(source_[end + 1])) {
      is_float = true;
      digits.push_back('.');
      ++end;
      run(IsDigit);
    }
    if (end < source_.size() && (source_[end] | 0x20) == 'e') {
      size_t exponent = end + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
      if (exponent < source_.size() && IsDigit(source_[exponent])) {
        is_float = true;
        digits.append(source_, end, exponent - end);
        end = exponent;
        run(IsDigit);
      }
    }
    Add(is_float ? TokenKind::kFloat : TokenKind::kInteger, digits);
    AdvanceTo(end);
    return absl::OkStatus();
  }

  // Python's escapes; an unknown one stays with its backslash.
  absl::Status StringToken(char quote) {
    const int first_line = line_;
    std::string value;
    size_t i = pos_ + 1;
    const auto number = [&](size_t digits, int base, bool exact, uint32_t* out) {
      *out = 0;
      size_t n = 0;
      for (; n < digits && i + n < source_.size(); ++n) {
        const char c = source_[i + n];
        const int digit = IsDigit(c)                               ? c - '0'
                          : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                                   : 99;
        if (digit >= base) break;
        *out = *out * static_cast<uint32_t>(base) + static_cast<uint32_t>(digit);
      }
      i += n;
      return exact ? n == digits : n > 0;
    };
    while (i < source_.size() && source_[i] != quote) {
      if (source_[i] != '\\' || i + 1 >= source_.size()) {
        value.push_back(source_[i++]);
        continue;
      }
      const char c = source_[i + 1];
      static constexpr std::string_view kFrom = "\\'\"abfnrtv";
      static constexpr std::string_view kTo = "\\'\"\a\b\f\n\r\t\v";
      i += 2;
      uint32_t code = 0;
      if (const size_t k = kFrom.find(c); k != std::string_view::npos) {
        value.push_back(kTo[k]);
      } else if (c == '\n') {
        // The line goes on.
      } else if (c == 'x' || c == 'u' || c == 'U') {
        if (!number(c == 'x'   ? 2
                    : c == 'u' ? 4
                               : 8,
                    16, true, &code) ||
            code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
          return TemplateError(first_line, absl::StrCat("bad \\", std::string(1, c), " escape in a string"));
        }
        tokenizer::AppendUtf8(code, &value);
      } else if (c >= '0' && c <= '7') {
        --i;
        number(3, 8, false, &code);
        tokenizer::AppendUtf8(code, &value);
      } else {
        value.push_back('\\');
        value.push_back(c);
      }
    }
    if (i >= source_.size()) return TemplateError(first_line, "a string is not closed");
    Add(TokenKind::kString, std::move(value));
    AdvanceTo(i + 1);
    return absl::OkStatus();
  }

  std::string source_;
  std::vector<Token>* tokens_;
  size_t pos_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing but trimmed white space stands before on this line
};

}  // namespace

absl::Status TemplateError(int line, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("template line ", line, ": ", std::string(what)));
}

absl::Status Tokenize(std::string_view source, std::vector<Token>* tokens) {
  return Lexer(source, tokens).Run();
}

}  // namespace tandem::jinja
