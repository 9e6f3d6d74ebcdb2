// Operators, attributes, items, slices, iteration.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/checked_math.h"
#include "common/tokenizer/jinja/interpreter.h"
#include "common/tokenizer/jinja/text.h"

namespace tandem::jinja {
namespace {

std::string Quoted(const Value& v) { return absl::StrCat("'", std::string(TypeName(v)), "'"); }

int64_t FloorDiv(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

double FloorMod(double a, double b) {
  const double r = std::fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

}  // namespace

bool Interpreter::Iterate(const Value& v, std::vector<Value>* items) {
  if (failed()) return false;
  switch (v.type()) {
    case Type::kUndefined:
      return true;
    case Type::kString:
      for (std::string& c : Chars(v.string())) items->push_back(Value::String(std::move(c)));
      return Charge(items->size());
    case Type::kList: {
      auto& list = static_cast<ListObject&>(*v.object());
      if (!list.consumed) *items = list.items;
      if (list.flavor == Flavor::kGenerator) list.consumed = true;
      return Charge(items->size());
    }
    case Type::kDict:
      for (const auto& [key, value] : v.dict().entries) items->push_back(key);
      return Charge(items->size());
    default:
      Fail(absl::StrCat(Quoted(v), " object is not iterable"));
      return false;
  }
}

Value Interpreter::LoopAttribute(const Value& loop_value, const std::string& name) {
  const auto& loop = static_cast<const LoopObject&>(*loop_value.object());
  const auto i = static_cast<int64_t>(loop.index);
  const auto n = static_cast<int64_t>(loop.items.size());
  if (name == "index") return Value::Int(i + 1);
  if (name == "index0") return Value::Int(i);
  if (name == "revindex") return Value::Int(n - i);
  if (name == "revindex0") return Value::Int(n - i - 1);
  if (name == "first") return Value::Bool(i == 0);
  if (name == "last") return Value::Bool(i + 1 == n);
  if (name == "length") return Value::Int(n);
  if (name == "depth") return Value::Int(1);  // levels of recursive loops
  if (name == "depth0") return Value::Int(0);
  if (name == "previtem") return i > 0 ? loop.items[i - 1] : Value::Undefined("there is no previous item");
  if (name == "nextitem") return i + 1 < n ? loop.items[i + 1] : Value::Undefined("there is no next item");
  if (name == "cycle" || name == "changed") {
    auto method = std::make_shared<CallableObject>();
    method->kind = CallableObject::kMethod;
    method->name = name;
    method->self = loop_value;
    return Value::Of(Type::kCallable, std::move(method));
  }
  return Value::Undefined(absl::StrCat("loop has no attribute '", name, "'"));
}

Value Interpreter::Attribute(const Value& object, const std::string& name) {
  if (object.Is(Type::kUndefined)) return Fail(object.string());
  if (object.Is(Type::kLoop)) return LoopAttribute(object, name);
  if (object.Is(Type::kNamespace)) {
    const Value* found =
        static_cast<const NamespaceObject&>(*object.object()).attributes.Find(std::string_view(name));
    return found != nullptr ? *found
                            : Value::Undefined(absl::StrCat("namespace has no attribute '", name, "'"));
  }
  const bool forbidden = IsForbiddenMethod(object, name);
  if (forbidden || IsMethod(object, name)) {
    auto method = std::make_shared<CallableObject>();
    method->kind = forbidden ? CallableObject::kForbidden : CallableObject::kMethod;
    method->name = name;
    method->self = object;
    return Value::Of(Type::kCallable, std::move(method));
  }
  if (object.Is(Type::kCallable) && name == "name") {
    return Value::String(static_cast<const CallableObject&>(*object.object()).name);
  }
  if (object.Is(Type::kDict)) {
    if (const Value* found = object.dict().Find(std::string_view(name))) return *found;
  }
  return Value::Undefined(absl::StrCat(Quoted(object), " object has no attribute '", name, "'"));
}

Value Interpreter::Item(const Value& object, const Value& index) {
  if (object.Is(Type::kUndefined)) return Fail(object.string());
  if (object.Is(Type::kDict)) {
    if (const Value* found = object.dict().Find(index)) return *found;
  } else if ((object.Is(Type::kList) && !object.IsSequence(Flavor::kGenerator)) || object.Is(Type::kString)) {
    if (index.IsIntegral()) {
      const bool is_list = object.Is(Type::kList);
      const auto n = static_cast<int64_t>(is_list ? object.items().size() : CharCount(object.string()));
      if (!is_list && !Charge(object.string().size() / 32)) return Value();
      const int64_t i = index.integer() < 0 ? index.integer() + n : index.integer();
      if (i < 0 || i >= n)
        return Value::Undefined(absl::StrCat(Quoted(object), " has no element ", index.integer()));
      if (is_list) return object.items()[i];
      const std::string& s = object.string();
      size_t pos = 0;
      size_t length = 0;
      for (int64_t k = 0; k <= i; ++k) {
        pos += length;
        DecodeChar(s, pos, &length);
      }
      return Value::String(s.substr(pos, length));
    }
  }
  // As jinja2 does, an attribute of that name is looked for last.
  if (index.Is(Type::kString) && !object.Is(Type::kDict)) return Attribute(object, index.string());
  if (index.Is(Type::kString) && IsMethod(object, index.string())) return Attribute(object, index.string());
  return Value::Undefined(absl::StrCat(Quoted(object), " object has no element ", Str(index).substr(0, 100)));
}

Value Interpreter::Slice(const Value& object, const Value& begin, const Value& end, const Value& step) {
  if (object.Is(Type::kUndefined)) return Fail(object.string());
  const bool is_list = object.Is(Type::kList) && !object.IsSequence(Flavor::kGenerator);
  if (!is_list && !object.Is(Type::kString)) {
    return Value::Undefined(absl::StrCat(Quoted(object), " object cannot be sliced"));
  }
  for (const Value* part : {&begin, &end, &step}) {
    if (!part->Is(Type::kNone) && !part->IsIntegral()) return Fail("slice indices must be integers or none");
  }
  std::vector<Value> items;
  if (!Iterate(object, &items)) return Value();
  const auto n = static_cast<int64_t>(items.size());
  const int64_t stride = step.Is(Type::kNone) ? 1 : step.integer();
  if (stride == 0) return Fail("slice step cannot be zero");
  const auto clip = [&](const Value& v, int64_t otherwise) {
    if (v.Is(Type::kNone)) return otherwise;
    const int64_t low = stride > 0 ? 0 : -1;
    const int64_t high = stride > 0 ? n : n - 1;
    const int64_t i = v.integer() < 0 ? std::max(v.integer(), -n - 1) + n : v.integer();
    return std::clamp(i, low, high);
  };
  const int64_t first = clip(begin, stride > 0 ? 0 : n - 1);
  const int64_t last = clip(end, stride > 0 ? n : -1);
  std::vector<Value> taken;
  for (__int128 i = first; stride > 0 ? i < last : i > last; i += stride)
    taken.push_back(items[static_cast<size_t>(i)]);
  if (is_list) return MakeList(std::move(taken), object.list().flavor);
  std::string text;
  for (const Value& c : taken) text += c.string();
  return MakeString(std::move(text));
}

Value Interpreter::Numeric(std::string_view op, const Value& a, const Value& b) {
  const bool ints = a.IsIntegral() && b.IsIntegral();
  const int64_t i = a.integer();
  const int64_t k = b.integer();
  const double x = a.number();
  const double y = b.number();
  const auto integer = [&](std::optional<int64_t> result) {
    return result ? Value::Int(*result) : Fail("an integer is too large");
  };
  if ((op == "/" || op == "//" || op == "%") && y == 0) return Fail("division by zero");
  if (op == "/") return Value::Float(x / y);
  if (ints) {
    int64_t result;
    if (op == "+") return integer(CheckedAdd(i, k));
    if (op == "*") return integer(CheckedMul(i, k));
    if (op == "-")
      return __builtin_sub_overflow(i, k, &result) ? Fail("an integer is too large") : Value::Int(result);
    if (op == "//")
      return k == -1 ? (i == INT64_MIN ? Fail("an integer is too large") : Value::Int(-i))
                     : Value::Int(FloorDiv(i, k));
    if (op == "%") return k == -1 ? Value::Int(0) : Value::Int(i - FloorDiv(i, k) * k);
    if (op == "**" && k >= 0) {
      if (i == 0 || i == 1) return Value::Int(k == 0 ? 1 : i);
      if (i == -1) return Value::Int(k % 2 == 0 ? 1 : -1);
      std::optional<int64_t> power = 1;
      for (int64_t n = 0; n < k && power; ++n) power = CheckedMul(*power, i);
      return integer(power);
    }
  } else {
    if (op == "+") return Value::Float(x + y);
    if (op == "-") return Value::Float(x - y);
    if (op == "*") return Value::Float(x * y);
    if (op == "//") return Value::Float(std::floor(x / y));
    if (op == "%") return Value::Float(FloorMod(x, y));
  }
  if (x == 0 && y < 0) return Fail("0.0 cannot be raised to a negative power");
  return Value::Float(std::pow(x, y));
}

Value Interpreter::Binary(std::string_view op, const Value& a, const Value& b) {
  if (op == "%" && a.Is(Type::kString)) return PercentFormat(a.string(), b);
  for (const Value* v : {&a, &b}) {
    if (v->Is(Type::kUndefined)) return Fail(v->string());
  }
  if (a.IsNumber() && b.IsNumber()) return Numeric(op, a, b);
  if (op == "+") {
    if (a.Is(Type::kString) && b.Is(Type::kString)) return MakeString(a.string() + b.string());
    if (a.Is(Type::kList) && b.Is(Type::kList) && a.list().flavor == b.list().flavor &&
        a.list().flavor != Flavor::kGenerator) {
      std::vector<Value> items = a.items();
      items.insert(items.end(), b.items().begin(), b.items().end());
      return MakeList(std::move(items), a.list().flavor);
    }
  }
  if (op == "*") {
    const Value& sequence = a.IsIntegral() ? b : a;
    const Value& times = a.IsIntegral() ? a : b;
    if (times.IsIntegral() && (sequence.Is(Type::kString) ||
                               (sequence.Is(Type::kList) && !sequence.IsSequence(Flavor::kGenerator)))) {
      const bool text = sequence.Is(Type::kString);
      const auto n = static_cast<uint64_t>(std::max<int64_t>(times.integer(), 0));
      const auto size = static_cast<uint64_t>(text ? sequence.string().size() : sequence.items().size());
      const auto total = CheckedMul(n, size);
      if (!total || *total > limits_.max_output_bytes / (text ? 1 : 32))
        return Fail("a repeated sequence is too long");
      std::string repeated;
      std::vector<Value> items;
      for (uint64_t i = 0; i < (size == 0 ? 0 : n); ++i) {
        if (text)
          repeated += sequence.string();
        else
          items.insert(items.end(), sequence.items().begin(), sequence.items().end());
      }
      return text ? MakeString(std::move(repeated)) : MakeList(std::move(items), sequence.list().flavor);
    }
  }
  return Fail(
      absl::StrCat("unsupported operand types for ", std::string(op), ": ", Quoted(a), " and ", Quoted(b)));
}

bool Interpreter::Less(const Value& a, const Value& b) {
  if (failed()) return false;
  if (a.IsNumber() && b.IsNumber()) {
    if (a.IsIntegral() && b.IsIntegral()) return a.integer() < b.integer();
    return a.number() < b.number();
  }
  // Bytes of UTF-8 sort as their code points do.
  if (a.Is(Type::kString) && b.Is(Type::kString)) return a.string() < b.string();
  if (a.Is(Type::kList) && b.Is(Type::kList) && a.list().flavor == b.list().flavor &&
      a.list().flavor != Flavor::kGenerator) {
    const size_t n = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < n; ++i) {
      if (!Equal(a.items()[i], b.items()[i])) return Less(a.items()[i], b.items()[i]);
    }
    return a.items().size() < b.items().size();
  }
  for (const Value* v : {&a, &b}) {
    if (v->Is(Type::kUndefined)) Fail(v->string());
  }
  Fail(absl::StrCat(Quoted(a), " and ", Quoted(b), " cannot be ordered"));
  return false;
}

bool Interpreter::Contains(const Value& container, const Value& item) {
  if (container.Is(Type::kString)) {
    if (!item.Is(Type::kString)) {
      Fail(absl::StrCat("'in <string>' requires a string, not ", Quoted(item)));
      return false;
    }
    Charge(container.string().size() / 32);
    return container.string().find(item.string()) != std::string::npos;
  }
  if (container.Is(Type::kDict)) {
    if (item.Is(Type::kDict) || item.IsSequence(Flavor::kList))
      Fail(absl::StrCat("unhashable type: ", Quoted(item)));
    return container.dict().Find(item) != nullptr;
  }
  if (!container.Is(Type::kList) && !container.Is(Type::kUndefined)) {
    Fail(absl::StrCat("argument of type ", Quoted(container), " is not iterable"));
    return false;
  }
  std::vector<Value> items;
  if (!Iterate(container, &items)) return false;
  return std::any_of(items.begin(), items.end(), [&](const Value& v) { return Equal(v, item); });
}

bool Interpreter::Compare(std::string_view op, const Value& a, const Value& b) {
  if (op == "==") return Equal(a, b);
  if (op == "!=") return !Equal(a, b);
  if (op == "in") return Contains(b, a);
  if (op == "not in") return !Contains(b, a);
  const bool nan =
      (a.Is(Type::kFloat) && std::isnan(a.number())) || (b.Is(Type::kFloat) && std::isnan(b.number()));
  if (nan && a.IsNumber() && b.IsNumber()) return false;
  if (op == "<") return Less(a, b);
  if (op == ">") return Less(b, a);
  if (op == "<=") return !Less(b, a);
  return !Less(a, b);
}

}  // namespace tandem::jinja
