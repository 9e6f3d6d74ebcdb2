#include "common/tokenizer/jinja/values.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "absl/strings/string_view.h"
#include "common/tokenizer/jinja/text.h"
#include "nlohmann/json.hpp"

namespace tandem::jinja {
namespace {

const std::string& Empty() {
  static const std::string* const empty = new std::string;
  return *empty;
}

bool AsNumbers(const Value& a, const Value& b) { return a.IsNumber() && b.IsNumber(); }

}  // namespace

Value Value::String(std::string s) {
  auto object = std::make_shared<StringObject>();
  object->text = std::move(s);
  return Of(Type::kString, std::move(object));
}

Value Value::List(std::vector<Value> items, Flavor flavor) {
  auto object = std::make_shared<ListObject>();
  for (const Value& item : items) object->depth = std::max(object->depth, item.depth() + 1);
  object->items = std::move(items);
  object->flavor = flavor;
  return Of(Type::kList, std::move(object));
}

Value Value::Dict(std::shared_ptr<DictObject> dict) { return Of(Type::kDict, std::move(dict)); }

Value Value::Undefined(std::string what) {
  auto object = std::make_shared<StringObject>();
  object->text = std::move(what);
  return Of(Type::kUndefined, std::move(object));
}

bool Value::IsSequence(Flavor flavor) const { return type_ == Type::kList && list().flavor == flavor; }
const std::string& Value::string() const {
  return object_ == nullptr ? Empty() : static_cast<const StringObject&>(*object_).text;
}
const std::vector<Value>& Value::items() const { return list().items; }
const ListObject& Value::list() const { return static_cast<const ListObject&>(*object_); }
const DictObject& Value::dict() const { return static_cast<const DictObject&>(*object_); }

int Value::depth() const {
  if (type_ == Type::kList) return list().depth;
  if (type_ == Type::kDict) return dict().depth;
  return 0;
}

const Value* DictObject::Find(std::string_view key) const {
  const auto it = by_string.find(absl::string_view(key.data(), key.size()));
  return it == by_string.end() ? nullptr : &entries[it->second].second;
}

const Value* DictObject::Find(const Value& key) const {
  if (key.Is(Type::kString)) return Find(std::string_view(key.string()));
  for (const auto& [k, v] : entries) {
    if (!k.Is(Type::kString) && Equal(k, key)) return &v;
  }
  return nullptr;
}

void DictObject::Set(const Value& key, Value value) {
  depth = std::max({depth, value.depth() + 1, key.depth() + 1});
  if (const Value* old = Find(key)) {
    *const_cast<Value*>(old) = std::move(value);
    return;
  }
  if (key.Is(Type::kString)) by_string.emplace(key.string(), entries.size());
  entries.emplace_back(key, std::move(value));
}

bool Truthy(const Value& v) {
  switch (v.type()) {
    case Type::kUndefined:
    case Type::kNone:
      return false;
    case Type::kBool:
    case Type::kInt:
      return v.integer() != 0;
    case Type::kFloat:
      return v.number() != 0;
    case Type::kString:
      return !v.string().empty();
    case Type::kList:
      return v.list().flavor == Flavor::kGenerator || !v.items().empty();
    case Type::kDict:
      return !v.dict().entries.empty();
    default:
      return true;
  }
}

bool Equal(const Value& a, const Value& b) {
  if (AsNumbers(a, b)) {
    if (a.Is(Type::kFloat) || b.Is(Type::kFloat)) return a.number() == b.number();
    return a.integer() == b.integer();
  }
  if (a.type() != b.type()) return false;
  switch (a.type()) {
    case Type::kUndefined:
    case Type::kNone:
      return true;
    case Type::kString:
      return a.string() == b.string();
    case Type::kList:
      if (a.object() == b.object()) return true;
      if (a.list().flavor != b.list().flavor || a.list().flavor == Flavor::kGenerator) return false;
      return std::equal(a.items().begin(), a.items().end(), b.items().begin(), b.items().end(), Equal);
    case Type::kDict: {
      if (a.dict().entries.size() != b.dict().entries.size()) return false;
      for (const auto& [key, value] : a.dict().entries) {
        const Value* other = b.dict().Find(key);
        if (other == nullptr || !Equal(value, *other)) return false;
      }
      return true;
    }
    default:
      return a.object() == b.object();
  }
}

std::string_view TypeName(const Value& v) {
  switch (v.type()) {
    case Type::kUndefined:
      return "Undefined";
    case Type::kNone:
      return "NoneType";
    case Type::kBool:
      return "bool";
    case Type::kInt:
      return "int";
    case Type::kFloat:
      return "float";
    case Type::kString:
      return "str";
    case Type::kList:
      return v.list().flavor == Flavor::kList    ? "list"
             : v.list().flavor == Flavor::kTuple ? "tuple"
                                                 : "generator";
    case Type::kDict:
      return "dict";
    case Type::kNamespace:
      return "Namespace";
    case Type::kCallable:
      return "function";
    case Type::kLoop:
      return "LoopContext";
  }
  return "object";
}

std::string FloatRepr(double d) {
  if (std::isnan(d)) return "nan";
  if (std::isinf(d)) return d < 0 ? "-inf" : "inf";
  char buffer[40];
  // The shortest digits that read back as the same number, in the form that Python chooses.
  auto end = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::scientific).ptr;
  const std::string_view scientific(buffer, end - buffer);
  const size_t e = scientific.find('e');
  int exponent = 0;
  std::from_chars(buffer + e + (scientific[e + 1] == '+' ? 2 : 1), end, exponent);
  if (exponent >= -4 && exponent < 16) {
    end = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::fixed).ptr;
    std::string fixed(buffer, end);
    return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
  }
  return std::string(scientific);
}

