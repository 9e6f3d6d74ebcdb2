// Methods of strings, dicts, lists and loops, and Python's two ways of formatting.
#include <algorithm>
#include <cstdio>
#include <optional>

#include <unicode/uchar.h>

#include "absl/strings/str_cat.h"
#include "common/tokenizer/jinja/interpreter.h"
#include "common/tokenizer/jinja/text.h"

namespace tandem::jinja {
namespace {

constexpr std::string_view kStringMethods[] = {
    "strip",    "lstrip",  "rstrip",  "split",     "rsplit",       "splitlines",   "startswith",
    "endswith", "upper",   "lower",   "title",     "replace",      "find",         "rfind",
    "index",    "count",   "join",    "format",    "capitalize",   "isdigit",      "isalpha",
    "isalnum",  "isspace", "isupper", "islower",   "removeprefix", "removesuffix", "zfill",
    "ljust",    "rjust",   "center",  "partition", "rpartition"};
constexpr std::string_view kDictMethods[] = {"get", "items", "keys", "values", "copy"};
constexpr std::string_view kListMethods[] = {"index", "count", "copy"};
constexpr std::string_view kListChanges[] = {"append", "clear",  "extend",  "insert",
                                             "pop",    "remove", "reverse", "sort"};
constexpr std::string_view kDictChanges[] = {"clear", "pop", "popitem", "setdefault", "update"};

template <size_t N>
bool Among(const std::string_view (&names)[N], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

}  // namespace

bool IsMethod(const Value& object, std::string_view name) {
  if (object.Is(Type::kString)) return Among(kStringMethods, name);
  if (object.Is(Type::kDict)) return Among(kDictMethods, name);
  if (object.IsSequence(Flavor::kList)) return Among(kListMethods, name);
  return object.IsSequence(Flavor::kTuple) && name != "copy" && Among(kListMethods, name);
}

bool IsForbiddenMethod(const Value& object, std::string_view name) {
  if (object.Is(Type::kDict)) return Among(kDictChanges, name);
  return object.IsSequence(Flavor::kList) && Among(kListChanges, name);
}

Value Interpreter::CallMethod(const CallableObject& method, const Arguments& arguments) {
  const Value& self = method.self;
  const auto& args = arguments.positional;
  const std::string& name = method.name;
  if (self.Is(Type::kString)) return StringMethod(self.string(), name, arguments);
  if (self.Is(Type::kLoop)) {
    auto& loop = static_cast<LoopObject&>(*self.object());
    if (name == "cycle") return args.empty() ? Fail("cycle needs arguments") : args[loop.index % args.size()];
    Value now = MakeList(args, Flavor::kTuple);
    const bool changed = !loop.has_changed || !Equal(loop.last_changed, now);
    loop.last_changed = std::move(now);
    loop.has_changed = true;
    return Value::Bool(changed);
  }
  if (self.Is(Type::kDict)) {
    if (name == "get") {
      if (args.empty() || args.size() > 2) return Fail("get takes one or two arguments");
      const Value* found = self.dict().Find(args[0]);
      return found != nullptr ? *found : args.size() == 2 ? args[1] : Value::None();
    }
    if (name == "copy") return self;
    std::vector<Value> items;
    for (const auto& [key, value] : self.dict().entries) {
      items.push_back(name == "keys"     ? key
                      : name == "values" ? value
                                         : MakeList({key, value}, Flavor::kTuple));
    }
    return MakeList(std::move(items));
  }
  if (name == "copy") return self;
  if (args.size() != 1) return Fail(absl::StrCat(name, " takes one argument"));
  const auto& items = self.items();
  if (name == "count") {
    return Value::Int(
        std::count_if(items.begin(), items.end(), [&](const Value& v) { return Equal(v, args[0]); }));
  }
  const auto it = std::find_if(items.begin(), items.end(), [&](const Value& v) { return Equal(v, args[0]); });
  return it == items.end() ? Fail("the value is not in the list") : Value::Int(it - items.begin());
}

Value Interpreter::StringMethod(const std::string& self, const std::string& name,
                                const Arguments& arguments) {
  if (!Charge(self.size() / 32)) return Value();
  const auto text = [&](size_t i, std::string_view keyword) -> std::optional<std::string_view> {
    const Value* v = arguments.Get(i, keyword);
    if (v == nullptr || v->Is(Type::kNone)) return std::nullopt;
    if (!v->Is(Type::kString)) {
      Fail(absl::StrCat(name, ": an argument must be a string, not '", std::string(TypeName(*v)), "'"));
      return std::string_view();
    }
    return std::string_view(v->string());
  };
  const auto number = [&](size_t i, std::string_view keyword, int64_t otherwise) {
    const Value* v = arguments.Get(i, keyword);
    if (v == nullptr) return otherwise;
    if (!v->IsIntegral()) Fail(absl::StrCat(name, ": an argument must be an integer"));
    return v->integer();
  };
  const auto strings = [&](const std::vector<std::string>& parts, Flavor flavor = Flavor::kList) {
    std::vector<Value> items;
    for (const std::string& part : parts) items.push_back(Value::String(part));
    return MakeList(std::move(items), flavor);
  };
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    const auto chars = text(0, "");
    if (failed()) return Value();
    const int sides = name == "strip" ? kBoth : name == "lstrip" ? kLeft : kRight;
    return MakeString(std::string(Strip(self, sides, chars ? &*chars : nullptr)));
  }
  if (name == "split" || name == "rsplit") {
    const auto separator = text(0, "sep");
    const int64_t limit = number(1, "maxsplit", -1);
    if (failed()) return Value();
    if (separator && separator->empty()) return Fail("empty separator");
    return strings(SplitAt(self, separator ? &*separator : nullptr, limit, name == "rsplit"));
  }
  if (name == "splitlines") {
    const Value* keep = arguments.Get(0, "keepends");
    return strings(SplitLines(self, keep != nullptr && Truthy(*keep)));
  }
  if (name == "partition" || name == "rpartition") {
    const auto separator = text(0, "");
    if (failed()) return Value();
    if (!separator || separator->empty()) return Fail("empty separator");
    const size_t at = name == "partition" ? self.find(*separator) : self.rfind(*separator);
    if (at == std::string::npos) {
      return strings(name == "partition" ? std::vector<std::string>{self, "", ""}
                                         : std::vector<std::string>{"", "", self},
                     Flavor::kTuple);
    }
    return strings({self.substr(0, at), std::string(*separator), self.substr(at + separator->size())},
                   Flavor::kTuple);
  }
  if (name == "startswith" || name == "endswith") {
    const Value* prefix = arguments.Get(0, "");
    if (prefix == nullptr) return Fail(absl::StrCat(name, " needs an argument"));
    std::vector<Value> all = {*prefix};
    if (prefix->IsSequence(Flavor::kTuple)) all = prefix->items();
    bool any = false;
    for (const Value& v : all) {
      if (!v.Is(Type::kString))
        return Fail(absl::StrCat(name, ": the argument must be a string or a tuple of strings"));
      any = any || (name == "startswith" ? self.starts_with(v.string()) : self.ends_with(v.string()));
    }
    if (arguments.positional.size() > 1) return Fail(absl::StrCat(name, ": positions are not supported"));
    return Value::Bool(any);
  }
  if (name == "removeprefix" || name == "removesuffix") {
    const auto what = text(0, "");
    if (failed() || !what) return Fail(absl::StrCat(name, " needs a string"));
    if (name == "removeprefix" && self.starts_with(*what)) return MakeString(self.substr(what->size()));
    if (name == "removesuffix" && self.ends_with(*what))
      return MakeString(self.substr(0, self.size() - what->size()));
    return MakeString(self);
  }
  if (name == "upper") return MakeString(Upper(self));
  if (name == "lower") return MakeString(Lower(self));
  if (name == "title") return MakeString(Title(self));
  if (name == "capitalize") return MakeString(Capitalize(self));
  if (name == "replace") {
    const auto from = text(0, "");
    const auto to = text(1, "");
    const int64_t count = number(2, "count", -1);
    if (failed() || !from || !to) return Fail("replace needs two strings");
    const uint64_t places = self.size() / std::max<size_t>(from->size(), 1) + 1;
    if (to->size() != 0 && places > limits_.max_output_bytes / to->size())
      return Fail("replace: the result may be too long");
    return MakeString(Replace(self, *from, *to, count));
  }
  if (name == "find" || name == "rfind" || name == "index") {
    const auto what = text(0, "");
    if (failed() || !what) return Fail(absl::StrCat(name, " needs a string"));
    if (arguments.positional.size() > 1) return Fail(absl::StrCat(name, ": positions are not supported"));
    const size_t at = name == "rfind" ? self.rfind(*what) : self.find(*what);
    if (at == std::string::npos) return name == "index" ? Fail("substring not found") : Value::Int(-1);
    return Value::Int(static_cast<int64_t>(CharCount(std::string_view(self).substr(0, at))));
  }
  if (name == "count") {
    const auto what = text(0, "");
    if (failed() || !what) return Fail("count needs a string");
    if (what->empty()) return Value::Int(static_cast<int64_t>(CharCount(self)) + 1);
    int64_t n = 0;
    for (size_t at = self.find(*what); at != std::string::npos; at = self.find(*what, at + what->size())) ++n;
    return Value::Int(n);
  }
  if (name == "join") {
    std::vector<Value> items;
    if (arguments.positional.size() != 1) return Fail("join takes one argument");
    if (!Iterate(arguments.positional[0], &items)) return Value();
    std::string out;
    for (size_t i = 0; i < items.size(); ++i) {
      if (!items[i].Is(Type::kString)) {
        return Fail(
            absl::StrCat("join: item ", i, " is not a string but '", std::string(TypeName(items[i])), "'"));
      }
      if (i > 0) out += self;
      out += items[i].string();
      if (!CheckOutput(out)) return Value();
    }
    return MakeString(std::move(out));
  }
  if (name == "format") return FormatMethod(self, arguments);
  if (name == "zfill" || name == "ljust" || name == "rjust" || name == "center") {
    const int64_t width = number(0, "", 0);
    const auto fill = name == "zfill" ? std::optional<std::string_view>("0") : text(1, "");
    if (failed()) return Value();
    const auto n = static_cast<int64_t>(CharCount(self));
    if (width <= n) return MakeString(self);
    if (width > 1'000'000 || (fill && CharCount(*fill) != 1))
      return Fail(absl::StrCat(name, ": bad arguments"));
    const int64_t total = width - n;
    const int64_t left = name == "ljust" ? 0 : name == "center" ? total / 2 + (total & width & 1) : total;
    const auto pad = [&](int64_t count) {
      std::string out;
      for (; count > 0; --count) out += fill ? *fill : std::string_view(" ");
      return out;
    };
    const size_t sign = name == "zfill" && !self.empty() && (self[0] == '-' || self[0] == '+') ? 1 : 0;
    return MakeString(self.substr(0, sign) + pad(left) + self.substr(sign) + pad(total - left));
  }
  // isdigit and its like: all characters are of a class, and there is one.
  bool all = !self.empty();
  bool cased = false;
  for (size_t i = 0; i < self.size() && all;) {
    size_t length;
    const auto c = static_cast<UChar32>(DecodeChar(self, i, &length));
    i += length;
    const bool digit = u_charDigitValue(c) >= 0 || u_getIntPropertyValue(c, UCHAR_NUMERIC_TYPE) == U_NT_DIGIT;
    const bool numeric = u_getIntPropertyValue(c, UCHAR_NUMERIC_TYPE) != U_NT_NONE;
    if (name == "isdigit") all = digit;
    if (name == "isalpha") all = u_isalpha(c);
    if (name == "isalnum") all = u_isalpha(c) || numeric;
    if (name == "isspace") all = IsSpaceChar(static_cast<uint32_t>(c));
    if (name == "isupper") all = !u_isULowercase(c) && !u_istitle(c);
    if (name == "islower") all = !u_isUUppercase(c) && !u_istitle(c);
    cased = cased || u_hasBinaryProperty(c, UCHAR_CASED);
  }
  if (name == "isupper" || name == "islower") all = all && cased;
  return Value::Bool(all);
}

// str.format with plain fields: {}, {0}, {name}, {{ and }}.
Value Interpreter::FormatMethod(const std::string& format, const Arguments& arguments) {
  std::string out;
  size_t next = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    const char c = format[i];
    if ((c == '{' || c == '}') && i + 1 < format.size() && format[i + 1] == c) {
      out.push_back(c);
      ++i;
      continue;
    }
    if (c == '}') return Fail("format: a single '}'");
    if (c != '{') {
      out.push_back(c);
      continue;
    }
    const size_t end = format.find('}', i);
    if (end == std::string::npos) return Fail("format: a single '{'");
    const std::string field = format.substr(i + 1, end - i - 1);
    i = end;
    if (field.find_first_of(":!.[{") != std::string::npos) {
      return Fail("format: only plain fields are supported in chat templates");
    }
    const bool digits = !field.empty() && field.size() < 6 &&
                        std::all_of(field.begin(), field.end(), [](char d) { return d >= '0' && d <= '9'; });
    const size_t position = field.empty() ? next++ : digits ? std::stoul(field) : arguments.positional.size();
    const Value* v =
        field.empty() || digits
            ? (position < arguments.positional.size() ? &arguments.positional[position] : nullptr)
            : arguments.Get(position, field);
    if (v == nullptr)
      return Fail(absl::StrCat("format: there is no value for '{", field.substr(0, 40), "}'"));
    AppendStr(*v, &out);
    if (!CheckOutput(out)) return Value();
  }
  return MakeString(std::move(out));
}

