// Filters, by jinja2's names and behaviour.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/tokenizer/jinja/interpreter.h"
#include "common/tokenizer/jinja/text.h"

namespace tandem::jinja {
namespace {

bool TruthyArgument(const Arguments& arguments, size_t index, std::string_view name) {
  const Value* v = arguments.Get(index, name);
  return v != nullptr && Truthy(*v);
}

// int("..."), float("..."): the whole text, white space around it aside.
bool ParseInt(std::string_view text, int base, int64_t* out) {
  text = Strip(text, kBoth);
  std::string digits;
  for (const char c : text) {
    if (c != '_') digits.push_back(c);
  }
  std::string_view rest = digits;
  if (rest.starts_with('+')) rest.remove_prefix(1);
  if (rest.empty() || (rest[0] == '-' && digits[0] == '+')) return false;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), *out, base);
  return error == std::errc() && end == rest.data() + rest.size();
}

bool ParseFloat(std::string_view text, double* out) {
  const std::string s(Strip(text, kBoth));
  if (s.empty() || s.find_first_of("xXpP(") != std::string::npos) return false;
  char* end = nullptr;
  *out = std::strtod(s.c_str(), &end);
  return end == s.c_str() + s.size();
}

// round() to `digits` places, halves to even as Python rounds what is written.
double RoundTo(double x, int64_t digits) {
  if (!std::isfinite(x) || digits > 300) return x;
  if (digits < 0) {
    const double unit = std::pow(10.0, static_cast<double>(std::min<int64_t>(-digits, 300)));
    return std::nearbyint(x / unit) * unit;
  }
  char buffer[700];
  std::snprintf(buffer, sizeof(buffer), "%.*f", static_cast<int>(digits), x);
  return std::strtod(buffer, nullptr);
}

}  // namespace

Value Interpreter::Filter(const std::string& name, const Value& input, const Arguments& arguments) {
  bool known = true;
  for (const auto group :
       {&Interpreter::StringFilter, &Interpreter::NumberFilter, &Interpreter::SequenceFilter}) {
    known = true;
    Value result = (this->*group)(name, input, arguments, &known);
    if (known || failed()) return result;
  }
  return Fail(absl::StrCat("there is no filter named '", name, "'"));
}

Value Interpreter::StringFilter(const std::string& name, const Value& input, const Arguments& arguments,
                                bool* known) {
  if (name == "string" || name == "safe") return input.Is(Type::kString) ? input : MakeString(Str(input));
  if (name == "trim") {
    const Value* chars = arguments.Get(0, "chars");
    const std::string text = Str(input);
    if (chars == nullptr || chars->Is(Type::kNone)) return MakeString(std::string(Strip(text, kBoth)));
    if (!chars->Is(Type::kString)) return Fail("trim: the characters must be a string");
    const std::string_view set = chars->string();
    return MakeString(std::string(Strip(text, kBoth, &set)));
  }
  if (name == "upper") return MakeString(Upper(Str(input)));
  if (name == "lower") return MakeString(Lower(Str(input)));
  if (name == "title") return MakeString(TitleFilter(Str(input)));
  if (name == "capitalize") return MakeString(Capitalize(Str(input)));
  if (name == "e" || name == "escape" || name == "forceescape") return MakeString(EscapeHtml(Str(input)));
  if (name == "tojson") return ToJson(input, arguments);
  if (name == "replace") {
    const Value* from = arguments.Get(0, "old");
    const Value* to = arguments.Get(1, "new");
    if (from == nullptr || to == nullptr) return Fail("replace needs two strings");
    const Value* count = arguments.Get(2, "count");
    Arguments method;
    method.positional = {Value::String(Str(*from)), Value::String(Str(*to))};
    if (count != nullptr && !count->Is(Type::kNone)) method.positional.push_back(*count);
    return StringMethod(Str(input), "replace", method);
  }
  if (name == "format") {
    if (!arguments.keywords.empty()) {
      auto dict = std::make_shared<DictObject>();
      for (const auto& [key, value] : arguments.keywords) dict->Set(std::string_view(key), value);
      return PercentFormat(Str(input), Value::Dict(std::move(dict)));
    }
    return PercentFormat(Str(input), Value::List(arguments.positional, Flavor::kTuple));
  }
  if (name == "indent") {
    const Value* width = arguments.Get(0, "width");
    std::string pad(4, ' ');
    if (width != nullptr && width->Is(Type::kString)) {
      pad = width->string();
    } else if (width != nullptr) {
      if (!width->IsIntegral() || width->integer() > 1000)
        return Fail("indent: the width must be a small integer or a string");
      pad.assign(static_cast<size_t>(std::max<int64_t>(width->integer(), 0)), ' ');
    }
    const bool blank = TruthyArgument(arguments, 2, "blank");
    const std::vector<std::string> lines = SplitLines(Str(input) + "\n", false);
    std::string out = TruthyArgument(arguments, 1, "first") ? pad : "";
    for (size_t i = 0; i < lines.size(); ++i) {
      if (i > 0) {
        out += '\n';
        if (blank || !lines[i].empty()) out += pad;
      }
      out += lines[i];
      if (!CheckOutput(out)) return Value();
    }
    return MakeString(std::move(out));
  }
  *known = false;
  return Value();
}

