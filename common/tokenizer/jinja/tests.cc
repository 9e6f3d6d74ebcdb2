// Tests ("x is string"), by jinja2's names and behaviour.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/tokenizer/jinja/interpreter.h"
#include "common/tokenizer/jinja/text.h"

namespace tandem::jinja {

bool Interpreter::Test(const std::string& name, const Value& input, const Arguments& arguments) {
  const Type type = input.type();
  if (name == "defined") return type != Type::kUndefined;
  if (name == "undefined") return type == Type::kUndefined;
  if (name == "none") return type == Type::kNone;
  if (name == "string") return type == Type::kString;
  if (name == "mapping") return type == Type::kDict;
  if (name == "number") return input.IsNumber();
  if (name == "integer") return type == Type::kInt;
  if (name == "float") return type == Type::kFloat;
  if (name == "boolean") return type == Type::kBool;
  if (name == "true") return type == Type::kBool && input.boolean();
  if (name == "false") return type == Type::kBool && !input.boolean();
  if (name == "callable") return type == Type::kCallable;
  const bool iterable =
      type == Type::kString || type == Type::kList || type == Type::kDict || type == Type::kUndefined;
  if (name == "iterable") return iterable || type == Type::kLoop;
  if (name == "sequence") return iterable && !input.IsSequence(Flavor::kGenerator);
  if (name == "odd" || name == "even" || name == "divisibleby") {
    Value divisor = Value::Int(2);
    if (name == "divisibleby") {
      const Value* given = arguments.Get(0, "num");
      if (given == nullptr) {
        Fail("divisibleby needs a number");
        return false;
      }
      divisor = *given;
    }
    if (!input.IsNumber() || !divisor.IsNumber()) {
      Fail(absl::StrCat(name, ": not a number"));
      return false;
    }
    const Value rest = Binary("%", input, divisor);
    return !failed() && rest.number() == (name == "odd" ? 1 : 0);
  }
  if (name == "lower") return Lower(Str(input)) == Str(input) && Upper(Str(input)) != Str(input);
  if (name == "upper") return Upper(Str(input)) == Str(input) && Lower(Str(input)) != Str(input);
  static constexpr struct {
    std::string_view name;
    std::string_view op;
  } kComparisons[] = {{"eq", "=="}, {"equalto", "=="}, {"==", "=="},         {"ne", "!="}, {"!=", "!="},
                      {"lt", "<"},  {"lessthan", "<"}, {"<", "<"},           {"le", "<="}, {"<=", "<="},
                      {"gt", ">"},  {">", ">"},        {"greaterthan", ">"}, {"ge", ">="}, {">=", ">="},
                      {"in", "in"}, {"sameas", "=="}};
  for (const auto& comparison : kComparisons) {
    if (comparison.name != name) continue;
    const Value* other = arguments.Get(0, name == "in" ? "seq" : "other");
    if (other == nullptr) {
      Fail(absl::StrCat("the test '", name, "' needs an argument"));
      return false;
    }
    if (name == "sameas" && input.type() != other->type()) return false;
    return Compare(comparison.op, input, *other);
  }
  Fail(absl::StrCat("there is no test named '", name, "'"));
  return false;
}

}  // namespace tandem::jinja