// "%s %d" % values, with widths and precisions of numbers.
Value Interpreter::PercentFormat(const std::string& format, const Value& values) {
  const bool tuple = values.IsSequence(Flavor::kTuple);
  size_t next = 0;
  std::string out;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out.push_back(format[i]);
      continue;
    }
    if (++i >= format.size()) return Fail("incomplete format");
    if (format[i] == '%') {
      out.push_back('%');
      continue;
    }
    Value value;
    if (format[i] == '(') {
      const size_t close = format.find(')', i);
      if (close == std::string::npos || !values.Is(Type::kDict)) return Fail("format requires a mapping");
      const Value* found = values.dict().Find(std::string_view(format).substr(i + 1, close - i - 1));
      if (found == nullptr) return Fail("format: a key is missing");
      value = *found;
      next = 1;
      i = close + 1;
    } else {
      if (next >= (tuple ? values.items().size() : 1)) return Fail("not enough arguments for format string");
      value = tuple ? values.items()[next] : values;
      ++next;
    }
    std::string spec = "%";
    while (i < format.size() && std::string_view("-+ 0#.123456789").find(format[i]) != std::string_view::npos)
      spec += format[i++];
    if (i >= format.size() || spec.size() > 8) return Fail("incomplete format");
    const char type = format[i];
    char buffer[512];
    if (type == 's' || type == 'r') {
      if (spec != "%") return Fail("format: widths of texts are not supported in chat templates");
      type == 's' ? AppendStr(value, &out) : AppendRepr(value, &out);
    } else if (type == 'd' || type == 'i' || type == 'x' || type == 'X' || type == 'o') {
      if (!value.IsNumber() || (value.Is(Type::kFloat) && (type != 'd' && type != 'i')))
        return Fail("format: a number is required");
      const double number = value.number();
      if (!(number > -9.2e18 && number < 9.2e18)) return Fail("format: a number is too large");
      const auto n = static_cast<long long>(value.Is(Type::kFloat) ? number : value.integer());
      if (n < 0 && type != 'd' && type != 'i') return Fail("format: a negative number");
      std::snprintf(buffer, sizeof(buffer), (spec + "ll" + type).c_str(), n);
      out += buffer;
    } else if (type == 'f' || type == 'e' || type == 'g' || type == 'F' || type == 'E' || type == 'G') {
      if (!value.IsNumber()) return Fail("format: a number is required");
      if (value.number() > 1e100 || value.number() < -1e100) return Fail("format: a number is too large");
      std::snprintf(buffer, sizeof(buffer), (spec + type).c_str(), value.number());
      out += buffer;
    } else {
      return Fail(absl::StrCat("unsupported format character '", std::string(1, type), "'"));
    }
    if (!CheckOutput(out)) return Value();
  }
  if (tuple ? next < values.items().size() : next == 0 && !values.Is(Type::kDict)) {
    return Fail("not all arguments converted during string formatting");
  }
  return MakeString(std::move(out));
}

}  // namespace tandem::jinja