void AppendStr(const Value& v, std::string* out) {
  switch (v.type()) {
    case Type::kUndefined:
      return;
    case Type::kString:
      out->append(v.string());
      return;
    default:
      AppendRepr(v, out);
  }
}

std::string Str(const Value& v) {
  if (v.Is(Type::kString)) return v.string();
  std::string out;
  AppendStr(v, &out);
  return out;
}

void AppendRepr(const Value& v, std::string* out) {
  switch (v.type()) {
    case Type::kUndefined:
      out->append("Undefined");
      return;
    case Type::kNone:
      out->append("None");
      return;
    case Type::kBool:
      out->append(v.boolean() ? "True" : "False");
      return;
    case Type::kInt:
      out->append(std::to_string(v.integer()));
      return;
    case Type::kFloat:
      out->append(FloatRepr(v.number()));
      return;
    case Type::kString:
      AppendStringRepr(v.string(), out);
      return;
    case Type::kList: {
      if (v.list().flavor == Flavor::kGenerator) {
        out->append("<generator object>");
        return;
      }
      const bool tuple = v.list().flavor == Flavor::kTuple;
      out->push_back(tuple ? '(' : '[');
      bool first = true;
      for (const Value& item : v.items()) {
        if (!first) out->append(", ");
        first = false;
        AppendRepr(item, out);
      }
      if (tuple && v.items().size() == 1) out->push_back(',');
      out->push_back(tuple ? ')' : ']');
      return;
    }
    case Type::kDict: {
      out->push_back('{');
      bool first = true;
      for (const auto& [key, value] : v.dict().entries) {
        if (!first) out->append(", ");
        first = false;
        AppendRepr(key, out);
        out->append(": ");
        AppendRepr(value, out);
      }
      out->push_back('}');
      return;
    }
    case Type::kNamespace:
      out->append("<Namespace>");
      return;
    case Type::kCallable:
      out->append("<function>");
      return;
    case Type::kLoop:
      out->append("<LoopContext>");
      return;
  }
}

namespace {

void AppendJsonString(std::string_view s, bool ensure_ascii, std::string* out) {
  out->push_back('"');
  char buffer[16];
  for (size_t i = 0; i < s.size();) {
    const auto c = static_cast<unsigned char>(s[i]);
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(s[i]);
    } else if (c == '\n') {
      out->append("\\n");
    } else if (c == '\r') {
      out->append("\\r");
    } else if (c == '\t') {
      out->append("\\t");
    } else if (c == '\b') {
      out->append("\\b");
    } else if (c == '\f') {
      out->append("\\f");
    } else if (c < 0x20) {
      std::snprintf(buffer, sizeof(buffer), "\\u%04x", c);
      out->append(buffer);
    } else if (c < 0x80 || !ensure_ascii) {
      out->push_back(s[i]);
    } else {
      size_t length;
      const uint32_t code = DecodeChar(s, i, &length);
      if (code < 0x10000) {
        std::snprintf(buffer, sizeof(buffer), "\\u%04x", code);
      } else {
        std::snprintf(buffer, sizeof(buffer), "\\u%04x\\u%04x", 0xD800 + ((code - 0x10000) >> 10),
                      0xDC00 + ((code - 0x10000) & 0x3FF));
      }
      out->append(buffer);
      i += length;
      continue;
    }
    ++i;
  }
  out->push_back('"');
}

