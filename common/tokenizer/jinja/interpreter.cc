#include "common/tokenizer/jinja/interpreter.h"

#include <algorithm>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "common/tokenizer/jinja/lexer.h"
#include "common/tokenizer/jinja/text.h"

namespace tandem::jinja {
namespace {

constexpr int kMaxDepth = 900;  // of nested evaluations
constexpr std::string_view kGlobals[] = {"range", "dict", "namespace", "raise_exception", "strftime_now"};

}  // namespace

// Counts nested evaluations.
class Depth {
 public:
  explicit Depth(Interpreter* in) : in_(in) {
    if (++in_->depth_ > kMaxDepth) in_->Fail("evaluation is nested too deeply");
  }
  ~Depth() { --in_->depth_; }

 private:
  Interpreter* in_;
};

// Makes a new scope the current one for a while.
class ScopeGuard {
 public:
  ScopeGuard(Interpreter* in, std::shared_ptr<Scope> scope) : in_(in), outer_(std::move(in->scope_)) {
    in_->scope_ = std::move(scope);
  }
  ~ScopeGuard() { in_->scope_ = std::move(outer_); }
  const std::shared_ptr<Scope>& outer() const { return outer_; }

 private:
  Interpreter* in_;
  std::shared_ptr<Scope> outer_;
};

Value* Scope::FindHere(std::string_view name) {
  for (auto& [known, value] : variables) {
    if (known == name) return &value;
  }
  return nullptr;
}

const Value* Scope::Find(std::string_view name) const {
  for (const Scope* scope = this; scope != nullptr; scope = scope->parent.get()) {
    if (const Value* found = const_cast<Scope*>(scope)->FindHere(name)) return found;
  }
  return nullptr;
}

void Scope::Set(std::string_view name, Value value) {
  if (Value* old = FindHere(name)) {
    *old = std::move(value);
  } else {
    variables.emplace_back(std::string(name), std::move(value));
  }
}

const Value* Arguments::Get(size_t index, std::string_view name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [known, value] : keywords) {
    if (known == name) return &value;
  }
  return nullptr;
}

Interpreter::~Interpreter() {
  // Macros hold their scopes and namespaces may hold each other: taken apart here, one by one.
  for (const auto& scope : captured_) scope->variables.clear();
  for (const auto& ns : namespaces_) {
    ns->attributes.entries.clear();
    ns->attributes.by_string.clear();
  }
}

Value Interpreter::Fail(std::string_view what) {
  if (status_.ok()) status_ = TemplateError(line_, what);
  return Value();
}

bool Interpreter::Charge(uint64_t steps) {
  steps_ += steps;
  if (steps_ > limits_.max_steps && status_.ok()) {
    status_ = absl::ResourceExhaustedError(
        absl::StrCat("template line ", line_, ": more than ", limits_.max_steps, " steps"));
  }
  return status_.ok();
}

Value Interpreter::MakeString(std::string text) {
  if (!CheckOutput(text) || !Charge(text.size() / 32)) return Value();
  return Value::String(std::move(text));
}

Value Interpreter::MakeList(std::vector<Value> items, Flavor flavor) {
  if (!Charge(items.size())) return Value();
  Value list = Value::List(std::move(items), flavor);
  if (list.depth() > kMaxValueDepth) return Fail("lists are nested too deeply");
  return list;
}

Value Interpreter::MakeGenerator(std::vector<Value> items) {
  return MakeList(std::move(items), limits_.generators_are_lists ? Flavor::kList : Flavor::kGenerator);
}

Value Interpreter::MakeDict(std::shared_ptr<DictObject> dict) {
  if (!Charge(dict->entries.size())) return Value();
  if (dict->depth > kMaxValueDepth) return Fail("dicts are nested too deeply");
  return Value::Dict(std::move(dict));
}

bool Interpreter::CheckOutput(const std::string& out) {
  if (out.size() <= limits_.max_output_bytes) return true;
  if (status_.ok()) {
    status_ = absl::ResourceExhaustedError(
        absl::StrCat("template line ", line_, ": a text of more than ", limits_.max_output_bytes, " bytes"));
  }
  return false;
}