Value Interpreter::ToJson(const Value& input, const Arguments& arguments) {
  JsonStyle style;
  const Value* indent = arguments.Get(1, "indent");
  // transformers: tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)
  style.ensure_ascii = TruthyArgument(arguments, 0, "ensure_ascii");
  style.sort_keys = TruthyArgument(arguments, 3, "sort_keys");
  if (indent != nullptr && !indent->Is(Type::kNone)) {
    if (!indent->IsIntegral() || indent->integer() > 64)
      return Fail("tojson: indent must be a small integer");
    style.indent = static_cast<int>(std::max<int64_t>(indent->integer(), 0));
  }
  style.item_separator = style.indent < 0 ? ", " : ",";
  style.key_separator = ": ";
  const Value* separators = arguments.Get(2, "separators");
  if (separators != nullptr && !separators->Is(Type::kNone)) {
    std::vector<Value> pair;
    if (!Iterate(*separators, &pair)) return Value();
    if (pair.size() != 2 || !pair[0].Is(Type::kString) || !pair[1].Is(Type::kString)) {
      return Fail("tojson: separators must be two strings");
    }
    style.item_separator = pair[0].string();
    style.key_separator = pair[1].string();
  }
  std::string out;
  std::string error;
  if (!AppendJson(input, style, &out, &error)) return Fail(absl::StrCat("tojson: ", error));
  return MakeString(std::move(out));
}

