// The values that templates compute with: Python's, as far as templates can see them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "nlohmann/json_fwd.hpp"

namespace tandem::jinja {

struct Object {
  virtual ~Object() = default;
};

enum class Type : uint8_t {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kDict,
  kNamespace,
  kCallable,
  kLoop
};

// A list that Python would hand out as another type behaves differently in a few places.
enum class Flavor : uint8_t { kList, kTuple, kGenerator };

struct ListObject;
struct DictObject;

// How deep lists and dicts may hold each other.
inline constexpr int kMaxValueDepth = 200;

// Cheap to copy: compound values are shared and do not change once made (namespaces do).
class Value {
 public:
  Value() = default;  // undefined
  static Value None() { return Value(Type::kNone, 0); }
  static Value Bool(bool b) { return Value(Type::kBool, b ? 1 : 0); }
  static Value Int(int64_t i) { return Value(Type::kInt, i); }
  static Value Float(double d) {
    Value v(Type::kFloat, 0);
    v.float_ = d;
    return v;
  }
  static Value String(std::string s);
  static Value List(std::vector<Value> items, Flavor flavor = Flavor::kList);
  static Value Dict(std::shared_ptr<DictObject> dict);
  static Value Undefined(std::string what);  // what was not found, for messages
  static Value Of(Type type, std::shared_ptr<Object> object) {
    Value v(type, 0);
    v.object_ = std::move(object);
    return v;
  }

  Type type() const { return type_; }
  bool Is(Type t) const { return type_ == t; }
  bool IsNumber() const { return type_ == Type::kBool || type_ == Type::kInt || type_ == Type::kFloat; }
  bool IsIntegral() const { return type_ == Type::kBool || type_ == Type::kInt; }
  bool IsSequence(Flavor flavor) const;

  int64_t integer() const { return int_; }  // of kBool, kInt
  bool boolean() const { return int_ != 0; }
  double number() const { return type_ == Type::kFloat ? float_ : static_cast<double>(int_); }
  const std::string& string() const;        // of kString; what was not found of kUndefined
  const std::vector<Value>& items() const;  // of kList
  const ListObject& list() const;
  const DictObject& dict() const;
  const std::shared_ptr<Object>& object() const { return object_; }

  // Nesting: 0 for what holds nothing.
  int depth() const;

 private:
  Value(Type type, int64_t i) : type_(type), int_(i) {}

  Type type_ = Type::kUndefined;
  union {
    int64_t int_ = 0;
    double float_;
  };
  std::shared_ptr<Object> object_;
};

struct StringObject : Object {
  std::string text;
};

struct ListObject : Object {
  std::vector<Value> items;
  Flavor flavor = Flavor::kList;
  int depth = 1;
  bool consumed = false;  // of a generator that was iterated over
};

// Keeps the order of insertion, as Python does.
struct DictObject : Object {
  std::vector<std::pair<Value, Value>> entries;
  absl::flat_hash_map<std::string, size_t> by_string;
  int depth = 1;

  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  void Set(const Value& key, Value value);
  void Set(std::string_view key, Value value) { Set(Value::String(std::string(key)), std::move(value)); }
};

struct NamespaceObject : Object {
  DictObject attributes;
};

bool Truthy(const Value& v);
bool Equal(const Value& a, const Value& b);
// Python's name of the type, for messages.
std::string_view TypeName(const Value& v);
// str(v) and repr(v).
std::string Str(const Value& v);
void AppendStr(const Value& v, std::string* out);
void AppendRepr(const Value& v, std::string* out);
// repr() of a float.
std::string FloatRepr(double d);

struct JsonStyle {
  int indent = -1;  // -1: one line
  bool sort_keys = false;
  bool ensure_ascii = false;
  std::string item_separator;  // with the space after it
  std::string key_separator;
};
// json.dumps; false with `*error` if a value has no JSON form.
bool AppendJson(const Value& v, const JsonStyle& style, std::string* out, std::string* error);

// False if the JSON is nested deeper than kMaxValueDepth.
bool FromJson(const nlohmann::ordered_json& json, Value* out);

}  // namespace tandem::jinja