bool AppendJsonAt(const Value& v, const JsonStyle& style, int level, std::string* out, std::string* error) {
  const auto new_line = [&](int at) {
    if (style.indent < 0) return;
    out->push_back('\n');
    out->append(static_cast<size_t>(at) * style.indent, ' ');
  };
  switch (v.type()) {
    case Type::kNone:
      out->append("null");
      return true;
    case Type::kBool:
      out->append(v.boolean() ? "true" : "false");
      return true;
    case Type::kInt:
      out->append(std::to_string(v.integer()));
      return true;
    case Type::kFloat:
      out->append(std::isnan(v.number())   ? "NaN"
                  : std::isinf(v.number()) ? (v.number() < 0 ? "-Infinity" : "Infinity")
                                           : FloatRepr(v.number()));
      return true;
    case Type::kString:
      AppendJsonString(v.string(), style.ensure_ascii, out);
      return true;
    case Type::kList: {
      if (v.list().flavor == Flavor::kGenerator) break;
      if (v.items().empty()) {
        out->append("[]");
        return true;
      }
      out->push_back('[');
      bool first = true;
      for (const Value& item : v.items()) {
        if (!first) out->append(style.item_separator);
        first = false;
        new_line(level + 1);
        if (!AppendJsonAt(item, style, level + 1, out, error)) return false;
      }
      new_line(level);
      out->push_back(']');
      return true;
    }
    case Type::kDict: {
      if (v.dict().entries.empty()) {
        out->append("{}");
        return true;
      }
      std::vector<const std::pair<Value, Value>*> entries;
      for (const auto& entry : v.dict().entries) entries.push_back(&entry);
      if (style.sort_keys) {
        std::stable_sort(entries.begin(), entries.end(),
                         [](const auto* a, const auto* b) { return Str(a->first) < Str(b->first); });
      }
      out->push_back('{');
      bool first = true;
      for (const auto* entry : entries) {
        if (!first) out->append(style.item_separator);
        first = false;
        new_line(level + 1);
        const Value& key = entry->first;
        if (key.Is(Type::kList)) {
          *error = "keys must be str, int, float, bool or None, not tuple";
          return false;
        }
        std::string text = key.Is(Type::kString) ? key.string() : std::string();
        if (!key.Is(Type::kString) && !AppendJsonAt(key, style, level, &text, error)) return false;
        AppendJsonString(text, style.ensure_ascii, out);
        out->append(style.key_separator);
        if (!AppendJsonAt(entry->second, style, level + 1, out, error)) return false;
      }
      new_line(level);
      out->push_back('}');
      return true;
    }
    default:
      break;
  }
  *error = "Object of type " + std::string(TypeName(v)) + " is not JSON serializable";
  return false;
}

bool FromJsonAt(const nlohmann::ordered_json& json, int level, Value* out) {
  if (level > kMaxValueDepth) return false;
  using Kind = nlohmann::ordered_json::value_t;
  switch (json.type()) {
    case Kind::boolean:
      *out = Value::Bool(json.get<bool>());
      return true;
    case Kind::number_integer:
      *out = Value::Int(json.get<int64_t>());
      return true;
    case Kind::number_unsigned: {
      const auto u = json.get<uint64_t>();
      *out = u > static_cast<uint64_t>(INT64_MAX) ? Value::Float(static_cast<double>(u)) : Value::Int(u);
      return true;
    }
    case Kind::number_float:
      *out = Value::Float(json.get<double>());
      return true;
    case Kind::string:
      *out = Value::String(json.get_ref<const std::string&>());
      return true;
    case Kind::array: {
      std::vector<Value> items(json.size());
      for (size_t i = 0; i < items.size(); ++i) {
        if (!FromJsonAt(json[i], level + 1, &items[i])) return false;
      }
      *out = Value::List(std::move(items));
      return true;
    }
    case Kind::object: {
      auto dict = std::make_shared<DictObject>();
      for (auto it = json.begin(); it != json.end(); ++it) {
        Value value;
        if (!FromJsonAt(it.value(), level + 1, &value)) return false;
        dict->Set(it.key(), std::move(value));
      }
      *out = Value::Dict(std::move(dict));
      return true;
    }
    default:
      *out = Value::None();
      return true;
  }
}

}  // namespace

bool AppendJson(const Value& v, const JsonStyle& style, std::string* out, std::string* error) {
  return AppendJsonAt(v, style, 0, out, error);
}

bool FromJson(const nlohmann::ordered_json& json, Value* out) { return FromJsonAt(json, 0, out); }

}  // namespace tandem::jinja