Value Interpreter::NumberFilter(const std::string& name, const Value& input, const Arguments& arguments,
                                bool* known) {
  if (name == "int") {
    if (input.Is(Type::kUndefined)) return Fail(input.string());
    const Value* otherwise = arguments.Get(0, "default");
    const Value* base = arguments.Get(1, "base");
    int64_t i;
    double d = std::nan("");
    if (input.IsIntegral()) return Value::Int(input.integer());
    if (input.Is(Type::kString) && ParseInt(input.string(),
                                            base != nullptr && base->integer() > 1 && base->integer() <= 36
                                                ? static_cast<int>(base->integer())
                                                : 10,
                                            &i)) {
      return Value::Int(i);
    }
    if (input.Is(Type::kFloat)) d = input.number();
    if (input.Is(Type::kString)) ParseFloat(input.string(), &d);
    if (std::abs(d) < 9.2e18) return Value::Int(static_cast<int64_t>(d));
    return otherwise != nullptr ? *otherwise : Value::Int(0);
  }
  if (name == "float") {
    if (input.Is(Type::kUndefined)) return Fail(input.string());
    const Value* otherwise = arguments.Get(0, "default");
    double d;
    if (input.IsNumber()) return Value::Float(input.number());
    if (input.Is(Type::kString) && ParseFloat(input.string(), &d)) return Value::Float(d);
    return otherwise != nullptr ? *otherwise : Value::Float(0);
  }
  if (name == "abs") {
    if (!input.IsNumber()) return Fail(input.Is(Type::kUndefined) ? input.string() : "abs needs a number");
    if (input.Is(Type::kFloat)) return Value::Float(std::abs(input.number()));
    return input.integer() == INT64_MIN ? Fail("an integer is too large")
                                        : Value::Int(std::abs(input.integer()));
  }
  if (name == "round") {
    if (!input.IsNumber()) return Fail(input.Is(Type::kUndefined) ? input.string() : "round needs a number");
    const Value* precision = arguments.Get(0, "precision");
    const Value* method = arguments.Get(1, "method");
    const int64_t digits = precision != nullptr && precision->IsIntegral() ? precision->integer() : 0;
    const std::string how = method != nullptr ? Str(*method) : "common";
    if (how == "common") {
      if (input.IsIntegral() && digits >= 0) return Value::Int(input.integer());
      const double rounded = RoundTo(input.number(), digits);
      return input.IsIntegral() ? Value::Int(static_cast<int64_t>(rounded)) : Value::Float(rounded);
    }
    if (how != "ceil" && how != "floor") return Fail("round: method must be common, ceil or floor");
    if (digits < -300 || digits > 300) return Fail("round: the precision is too large");
    const double unit = std::pow(10.0, static_cast<double>(digits));
    return Value::Float(
        (how == "ceil" ? std::ceil(input.number() * unit) : std::floor(input.number() * unit)) / unit);
  }
  *known = false;
  return Value();
}

Value Interpreter::Path(const Value& item, const Value& path) {
  if (!path.Is(Type::kString)) return Item(item, path);
  Value value = item;
  std::string_view rest = path.string();
  while (!failed()) {
    const size_t dot = rest.find('.');
    const std::string part(rest.substr(0, dot));
    int64_t index;
    const bool digits =
        !part.empty() && std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    value = Item(value, digits && ParseInt(part, 10, &index) ? Value::Int(index) : Value::String(part));
    if (dot == std::string_view::npos) return value;
    rest.remove_prefix(dot + 1);
  }
  return Value();
}

Value Interpreter::SequenceFilter(const std::string& name, const Value& input, const Arguments& arguments,
                                  bool* known) {
  if (name == "default" || name == "d") {
    const Value* otherwise = arguments.Get(0, "default_value");
    const bool use =
        input.Is(Type::kUndefined) || (TruthyArgument(arguments, 1, "boolean") && !Truthy(input));
    return !use ? input : otherwise != nullptr ? *otherwise : Value::String("");
  }
  if (name == "length" || name == "count") {
    if (input.Is(Type::kUndefined)) return Value::Int(0);
    if (input.Is(Type::kString)) return Value::Int(static_cast<int64_t>(CharCount(input.string())));
    if (input.Is(Type::kDict)) return Value::Int(static_cast<int64_t>(input.dict().entries.size()));
    if (input.Is(Type::kList) && !input.IsSequence(Flavor::kGenerator)) {
      return Value::Int(static_cast<int64_t>(input.items().size()));
    }
    return Fail(absl::StrCat("object of type '", std::string(TypeName(input)), "' has no length"));
  }
  if (name == "attr") {
    const Value* attribute = arguments.Get(0, "name");
    return attribute == nullptr ? Fail("attr needs a name") : Attribute(input, Str(*attribute));
  }
  if (name == "map" || name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
    return SelectFilter(name, input, arguments);
  }
  if (name == "sort" || name == "unique" || name == "dictsort" || name == "min" || name == "max") {
    return SortFilter(name, input, arguments);
  }
  if (name == "items") {
    if (input.Is(Type::kUndefined)) return MakeGenerator({});
    if (!input.Is(Type::kDict)) return Fail("items needs a mapping");
    std::vector<Value> items;
    for (const auto& [key, value] : input.dict().entries)
      items.push_back(MakeList({key, value}, Flavor::kTuple));
    return MakeGenerator(std::move(items));
  }
  for (const char* mine : {"list", "first", "last", "join", "reverse", "sum"}) {
    if (name != mine) continue;
    if (name == "reverse" && input.Is(Type::kString)) {
      std::vector<std::string> chars = Chars(input.string());
      std::string out;
      for (auto it = chars.rbegin(); it != chars.rend(); ++it) out += *it;
      return MakeString(std::move(out));
    }
    if (name == "last" && input.IsSequence(Flavor::kGenerator))
      return Fail("'generator' object is not reversible");
    std::vector<Value> items;
    if (!Iterate(input, &items)) return Value();
    if (name == "list") return MakeList(std::move(items));
    if (name == "first") return items.empty() ? Value::Undefined("first of nothing") : items.front();
    if (name == "last") return items.empty() ? Value::Undefined("last of nothing") : items.back();
    if (name == "reverse") {
      std::reverse(items.begin(), items.end());
      return MakeGenerator(std::move(items));
    }
    const Value* attribute = arguments.Get(name == "join" ? 1 : 0, "attribute");
    if (attribute != nullptr && !attribute->Is(Type::kNone)) {
      for (Value& item : items) item = Path(item, *attribute);
    }
    if (name == "sum") {
      const Value* start = arguments.Get(1, "start");
      Value total = start != nullptr ? *start : Value::Int(0);
      for (const Value& item : items) total = failed() ? Value() : Binary("+", total, item);
      return total;
    }
    const Value* separator = arguments.Get(0, "d");
    const std::string between = separator != nullptr ? Str(*separator) : "";
    std::string out;
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out += between;
      AppendStr(items[i], &out);
      if (!CheckOutput(out)) return Value();
    }
    return MakeString(std::move(out));
  }
  *known = false;
  return Value();
}

