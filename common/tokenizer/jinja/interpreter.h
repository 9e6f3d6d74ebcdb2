// Executes a syntax tree. Errors stick: after the first one every evaluation returns undefined and the
// statements stop, so that only loops and results have to look at failed().
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/tokenizer/jinja/ast.h"
#include "common/tokenizer/jinja/template.h"
#include "common/tokenizer/jinja/values.h"

namespace tandem::jinja {

// The variables of a block; what is not found here is looked up outside of it.
struct Scope {
  std::shared_ptr<Scope> parent;
  std::vector<std::pair<std::string, Value>> variables;

  Value* FindHere(std::string_view name);
  const Value* Find(std::string_view name) const;
  void Set(std::string_view name, Value value);
};

struct CallableObject : Object {
  enum Kind { kBuiltin, kMethod, kMacro, kForbidden } kind = kBuiltin;
  std::string name;
  Value self;  // of a method
  const Node* macro = nullptr;
  std::shared_ptr<Scope> scope;  // where the macro was defined
};

struct LoopObject : Object {
  std::vector<Value> items;
  size_t index = 0;
  Value last_changed;  // arguments of loop.changed
  bool has_changed = false;
};

// The arguments of a call, filter or test.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keywords;

  // The argument at `index` or named `name`; null if it was not given.
  const Value* Get(size_t index, std::string_view name) const;
};

class Interpreter {
 public:
  explicit Interpreter(const RenderLimits& limits) : limits_(limits) {}
  ~Interpreter();

  absl::StatusOr<std::string> Run(const Node& root, const DictObject& context);

  // For the rooms of the interpreter (operators, filters, tests, methods):

  bool failed() const { return !status_.ok(); }
  // Records an error at the line that is executed; returns undefined.
  Value Fail(std::string_view what);
  // Counts work; false when the limit is reached.
  bool Charge(uint64_t steps);
  // A string, within the limits.
  Value MakeString(std::string text);
  Value MakeList(std::vector<Value> items, Flavor flavor = Flavor::kList);
  // Generators become lists where the limits say so.
  Value MakeGenerator(std::vector<Value> items);
  Value MakeDict(std::shared_ptr<DictObject> dict);

  // What iterating over `v` yields; an error for what cannot be iterated over. Uses generators up.
  bool Iterate(const Value& v, std::vector<Value>* items);

  Value Attribute(const Value& object, const std::string& name);  // a.b
  Value Item(const Value& object, const Value& index);            // a[b]
  Value Slice(const Value& object, const Value& begin, const Value& end, const Value& step);
  Value Binary(std::string_view op, const Value& a, const Value& b);
  bool Compare(std::string_view op, const Value& a, const Value& b);
  bool Contains(const Value& container, const Value& item);
  bool Less(const Value& a, const Value& b);
  Value Call(const Value& callee, const Arguments& arguments);
  Value Filter(const std::string& name, const Value& input, const Arguments& arguments);
  bool Test(const std::string& name, const Value& input, const Arguments& arguments);

 private:
  enum class Flow { kNormal, kBreak, kContinue };

  Value Eval(const Node& node);
  Value EvalItem(const Node& node);
  Value EvalCompare(const Node& node);
  Arguments EvalArguments(const Node& node);
  Flow Execute(const Node& node, std::string* out);
  Flow For(const Node& node, std::string* out);
  void Assign(const Node& target, const Value& value);
  void DefineMacro(const Node& node);
  std::string Capture(const Node& body);
  void Emit(const Value& value, std::string* out);
  bool CheckOutput(const std::string& out);

  Value CallBuiltin(const std::string& name, const Arguments& arguments);
  Value CallMacro(const CallableObject& macro, const Arguments& arguments);
  Value CallMethod(const CallableObject& method, const Arguments& arguments);
  Value StringMethod(const std::string& self, const std::string& name, const Arguments& arguments);
  Value LoopAttribute(const Value& loop, const std::string& name);
  Value FormatMethod(const std::string& format, const Arguments& arguments);
  Value PercentFormat(const std::string& format, const Value& values);
  Value Numeric(std::string_view op, const Value& a, const Value& b);

  Value StringFilter(const std::string& name, const Value& input, const Arguments& arguments, bool* known);
  Value NumberFilter(const std::string& name, const Value& input, const Arguments& arguments, bool* known);
  Value SequenceFilter(const std::string& name, const Value& input, const Arguments& arguments, bool* known);
  Value SelectFilter(const std::string& name, const Value& input, const Arguments& arguments);
  Value SortFilter(const std::string& name, const Value& input, const Arguments& arguments);
  Value ToJson(const Value& input, const Arguments& arguments);
  // "a.b.0" of an item, as the attribute arguments of filters mean it.
  Value Path(const Value& item, const Value& path);

  // The scope of a macro, kept to break the circle between scope and macro at the end.
  std::shared_ptr<Scope> NewScope(std::shared_ptr<Scope> parent);

  friend class Depth;
  friend class ScopeGuard;

  RenderLimits limits_;
  absl::Status status_;
  uint64_t steps_ = 0;
  int depth_ = 0;
  int line_ = 1;
  std::shared_ptr<Scope> scope_;
  std::vector<std::shared_ptr<Scope>> captured_;
  std::vector<std::shared_ptr<NamespaceObject>> namespaces_;
};

// Names of string, dict and list methods, to tell a method from a missing attribute.
bool IsMethod(const Value& object, std::string_view name);
// Methods that would change their object, which a template may not.
bool IsForbiddenMethod(const Value& object, std::string_view name);

}  // namespace tandem::jinja
