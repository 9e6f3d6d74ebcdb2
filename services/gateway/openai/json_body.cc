#include "services/gateway/openai/json_body.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace tandem::gateway {
namespace {

using Json = nlohmann::ordered_json;

// Reads a text without keeping anything: is it JSON, and within the bounds?
class Checker final : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_object(std::size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override { return Open(); }
  bool end_array() override { return Close(); }
  bool key(string_t&) override {
    if (++keys_.back() <= kMaxJsonKeys) return true;
    error_ = absl::StrCat("an object has more than ", kMaxJsonKeys, " keys");
    return false;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 5: syntax error while ..."
    std::string_view text = e.what();
    if (const size_t end = text.find("] "); end != std::string_view::npos) text.remove_prefix(end + 2);
    if (const size_t end = text.find(": ");
        text.starts_with("parse error") && end != std::string_view::npos) {
      text.remove_prefix(end + 2);
    }
    error_ = text;
    position_ = position;
    at_ = true;
    return false;
  }

  const std::string& error() const { return error_; }
  bool has_position() const { return at_; }
  size_t position() const { return position_; }  // bytes read when the error was seen

 private:
  bool Value() {
    if (++values_ <= kMaxJsonValues) return true;
    error_ = absl::StrCat("more than ", kMaxJsonValues, " values");
    return false;
  }
  bool Open() {
    keys_.push_back(0);
    if (keys_.size() > kMaxJsonDepth) {
      error_ = absl::StrCat("nested deeper than ", kMaxJsonDepth, " levels");
      return false;
    }
    return Value();
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }

  std::vector<size_t> keys_;  // one an open object or array
  size_t values_ = 0;
  std::string error_;
  bool at_ = false;
  size_t position_ = 0;
};

}  // namespace

absl::StatusOr<Json> ParseJsonBody(std::string_view body) {
  if (body.empty()) return absl::InvalidArgumentError("the body is empty; expected a JSON object");
  Checker checker;
  if (!Json::sax_parse(body.begin(), body.end(), &checker)) {
    if (!checker.has_position()) {
      return absl::InvalidArgumentError(absl::StrCat("the body is refused: ", checker.error()));
    }
    const size_t at = std::min(checker.position() == 0 ? 0 : checker.position() - 1, body.size());
    const std::string_view before = body.substr(0, at);
    const size_t line = 1 + static_cast<size_t>(std::count(before.begin(), before.end(), '\n'));
    const size_t newline = before.rfind('\n');
    const size_t column = at - (newline == std::string_view::npos ? 0 : newline + 1) + 1;
    return absl::InvalidArgumentError(absl::StrCat("the body is not valid JSON at byte ", at, " (line ", line,
                                                   ", column ", column, "): ", checker.error()));
  }
  Json json = Json::parse(body.begin(), body.end(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body is a JSON ", json.type_name(), "; expected an object"));
  }
  return json;
}

}  // namespace tandem::gateway