Value Interpreter::SelectFilter(const std::string& name, const Value& input, const Arguments& arguments) {
  std::vector<Value> items;
  if (!Iterate(input, &items)) return Value();
  const bool by_attribute = name == "selectattr" || name == "rejectattr";
  const size_t skip = by_attribute ? 2 : 1;  // positional arguments that are ours: attribute, test or filter
  Arguments rest;
  for (size_t i = skip; i < arguments.positional.size(); ++i)
    rest.positional.push_back(arguments.positional[i]);
  const auto name_at = [&](size_t i) {
    return i < arguments.positional.size() ? Str(arguments.positional[i]) : "";
  };
  std::vector<Value> out;
  if (name == "map") {
    const Value* attribute = nullptr;
    const Value* otherwise = nullptr;
    for (const auto& [key, value] : arguments.keywords) {
      if (key == "attribute") attribute = &value;
      if (key == "default") otherwise = &value;
    }
    if (!arguments.positional.empty()) {
      attribute = nullptr;
      rest.keywords = arguments.keywords;
    } else if (attribute == nullptr) {
      return Fail("map needs a filter or attribute=");
    }
    for (const Value& item : items) {
      if (attribute == nullptr) {
        out.push_back(Filter(name_at(0), item, rest));
      } else {
        Value value = Path(item, *attribute);
        if (value.Is(Type::kUndefined) && otherwise != nullptr) value = *otherwise;
        out.push_back(std::move(value));
      }
      if (failed()) return Value();
    }
    return MakeGenerator(std::move(out));
  }
  if (by_attribute && arguments.positional.empty()) return Fail(absl::StrCat(name, " needs an attribute"));
  const std::string test = name_at(skip - 1);
  const bool wanted = name == "select" || name == "selectattr";
  rest.keywords = arguments.keywords;
  for (Value& item : items) {
    const Value subject = by_attribute ? Path(item, arguments.positional[0]) : item;
    const bool holds = test.empty() ? Truthy(subject) : Test(test, subject, rest);
    if (failed()) return Value();
    if (holds == wanted) out.push_back(std::move(item));
  }
  return MakeGenerator(std::move(out));
}