std::shared_ptr<Scope> Interpreter::NewScope(std::shared_ptr<Scope> parent) {
  auto scope = std::make_shared<Scope>();
  scope->parent = std::move(parent);
  return scope;
}

absl::StatusOr<std::string> Interpreter::Run(const Node& root, const DictObject& context) {
  scope_ = NewScope(nullptr);
  for (const std::string_view name : kGlobals) {
    auto builtin = std::make_shared<CallableObject>();
    builtin->name = std::string(name);
    scope_->Set(name, Value::Of(Type::kCallable, std::move(builtin)));
  }
  for (const auto& [name, value] : context.entries) scope_->Set(name.string(), value);
  scope_ = NewScope(scope_);
  std::string out;
  Execute(root, &out);
  if (failed()) return status_;
  return out;
}

// ---- statements ----

void Interpreter::Emit(const Value& value, std::string* out) {
  const size_t before = out->size();
  AppendStr(value, out);
  Charge((out->size() - before) / 32);
  CheckOutput(*out);
}

std::string Interpreter::Capture(const Node& body) {
  std::string text;
  Execute(body, &text);
  return text;
}

Interpreter::Flow Interpreter::Execute(const Node& node, std::string* out) {
  const Depth depth(this);
  if (!Charge(1)) return Flow::kNormal;
  line_ = node.line;
  switch (node.kind) {
    case NodeKind::kBlock:
      for (const NodePtr& statement : node.kids) {
        const Flow flow = Execute(*statement, out);
        if (failed() || flow != Flow::kNormal) return flow;
      }
      return Flow::kNormal;
    case NodeKind::kData:
      out->append(node.text);
      Charge(node.text.size() / 32);
      CheckOutput(*out);
      return Flow::kNormal;
    case NodeKind::kPrint: {
      const Value value = Eval(*node.kids[0]);
      if (!failed()) Emit(value, out);
      return Flow::kNormal;
    }
    case NodeKind::kIf:
      for (size_t i = 0; i < node.kids.size(); i += 2) {
        if (i + 1 == node.kids.size()) return Execute(*node.kids[i], out);
        const bool chosen = Truthy(Eval(*node.kids[i]));
        if (failed()) return Flow::kNormal;
        if (chosen) return Execute(*node.kids[i + 1], out);
      }
      return Flow::kNormal;
    case NodeKind::kFor:
      return For(node, out);
    case NodeKind::kSet: {
      const Value value = Eval(*node.kids[1]);
      if (!failed()) Assign(*node.kids[0], value);
      return Flow::kNormal;
    }
    case NodeKind::kSetBlock: {
      std::string text;
      {
        const ScopeGuard guard(this, NewScope(scope_));
        text = Capture(*node.kids[2]);
      }
      Value value = MakeString(std::move(text));
      // The filters wait for their input at the bottom of the chain.
      if (node.kids[1] != nullptr) {
        const ScopeGuard guard(this, NewScope(scope_));
        scope_->Set("", value);
        value = Eval(*node.kids[1]);
      }
      if (!failed()) Assign(*node.kids[0], value);
      return Flow::kNormal;
    }
    case NodeKind::kMacro:
      DefineMacro(node);
      return Flow::kNormal;
    case NodeKind::kCallBlock: {
      const Node& call = *node.kids[0];
      auto caller = std::make_shared<CallableObject>();
      caller->kind = CallableObject::kMacro;
      caller->name = "caller";
      caller->macro = node.kids[1].get();
      caller->scope = scope_;
      captured_.push_back(scope_);
      const Value callee = Eval(*call.kids[0]);
      Arguments arguments = EvalArguments(call);
      arguments.keywords.emplace_back("caller", Value::Of(Type::kCallable, std::move(caller)));
      if (failed()) return Flow::kNormal;
      const Value value = Call(callee, arguments);
      if (!failed()) Emit(value, out);
      return Flow::kNormal;
    }
    case NodeKind::kFilterBlock: {
      const ScopeGuard guard(this, NewScope(scope_));
      const Value text = MakeString(Capture(*node.kids[1]));
      scope_->Set("", text);
      const Value value = Eval(*node.kids[0]);
      if (!failed()) Emit(value, out);
      return Flow::kNormal;
    }
    case NodeKind::kWith: {
      // The values are those of the outside.
      auto inner = NewScope(scope_);
      std::vector<Value> values;
      for (size_t i = 0; i + 1 < node.kids.size(); i += 2) values.push_back(Eval(*node.kids[i + 1]));
      const ScopeGuard guard(this, std::move(inner));
      for (size_t i = 0; i < values.size() && !failed(); ++i) Assign(*node.kids[2 * i], values[i]);
      return failed() ? Flow::kNormal : Execute(*node.kids.back(), out);
    }
    case NodeKind::kBreak:
      return Flow::kBreak;
    case NodeKind::kContinue:
      return Flow::kContinue;
    default:
      Fail("not a statement");
      return Flow::kNormal;
  }
}

