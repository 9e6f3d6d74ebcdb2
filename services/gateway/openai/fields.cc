#include "services/gateway/openai/fields.h"

#include "absl/strings/str_cat.h"

namespace tandem::gateway {
namespace {

absl::string_view Abseil(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace

std::string DescribeJson(const nlohmann::ordered_json& value) {
  using Type = nlohmann::ordered_json::value_t;
  switch (value.type()) {
    case Type::null:
      return "null";
    case Type::boolean:
      return "a boolean";
    case Type::number_integer:
    case Type::number_unsigned:
      return "an integer";
    case Type::number_float:
      return "a number";
    case Type::string:
      return "a string";
    case Type::array:
      return "an array";
    default:
      return "an object";
  }
}

std::string Fields::Path(std::string_view name) const {
  if (path_.empty()) return std::string(name);
  return name.empty() ? path_ : path_ + "." + std::string(name);
}

void Fields::Fail(std::string_view name, std::string_view message, std::string_view code) {
  if (!ok()) return;
  const std::string path = Path(name);
  *error_ = BadRequest(absl::StrCat("'", path, "' ", Abseil(message)), path, code);
}

void Fields::WrongType(std::string_view name, const Json& value, std::string_view expected) {
  Fail(name, absl::StrCat("must be ", Abseil(expected), ", not ", DescribeJson(value)), "invalid_type");
}

const Fields::Json* Fields::Find(std::string_view name) const {
  const auto it = object_.find(std::string(name));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

std::optional<bool> Fields::Bool(std::string_view name) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    WrongType(name, *value, "true or false");
    return std::nullopt;
  }
  return value->get<bool>();
}

std::optional<std::string> Fields::String(std::string_view name) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    WrongType(name, *value, "a string");
    return std::nullopt;
  }
  return value->get_ref<const std::string&>();
}

std::optional<int64_t> Fields::Int(std::string_view name, int64_t least, int64_t most) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (!value->is_number_integer()) {
    WrongType(name, *value, "an integer");
    return std::nullopt;
  }
  const bool too_large = value->is_number_unsigned() &&
                         value->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  const int64_t number = too_large ? std::numeric_limits<int64_t>::max() : value->get<int64_t>();
  if (too_large || number < least || number > most) {
    Fail(name, absl::StrCat("must be from ", least, " to ", most, ", not ", value->dump()), "out_of_range");
    return std::nullopt;
  }
  return number;
}

std::optional<double> Fields::Number(std::string_view name, double least, double most, bool open_most) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    WrongType(name, *value, "a number");
    return std::nullopt;
  }
  const double number = value->get<double>();
  if (!std::isfinite(number) || number < least || number > most || (open_most && number >= most)) {
    Fail(name,
         absl::StrCat("must be from ", least, " to ", open_most ? "less than " : "", most, ", not ",
                      value->dump()),
         "out_of_range");
    return std::nullopt;
  }
  return number;
}

const Fields::Json* Fields::Array(std::string_view name) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return nullptr;
  if (!value->is_array()) {
    WrongType(name, *value, "an array");
    return nullptr;
  }
  return value;
}

const Fields::Json* Fields::Object(std::string_view name) {
  const Json* value = Find(name);
  if (!ok() || value == nullptr) return nullptr;
  if (!value->is_object()) {
    WrongType(name, *value, "an object");
    return nullptr;
  }
  return value;
}

}  // namespace tandem::gateway
