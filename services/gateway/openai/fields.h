// Typed reads of a request's fields. The first thing that is wrong is kept, with the field's path.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "services/gateway/openai/api_error.h"

namespace tandem::gateway {

// Not thread-safe. A read after the first error returns nothing. `null` counts as absent.
class Fields {
 public:
  using Json = nlohmann::ordered_json;

  // `object` must be an object and outlive the reader; `path` stands before every name ("messages[1]").
  Fields(const Json& object, std::string path, std::optional<ApiError>* error)
      : object_(object), path_(std::move(path)), error_(error) {}

  const Json* Find(std::string_view name) const;  // nullptr: absent or null

  std::optional<bool> Bool(std::string_view name);
  std::optional<std::string> String(std::string_view name);
  std::optional<int64_t> Int(std::string_view name, int64_t least, int64_t most);
  // Within [least, most]; `open_most`: most itself excluded.
  std::optional<double> Number(std::string_view name, double least, double most, bool open_most = false);
  const Json* Array(std::string_view name);
  const Json* Object(std::string_view name);

  std::string Path(std::string_view name) const;
  bool ok() const { return !error_->has_value(); }
  void Fail(std::string_view name, std::string_view message, std::string_view code = "invalid_value");
  void WrongType(std::string_view name, const Json& value, std::string_view expected);

 private:
  const Json& object_;
  const std::string path_;
  std::optional<ApiError>* const error_;
};

// "an integer", "a string": what a value is, for messages.
std::string DescribeJson(const nlohmann::ordered_json& value);

}  // namespace tandem::gateway