Interpreter::Flow Interpreter::For(const Node& node, std::string* out) {
  std::vector<Value> items;
  if (!Iterate(Eval(*node.kids[1]), &items)) return Flow::kNormal;
  if (node.kids[2] != nullptr) {
    std::vector<Value> kept;
    for (Value& item : items) {
      const ScopeGuard guard(this, NewScope(scope_));
      Assign(*node.kids[0], item);
      const bool keep = Truthy(Eval(*node.kids[2]));
      if (failed()) return Flow::kNormal;
      if (keep) kept.push_back(std::move(item));
    }
    items = std::move(kept);
  }
  if (items.empty()) {
    if (node.kids[4] == nullptr) return Flow::kNormal;
    const ScopeGuard guard(this, NewScope(scope_));
    return Execute(*node.kids[4], out);
  }
  auto loop = std::make_shared<LoopObject>();
  loop->items = std::move(items);
  const Value loop_value = Value::Of(Type::kLoop, loop);
  for (size_t i = 0; i < loop->items.size(); ++i) {
    loop->index = i;
    const ScopeGuard guard(this, NewScope(scope_));
    scope_->Set("loop", loop_value);
    Assign(*node.kids[0], loop->items[i]);
    if (failed()) break;
    const Flow flow = Execute(*node.kids[3], out);
    if (failed() || flow == Flow::kBreak) break;
  }
  return Flow::kNormal;
}

void Interpreter::Assign(const Node& target, const Value& value) {
  switch (target.kind) {
    case NodeKind::kName:
      scope_->Set(target.text, value);
      return;
    case NodeKind::kTuple: {
      std::vector<Value> items;
      if (!Iterate(value, &items)) return;
      if (items.size() != target.kids.size()) {
        Fail(absl::StrCat("cannot unpack ", items.size(), " values into ", target.kids.size(), " names"));
        return;
      }
      for (size_t i = 0; i < items.size(); ++i) Assign(*target.kids[i], items[i]);
      return;
    }
    case NodeKind::kAttr: {
      const Value ns = Eval(*target.kids[0]);
      if (!ns.Is(Type::kNamespace)) {
        Fail("cannot assign an attribute of something that is not a namespace");
        return;
      }
      static_cast<NamespaceObject&>(*ns.object()).attributes.Set(std::string_view(target.text), value);
      return;
    }
    default:
      Fail("cannot assign to this");
  }
}

void Interpreter::DefineMacro(const Node& node) {
  auto macro = std::make_shared<CallableObject>();
  macro->kind = CallableObject::kMacro;
  macro->name = node.text;
  macro->macro = &node;
  macro->scope = scope_;
  captured_.push_back(scope_);
  scope_->Set(node.text, Value::Of(Type::kCallable, std::move(macro)));
}

// ---- expressions ----