Value Interpreter::SortFilter(const std::string& name, const Value& input, const Arguments& arguments) {
  std::vector<Value> items;
  const bool of_dict = name == "dictsort";
  if (of_dict) {
    if (!input.Is(Type::kDict)) return Fail("dictsort needs a mapping");
    for (const auto& [key, value] : input.dict().entries)
      items.push_back(MakeList({key, value}, Flavor::kTuple));
  } else if (!Iterate(input, &items)) {
    return Value();
  }
  // sort(reverse, case_sensitive, attribute), unique/min/max(case_sensitive, attribute),
  // dictsort(case_sensitive, by, reverse)
  const bool sort = name == "sort";
  const bool case_sensitive = TruthyArgument(arguments, sort ? 1 : 0, "case_sensitive");
  const bool reverse = TruthyArgument(arguments, sort ? 0 : of_dict ? 2 : 9, "reverse");
  const Value* attribute = of_dict ? nullptr : arguments.Get(sort ? 2 : 1, "attribute");
  const Value* by = of_dict ? arguments.Get(1, "by") : nullptr;
  const std::string side = by != nullptr ? Str(*by) : "key";
  if (side != "key" && side != "value") return Fail("dictsort: by must be 'key' or 'value'");
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : items) {
    std::vector<Value> parts;
    if (of_dict) {
      parts = {item.items()[side == "key" ? 0 : 1]};
    } else if (attribute == nullptr || attribute->Is(Type::kNone)) {
      parts = {item};
    } else if (attribute->Is(Type::kString)) {
      for (std::string_view rest = attribute->string();;) {
        const size_t comma = rest.find(',');
        parts.push_back(Path(item, Value::String(std::string(rest.substr(0, comma)))));
        if (comma == std::string_view::npos || !sort) break;
        rest.remove_prefix(comma + 1);
      }
    } else {
      parts = {Path(item, *attribute)};
    }
    if (failed()) return Value();
    for (Value& part : parts) {
      if (!case_sensitive && part.Is(Type::kString)) part = Value::String(Lower(part.string()));
    }
    keyed.emplace_back(parts.size() == 1 ? parts[0] : Value::List(std::move(parts)), item);
  }
  std::vector<Value> out;
  if (name == "unique") {
    std::vector<Value> seen;
    for (const auto& [key, item] : keyed) {
      if (!Charge(seen.size() / 8)) return Value();
      if (std::any_of(seen.begin(), seen.end(), [&, &k = key](const Value& v) { return Equal(v, k); }))
        continue;
      seen.push_back(key);
      out.push_back(item);
    }
    return MakeGenerator(std::move(out));
  }
  if (name == "min" || name == "max") {
    if (keyed.empty()) return Value::Undefined("no items");
    size_t best = 0;
    for (size_t i = 1; i < keyed.size() && !failed(); ++i) {
      if (name == "min" ? Less(keyed[i].first, keyed[best].first) : Less(keyed[best].first, keyed[i].first))
        best = i;
    }
    return keyed[best].second;
  }
  // Merge sort by hand: std::stable_sort must not see an order that breaks off when an error occurs.
  if (!Charge(keyed.size() * 8)) return Value();
  for (size_t width = 1; width < keyed.size(); width *= 2) {
    std::vector<std::pair<Value, Value>> merged;
    merged.reserve(keyed.size());
    for (size_t begin = 0; begin < keyed.size(); begin += 2 * width) {
      size_t a = begin;
      const size_t a_end = std::min(begin + width, keyed.size());
      size_t b = a_end;
      const size_t b_end = std::min(begin + 2 * width, keyed.size());
      while (a < a_end || b < b_end) {
        const bool take_b = a == a_end || (b < b_end && (reverse ? Less(keyed[a].first, keyed[b].first)
                                                                 : Less(keyed[b].first, keyed[a].first)));
        merged.push_back(take_b ? keyed[b++] : keyed[a++]);
      }
    }
    if (failed()) return Value();
    keyed = std::move(merged);
  }
  for (auto& [key, item] : keyed) out.push_back(std::move(item));
  return MakeList(std::move(out));
}

}  // namespace tandem::jinja