Arguments Interpreter::EvalArguments(const Node& node) {
  Arguments out;
  for (size_t i = 1; i < node.kids.size(); ++i) out.positional.push_back(Eval(*node.kids[i]));
  for (const auto& [name, expression] : node.keywords) out.keywords.emplace_back(name, Eval(*expression));
  return out;
}

Value Interpreter::EvalItem(const Node& node) {
  const Value object = Eval(*node.kids[0]);
  const Node& index = *node.kids[1];
  if (index.kind != NodeKind::kSlice) {
    const Value i = Eval(index);
    return failed() ? Value() : Item(object, i);
  }
  Value parts[3];
  for (int i = 0; i < 3; ++i) parts[i] = index.kids[i] == nullptr ? Value::None() : Eval(*index.kids[i]);
  return failed() ? Value() : Slice(object, parts[0], parts[1], parts[2]);
}

Value Interpreter::EvalCompare(const Node& node) {
  Value left = Eval(*node.kids[0]);
  for (size_t i = 0; i < node.names.size(); ++i) {
    Value right = Eval(*node.kids[i + 1]);
    if (failed()) return Value();
    const bool holds = Compare(node.names[i], left, right);
    if (failed()) return Value();
    if (!holds) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

Value Interpreter::Eval(const Node& node) {
  const Depth depth(this);
  if (!Charge(1)) return Value();
  line_ = node.line;
  switch (node.kind) {
    case NodeKind::kConst:
      return node.value;
    case NodeKind::kName: {
      const Value* found = scope_->Find(node.text);
      return found != nullptr ? *found : Value::Undefined(absl::StrCat("'", node.text, "' is undefined"));
    }
    case NodeKind::kList:
    case NodeKind::kTuple: {
      std::vector<Value> items;
      for (const NodePtr& kid : node.kids) items.push_back(Eval(*kid));
      return failed()
                 ? Value()
                 : MakeList(std::move(items), node.kind == NodeKind::kList ? Flavor::kList : Flavor::kTuple);
    }
    case NodeKind::kDict: {
      auto dict = std::make_shared<DictObject>();
      for (size_t i = 0; i + 1 < node.kids.size(); i += 2) {
        const Value key = Eval(*node.kids[i]);
        if (key.Is(Type::kDict) || key.IsSequence(Flavor::kList)) {
          return Fail(absl::StrCat("unhashable type: '", std::string(TypeName(key)), "'"));
        }
        dict->Set(key, Eval(*node.kids[i + 1]));
      }
      return failed() ? Value() : MakeDict(std::move(dict));
    }
    case NodeKind::kAttr: {
      const Value object = Eval(*node.kids[0]);
      return failed() ? Value() : Attribute(object, node.text);
    }
    case NodeKind::kItem:
      return EvalItem(node);
    case NodeKind::kCall: {
      const Value callee = Eval(*node.kids[0]);
      const Arguments arguments = EvalArguments(node);
      line_ = node.line;
      return failed() ? Value() : Call(callee, arguments);
    }
    case NodeKind::kFilter: {
      const Value input = node.kids[0] == nullptr ? *scope_->Find("") : Eval(*node.kids[0]);
      const Arguments arguments = EvalArguments(node);
      line_ = node.line;
      return failed() ? Value() : Filter(node.text, input, arguments);
    }
    case NodeKind::kTest: {
      const Value input = Eval(*node.kids[0]);
      const Arguments arguments = EvalArguments(node);
      return failed() ? Value() : Value::Bool(Test(node.text, input, arguments));
    }
    case NodeKind::kNot:
      return Value::Bool(!Truthy(Eval(*node.kids[0])));
    case NodeKind::kNegate:
    case NodeKind::kPlus: {
      const Value v = Eval(*node.kids[0]);
      if (failed()) return Value();
      if (v.Is(Type::kUndefined)) return Fail(v.string());
      if (!v.IsNumber())
        return Fail(absl::StrCat("bad operand type for a sign: '", std::string(TypeName(v)), "'"));
      if (node.kind == NodeKind::kPlus) return v.Is(Type::kFloat) ? v : Value::Int(v.integer());
      if (v.Is(Type::kFloat)) return Value::Float(-v.number());
      return v.integer() == INT64_MIN ? Fail("an integer is too large") : Value::Int(-v.integer());
    }
    case NodeKind::kBinary: {
      const Value a = Eval(*node.kids[0]);
      const Value b = Eval(*node.kids[1]);
      line_ = node.line;
      return failed() ? Value() : Binary(node.text, a, b);
    }
    case NodeKind::kConcat: {
      std::string text;
      for (const NodePtr& kid : node.kids) {
        AppendStr(Eval(*kid), &text);
        if (failed()) return Value();
      }
      return MakeString(std::move(text));
    }
    case NodeKind::kCompare:
      return EvalCompare(node);
    case NodeKind::kAnd:
    case NodeKind::kOr: {
      Value left = Eval(*node.kids[0]);
      if (failed() || Truthy(left) == (node.kind == NodeKind::kOr)) return left;
      return Eval(*node.kids[1]);
    }
    case NodeKind::kIfElse: {
      const bool chosen = Truthy(Eval(*node.kids[0]));
      if (failed()) return Value();
      if (chosen) return Eval(*node.kids[1]);
      return node.kids[2] != nullptr
                 ? Eval(*node.kids[2])
                 : Value::Undefined("the inline if has no else and its condition is false");
    }
    default:
      return Fail("not an expression");
  }
}

Value Interpreter::CallMacro(const CallableObject& macro, const Arguments& arguments) {
  const Depth depth(this);
  const Node& node = *macro.macro;
  if (failed()) return Value();
  auto scope = NewScope(macro.scope);
  const size_t count = node.names.size();
  std::vector<Value> rest;
  for (size_t i = count; i < arguments.positional.size(); ++i) rest.push_back(arguments.positional[i]);
  const ScopeGuard guard(this, scope);
  auto extra = std::make_shared<DictObject>();
  if (node.value.integer() & kUsesCaller) scope->Set("caller", Value::Undefined("no caller was given"));
  for (const auto& [name, value] : arguments.keywords) {
    const auto known = std::find(node.names.begin(), node.names.end(), name);
    if (name == "caller" && known == node.names.end() && (node.value.integer() & kUsesCaller)) {
      scope->Set(name, value);
    } else if (known == node.names.end()) {
      extra->Set(std::string_view(name), value);
    } else if (static_cast<size_t>(known - node.names.begin()) < arguments.positional.size()) {
      return Fail(absl::StrCat("macro '", macro.name, "' got two values for argument '", name, "'"));
    }
  }
  for (size_t i = 0; i < count; ++i) {
    const Value* given = arguments.Get(i, node.names[i]);
    if (given != nullptr) {
      scope->Set(node.names[i], *given);
    } else if (node.kids[i + 1] != nullptr) {
      scope->Set(node.names[i], Eval(*node.kids[i + 1]));
    } else {
      scope->Set(node.names[i],
                 Value::Undefined(absl::StrCat("parameter '", node.names[i], "' was not provided")));
    }
  }
  // A macro that does not look at them takes no more arguments than it names.
  if (!rest.empty() && !(node.value.integer() & kUsesVarargs)) {
    return Fail(absl::StrCat("macro '", macro.name, "' takes not more than ", count, " argument(s)"));
  }
  if (!extra->entries.empty() && !(node.value.integer() & kUsesKwargs)) {
    return Fail(absl::StrCat("macro '", macro.name, "' takes no keyword argument '",
                             extra->entries[0].first.string(), "'"));
  }
  scope->Set("varargs", MakeList(std::move(rest), Flavor::kTuple));
  scope->Set("kwargs", MakeDict(std::move(extra)));
  std::string text = Capture(*node.kids[0]);
  return failed() ? Value() : MakeString(std::move(text));
}

Value Interpreter::Call(const Value& callee, const Arguments& arguments) {
  if (callee.Is(Type::kUndefined)) return Fail(callee.string());
  if (!callee.Is(Type::kCallable)) {
    return Fail(absl::StrCat("'", std::string(TypeName(callee)), "' object is not callable"));
  }
  const auto& callable = static_cast<const CallableObject&>(*callee.object());
  switch (callable.kind) {
    case CallableObject::kBuiltin:
      return CallBuiltin(callable.name, arguments);
    case CallableObject::kMethod:
      return CallMethod(callable, arguments);
    case CallableObject::kMacro:
      return CallMacro(callable, arguments);
    case CallableObject::kForbidden:
      return Fail(absl::StrCat("access to '", callable.name, "' is not allowed: it changes its object"));
  }
  return Value();
}

Value Interpreter::CallBuiltin(const std::string& name, const Arguments& arguments) {
  const auto& args = arguments.positional;
  if (name == "raise_exception") {
    if (args.size() != 1) return Fail("raise_exception takes one argument");
    if (status_.ok()) status_ = absl::InvalidArgumentError(Str(args[0]));
    return Value();
  }
  if (name == "range") {
    if (args.empty() || args.size() > 3 ||
        !std::all_of(args.begin(), args.end(), [](const Value& v) { return v.IsIntegral(); })) {
      return Fail("range takes one to three integers");
    }
    const int64_t begin = args.size() == 1 ? 0 : args[0].integer();
    const int64_t end = args.size() == 1 ? args[0].integer() : args[1].integer();
    const int64_t step = args.size() == 3 ? args[2].integer() : 1;
    if (step == 0) return Fail("range: the step must not be zero");
    std::vector<Value> items;
    constexpr size_t kMaxRange = 100000;  // jinja2's sandbox has the same
    for (__int128 i = begin; step > 0 ? i < end : i > end; i += step) {
      if (items.size() == kMaxRange) return Fail(absl::StrCat("range: more than ", kMaxRange, " numbers"));
      items.push_back(Value::Int(static_cast<int64_t>(i)));
    }
    return MakeList(std::move(items));
  }
  if (name == "dict" || name == "namespace") {
    auto dict = std::make_shared<DictObject>();
    if (args.size() > 1) return Fail(absl::StrCat(name, " takes one positional argument"));
    if (!args.empty()) {
      if (args[0].Is(Type::kDict)) {
        for (const auto& [key, value] : args[0].dict().entries) dict->Set(key, value);
      } else {
        std::vector<Value> items;
        if (!Iterate(args[0], &items)) return Value();
        for (const Value& item : items) {
          std::vector<Value> pair;
          if (!Iterate(item, &pair)) return Value();
          if (pair.size() != 2) return Fail(absl::StrCat(name, ": an item is not a pair"));
          dict->Set(pair[0], pair[1]);
        }
      }
    }
    for (const auto& [key, value] : arguments.keywords) dict->Set(std::string_view(key), value);
    if (name == "dict") return MakeDict(std::move(dict));
    auto ns = std::make_shared<NamespaceObject>();
    ns->attributes = std::move(*dict);
    namespaces_.push_back(ns);
    return Value::Of(Type::kNamespace, std::move(ns));
  }
  if (name == "strftime_now") {
    if (args.size() != 1 || !args[0].Is(Type::kString)) return Fail("strftime_now takes a format");
    const std::time_t now = limits_.now != 0 ? limits_.now : std::time(nullptr);
    std::tm local{};
    localtime_r(&now, &local);
    // One more character tells an empty result from one that did not fit.
    const std::string format = args[0].string() + "x";
    std::string text(format.size() * 16 + 256, '\0');
    const size_t n = std::strftime(text.data(), text.size(), format.c_str(), &local);
    if (n == 0) return Fail("strftime_now: the result is too long");
    text.resize(n - 1);
    return MakeString(std::move(text));
  }
  return Fail(absl::StrCat("'", name, "' is not supported in chat templates"));
}

}  // namespace tandem::jinja
