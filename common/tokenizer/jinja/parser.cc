#include "common/tokenizer/jinja/parser.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/jinja/lexer.h"

namespace tandem::jinja {
namespace {

// Levels of the recursive functions; a pair of brackets takes three.
constexpr int kMaxParserDepth = 300;

// Recursive descent. After the first error every function returns null and the loops end, since tokens run
// out.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<NodePtr> Parse() {
    NodePtr root = Statements({});
    if (status_.ok() && Peek().kind != TokenKind::kEnd) Fail("unexpected end of a block");
    if (!status_.ok()) return status_;
    return root;
  }

 private:
  const Token& Peek(size_t ahead = 0) const {
    return status_.ok() && pos_ + ahead < tokens_.size() ? tokens_[pos_ + ahead] : tokens_.back();
  }
  const Token& Next() {
    const Token& token = Peek();
    if (token.kind != TokenKind::kEnd) ++pos_;
    return token;
  }
  bool SkipOperator(std::string_view op) {
    if (!Peek().IsOperator(op)) return false;
    ++pos_;
    return true;
  }
  bool SkipName(std::string_view name) {
    if (!Peek().IsName(name)) return false;
    ++pos_;
    return true;
  }
  void Fail(std::string_view what) {
    if (status_.ok()) status_ = TemplateError(tokens_[std::min(pos_, tokens_.size() - 1)].line, what);
  }
  void ExpectOperator(std::string_view op) {
    if (!SkipOperator(op)) Fail(absl::StrCat("expected '", std::string(op), "', got ", Describe(Peek())));
  }
  std::string ExpectName() {
    if (Peek().kind != TokenKind::kName) {
      Fail(absl::StrCat("expected a name, got ", Describe(Peek())));
      return "";
    }
    return Next().text;
  }
  void ExpectBlockEnd() {
    if (Peek().kind != TokenKind::kBlockEnd) {
      Fail(absl::StrCat("expected the end of the block tag, got ", Describe(Peek())));
      return;
    }
    ++pos_;
  }
  static std::string Describe(const Token& token) {
    switch (token.kind) {
      case TokenKind::kEnd:
        return "the end of the template";
      case TokenKind::kBlockEnd:
      case TokenKind::kPrintEnd:
        return "the end of the tag";
      default:
        return absl::StrCat("'", token.text.substr(0, 40), "'");
    }
  }

  NodePtr Make(NodeKind kind) { return std::make_unique<Node>(kind, Peek().line); }
  void Adopt(Node* node, NodePtr kid) {
    if (kid != nullptr) Deepen(node, *kid);
    node->kids.push_back(std::move(kid));
  }
  void Deepen(Node* node, const Node& kid) {
    node->depth = std::max(node->depth, kid.depth + 1);
    if (node->depth > kMaxTreeDepth) Fail(absl::StrCat("nested deeper than ", kMaxTreeDepth, " levels"));
  }
  template <typename... Kids>
  NodePtr With(NodeKind kind, int line, Kids... kids) {
    auto node = std::make_unique<Node>(kind, line);
    (Adopt(node.get(), std::move(kids)), ...);
    return node;
  }

  // Bounds the recursion of the parser itself.
  class Level {
   public:
    explicit Level(Parser* parser) : parser_(parser) {
      if (++parser_->level_ > kMaxParserDepth) parser_->Fail("nested too deeply");
    }
    ~Level() { --parser_->level_; }

   private:
    Parser* parser_;
  };

  // ---- statements ----

  bool AtEndOf(std::initializer_list<std::string_view> ends) const {
    return Peek().kind == TokenKind::kBlockBegin && Peek(1).kind == TokenKind::kName &&
           std::find(ends.begin(), ends.end(), Peek(1).text) != ends.end();
  }

  // Up to a block tag whose name is one of `ends` (the name is the next token then) or to the end.
  NodePtr Statements(std::initializer_list<std::string_view> ends) {
    const Level level(this);
    NodePtr block = Make(NodeKind::kBlock);
    while (status_.ok() && Peek().kind != TokenKind::kEnd) {
      if (AtEndOf(ends)) {
        ++pos_;
        return block;
      }
      if (Peek().kind == TokenKind::kData) {
        NodePtr data = Make(NodeKind::kData);
        data->text = Next().text;
        Adopt(block.get(), std::move(data));
      } else if (Peek().kind == TokenKind::kPrintBegin) {
        const int line = Next().line;
        Adopt(block.get(), With(NodeKind::kPrint, line, Tuple(true, {})));
        if (Peek().kind != TokenKind::kPrintEnd) {
          Fail(absl::StrCat("expected the end of the print tag, got ", Describe(Peek())));
        }
        ++pos_;
      } else {
        ++pos_;  // the block's begin
        Adopt(block.get(), Statement());
      }
    }
    if (ends.size() > 0) {
      Fail(absl::StrCat("the template ends where '", std::string(*(ends.end() - 1)), "' was expected"));
    }
    return block;
  }

  NodePtr Statement() {
    const Token token = Peek();
    if (token.kind != TokenKind::kName) {
      Fail("a block tag must begin with a name");
      return nullptr;
    }
    ++pos_;
    const std::string& name = token.text;
    if (name == "if") return If();
    if (name == "for") return For();
    if (name == "set") return Set();
    if (name == "macro") return Macro(ExpectName(), "endmacro");
    if (name == "call") return CallBlock();
    if (name == "filter") return FilterBlock();
    if (name == "with") return WithBlock();
    if (name == "generation") {
      ExpectBlockEnd();
      NodePtr body = Statements({"endgeneration"});
      CloseBlock();
      return body;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) Fail(absl::StrCat("'", name, "' outside of a loop"));
      NodePtr node = Make(name == "break" ? NodeKind::kBreak : NodeKind::kContinue);
      ExpectBlockEnd();
      return node;
    }
    for (const char* known : {"include", "import", "from", "extends", "block", "do", "autoescape", "trans"}) {
      if (name == known && status_.ok()) {
        status_ = absl::UnimplementedError(absl::StrCat("template line ", token.line, ": the tag '", name,
                                                        "' is not supported in chat templates"));
      }
    }
    Fail(absl::StrCat("unknown tag '", name, "'"));
    return nullptr;
  }

  // Behind the name of an end tag.
  void CloseBlock() {
    ++pos_;
    ExpectBlockEnd();
  }

  NodePtr If() {
    NodePtr node = Make(NodeKind::kIf);
    while (true) {
      Adopt(node.get(), Tuple(false, {}));
      ExpectBlockEnd();
      Adopt(node.get(), Statements({"elif", "else", "endif"}));
      const bool is_elif = Peek().IsName("elif");
      const bool is_else = Peek().IsName("else");
      ++pos_;
      if (!status_.ok()) return node;
      if (is_elif) continue;
      if (is_else) {
        ExpectBlockEnd();
        Adopt(node.get(), Statements({"endif"}));
        ++pos_;
      }
      ExpectBlockEnd();
      return node;
    }
  }

  NodePtr For() {
    NodePtr node = Make(NodeKind::kFor);
    Adopt(node.get(), Target(false));
    if (!SkipName("in")) Fail(absl::StrCat("expected 'in', got ", Describe(Peek())));
    Adopt(node.get(), Tuple(false, {"recursive", "if"}));
    Adopt(node.get(), SkipName("if") ? Expression() : nullptr);
    if (Peek().IsName("recursive") && status_.ok()) {
      status_ = absl::UnimplementedError(absl::StrCat(
          "template line ", Peek().line, ": recursive loops are not supported in chat templates"));
    }
    ExpectBlockEnd();
    ++loops_;
    Adopt(node.get(), Statements({"else", "endfor"}));
    --loops_;
    const bool is_else = Peek().IsName("else");
    ++pos_;
    if (is_else) {
      ExpectBlockEnd();
      Adopt(node.get(), Statements({"endfor"}));
      ++pos_;
    } else {
      Adopt(node.get(), nullptr);
    }
    ExpectBlockEnd();
    return node;
  }

  NodePtr Set() {
    NodePtr node = Make(NodeKind::kSet);
    Adopt(node.get(), Target(true));
    if (SkipOperator("=")) {
      Adopt(node.get(), Tuple(true, {}));
      ExpectBlockEnd();
      return node;
    }
    node->kind = NodeKind::kSetBlock;
    Adopt(node.get(), Peek().IsOperator("|") ? Filters(nullptr) : nullptr);
    ExpectBlockEnd();
    Adopt(node.get(), Statements({"endset"}));
    CloseBlock();
    return node;
  }

  // "(a, b=1)" if there is one, the body and its end tag.
  NodePtr Macro(std::string name, std::string_view end) {
    NodePtr node = Make(NodeKind::kMacro);
    node->text = std::move(name);
    node->kids.emplace_back();
    if (end == "endmacro" || Peek().IsOperator("(")) Parameters(node.get());
    if (end == "endmacro") Body(node.get(), "endmacro");
    return node;
  }

  void Parameters(Node* macro) {
    ExpectOperator("(");
    bool has_default = false;
    while (status_.ok() && !Peek().IsOperator(")")) {
      if (!macro->names.empty()) ExpectOperator(",");
      macro->names.push_back(ExpectName());
      if (SkipOperator("=")) {
        has_default = true;
        Adopt(macro, Expression());
      } else {
        if (has_default) Fail("a parameter without default follows one with a default");
        Adopt(macro, nullptr);
      }
    }
    ExpectOperator(")");
  }

  void Body(Node* macro, std::string_view end) {
    ExpectBlockEnd();
    const int loops = std::exchange(loops_, 0);
    const int64_t use = std::exchange(macro_use_, 0);
    NodePtr body = Statements({end});
    macro->value = Value::Int(macro_use_);
    loops_ = loops;
    macro_use_ = use;
    CloseBlock();
    if (body != nullptr) Deepen(macro, *body);
    macro->kids[0] = std::move(body);
  }

  NodePtr CallBlock() {
    NodePtr node = Make(NodeKind::kCallBlock);
    NodePtr macro = Macro("caller", "endcall");
    Adopt(node.get(), Expression());
    if (status_.ok() && node->kids[0]->kind != NodeKind::kCall) Fail("a call block needs a call");
    Body(macro.get(), "endcall");
    Adopt(node.get(), std::move(macro));
    return node;
  }

  NodePtr FilterBlock() {
    NodePtr node = Make(NodeKind::kFilterBlock);
    Adopt(node.get(), Filters(nullptr, /*inline_start=*/true));
    ExpectBlockEnd();
    Adopt(node.get(), Statements({"endfilter"}));
    CloseBlock();
    return node;
  }

  NodePtr WithBlock() {
    NodePtr node = Make(NodeKind::kWith);
    while (status_.ok() && Peek().kind != TokenKind::kBlockEnd) {
      if (!node->kids.empty()) ExpectOperator(",");
      Adopt(node.get(), Target(false));
      ExpectOperator("=");
      Adopt(node.get(), Expression());
    }
    ExpectBlockEnd();
    Adopt(node.get(), Statements({"endwith"}));
    CloseBlock();
    return node;
  }

  // What can be assigned to: a name, a tuple of such, or (with_namespace) ns.attribute.
  NodePtr Target(bool with_namespace) {
    const Level level(this);
    if (!status_.ok()) return nullptr;
    if (with_namespace && Peek().kind == TokenKind::kName && Peek(1).IsOperator(".")) {
      NodePtr name = Make(NodeKind::kName);
      name->text = Next().text;
      ++pos_;
      const int line = name->line;
      NodePtr attribute = With(NodeKind::kAttr, line, std::move(name));
      attribute->text = ExpectName();
      return attribute;
    }
    const auto one = [&]() -> NodePtr {
      if (SkipOperator("(")) {
        NodePtr inner = Target(false);
        ExpectOperator(")");
        return inner;
      }
      NodePtr name = Make(NodeKind::kName);
      name->text = ExpectName();
      for (const char* reserved : {"true", "false", "none", "True", "False", "None"}) {
        if (name->text == reserved) Fail(absl::StrCat("cannot assign to '", name->text, "'"));
      }
      return name;
    };
    NodePtr first = one();
    if (!Peek().IsOperator(",")) return first;
    NodePtr tuple = Make(NodeKind::kTuple);
    Adopt(tuple.get(), std::move(first));
    while (status_.ok() && SkipOperator(",")) {
      if (Peek().kind != TokenKind::kName && !Peek().IsOperator("(")) break;
      if (Peek().IsName("in")) break;
      Adopt(tuple.get(), one());
    }
    return tuple;
  }

  // ---- expressions, in the order of binding ----

  // An expression, or several with commas between them as a tuple. `ends`: names that end it. With `ends` not
  // empty an inline if is not part of it.
  NodePtr Tuple(bool with_condition, std::initializer_list<std::string_view> ends) {
    const auto at_end = [&] {
      const Token& t = Peek();
      return t.kind == TokenKind::kBlockEnd || t.kind == TokenKind::kPrintEnd || t.kind == TokenKind::kEnd ||
             t.IsOperator(")") ||
             (t.kind == TokenKind::kName && std::find(ends.begin(), ends.end(), t.text) != ends.end());
    };
    const auto one = [&] { return with_condition || ends.size() == 0 ? Expression() : Or(); };
    if (at_end()) {
      Fail(absl::StrCat("expected an expression, got ", Describe(Peek())));
      return nullptr;
    }
    NodePtr first = one();
    if (!Peek().IsOperator(",")) return first;
    NodePtr tuple = Make(NodeKind::kTuple);
    Adopt(tuple.get(), std::move(first));
    while (status_.ok() && SkipOperator(",")) {
      if (at_end()) break;
      Adopt(tuple.get(), one());
    }
    return tuple;
  }

  NodePtr Expression() {
    const Level level(this);
    if (!status_.ok()) return nullptr;
    NodePtr result = Or();
    while (status_.ok() && Peek().IsName("if")) {
      const int line = Next().line;
      NodePtr condition = Or();
      NodePtr otherwise = SkipName("else") ? Expression() : nullptr;
      result = With(NodeKind::kIfElse, line, std::move(condition), std::move(result), std::move(otherwise));
    }
    return result;
  }

  NodePtr Or() {
    NodePtr left = And();
    while (status_.ok() && Peek().IsName("or")) {
      const int line = Next().line;
      left = With(NodeKind::kOr, line, std::move(left), And());
    }
    return left;
  }

  NodePtr And() {
    NodePtr left = Not();
    while (status_.ok() && Peek().IsName("and")) {
      const int line = Next().line;
      left = With(NodeKind::kAnd, line, std::move(left), Not());
    }
    return left;
  }

  NodePtr Not() {
    const Level level(this);
    if (!status_.ok()) return nullptr;
    if (!Peek().IsName("not")) return Compare();
    const int line = Next().line;
    return With(NodeKind::kNot, line, Not());
  }

  NodePtr Compare() {
    NodePtr node = Sum();
    bool chain = false;  // `node` is the comparison that begins with that sum
    while (status_.ok()) {
      const Token& t = Peek();
      std::string op;
      if (t.kind == TokenKind::kOperator && (t.text == "==" || t.text == "!=" || t.text == "<" ||
                                             t.text == "<=" || t.text == ">" || t.text == ">=")) {
        op = Next().text;
      } else if (SkipName("in")) {
        op = "in";
      } else if (t.IsName("not") && Peek(1).IsName("in")) {
        pos_ += 2;
        op = "not in";
      } else {
        break;
      }
      if (!chain) node = With(NodeKind::kCompare, Peek().line, std::move(node));
      chain = true;
      node->names.push_back(op);
      Adopt(node.get(), Sum());
    }
    return node;
  }

  NodePtr Binary(NodePtr (Parser::*operand)(), std::initializer_list<std::string_view> operators) {
    NodePtr left = (this->*operand)();
    while (status_.ok() && Peek().kind == TokenKind::kOperator &&
           std::find(operators.begin(), operators.end(), Peek().text) != operators.end()) {
      const Token op = Next();
      left = With(NodeKind::kBinary, op.line, std::move(left), (this->*operand)());
      left->text = op.text;
    }
    return left;
  }

  NodePtr Sum() { return Binary(&Parser::Concat, {"+", "-"}); }

  NodePtr Concat() {
    NodePtr first = Product();
    if (!Peek().IsOperator("~")) return first;
    NodePtr node = With(NodeKind::kConcat, Peek().line, std::move(first));
    while (status_.ok() && SkipOperator("~")) Adopt(node.get(), Product());
    return node;
  }

  NodePtr Product() { return Binary(&Parser::Power, {"*", "/", "//", "%"}); }
  NodePtr Power() { return Binary(&Parser::UnaryWithFilters, {"**"}); }
  NodePtr UnaryWithFilters() { return Unary(true); }

  NodePtr Unary(bool with_filters) {
    const Level level(this);
    if (!status_.ok()) return nullptr;
    NodePtr node;
    const int line = Peek().line;
    if (SkipOperator("-")) {
      node = With(NodeKind::kNegate, line, Unary(false));
    } else if (SkipOperator("+")) {
      node = With(NodeKind::kPlus, line, Unary(false));
    } else {
      node = Primary();
    }
    node = Postfix(std::move(node));
    return with_filters ? FiltersAndTests(std::move(node)) : std::move(node);
  }

  NodePtr Constant(Value value) {
    NodePtr node = Make(NodeKind::kConst);
    node->value = std::move(value);
    return node;
  }

  NodePtr Primary() {
    const Token token = Peek();
    switch (token.kind) {
      case TokenKind::kName: {
        ++pos_;
        const std::string& name = token.text;
        if (name == "true" || name == "True") return Constant(Value::Bool(true));
        if (name == "false" || name == "False") return Constant(Value::Bool(false));
        if (name == "none" || name == "None") return Constant(Value::None());
        if (name == "varargs") macro_use_ |= kUsesVarargs;
        if (name == "kwargs") macro_use_ |= kUsesKwargs;
        if (name == "caller") macro_use_ |= kUsesCaller;
        NodePtr node = Make(NodeKind::kName);
        node->text = name;
        return node;
      }
      case TokenKind::kString: {
        std::string text;
        while (status_.ok() && Peek().kind == TokenKind::kString) text += Next().text;
        return Constant(Value::String(std::move(text)));
      }
      case TokenKind::kInteger: {
        ++pos_;
        std::string_view digits = token.text;
        int base = 10;
        if (digits.size() > 1 && digits[0] == '0' && digits[1] >= 'a') {
          base = digits[1] == 'x' ? 16 : digits[1] == 'o' ? 8 : 2;
          digits.remove_prefix(2);
        }
        int64_t value = 0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
        if (error != std::errc() || end != digits.data() + digits.size()) Fail("an integer is too large");
        return Constant(Value::Int(value));
      }
      case TokenKind::kFloat:
        ++pos_;
        return Constant(Value::Float(std::strtod(token.text.c_str(), nullptr)));
      case TokenKind::kOperator:
        break;
      default:
        Fail(absl::StrCat("expected an expression, got ", Describe(token)));
        return nullptr;
    }
    if (SkipOperator("(")) {
      if (SkipOperator(")")) return Make(NodeKind::kTuple);
      NodePtr inner = Tuple(true, {});
      ExpectOperator(")");
      return inner;
    }
    if (SkipOperator("[")) {
      NodePtr list = Make(NodeKind::kList);
      while (status_.ok() && !Peek().IsOperator("]")) {
        if (!list->kids.empty()) ExpectOperator(",");
        if (Peek().IsOperator("]")) break;
        Adopt(list.get(), Expression());
      }
      ExpectOperator("]");
      return list;
    }
    if (SkipOperator("{")) {
      NodePtr dict = Make(NodeKind::kDict);
      while (status_.ok() && !Peek().IsOperator("}")) {
        if (!dict->kids.empty()) ExpectOperator(",");
        if (Peek().IsOperator("}")) break;
        Adopt(dict.get(), Expression());
        ExpectOperator(":");
        Adopt(dict.get(), Expression());
      }
      ExpectOperator("}");
      return dict;
    }
    Fail(absl::StrCat("unexpected ", Describe(token)));
    return nullptr;
  }

  NodePtr Postfix(NodePtr node) {
    while (status_.ok()) {
      const int line = Peek().line;
      if (SkipOperator(".")) {
        if (Peek().kind == TokenKind::kInteger) {
          NodePtr index = Primary();
          node = With(NodeKind::kItem, line, std::move(node), std::move(index));
          continue;
        }
        node = With(NodeKind::kAttr, line, std::move(node));
        node->text = ExpectName();
      } else if (Peek().IsOperator("[")) {
        ++pos_;
        NodePtr index = Subscript();
        node = With(NodeKind::kItem, line, std::move(node), std::move(index));
        ExpectOperator("]");
      } else if (Peek().IsOperator("(")) {
        node = With(NodeKind::kCall, line, std::move(node));
        Arguments(node.get());
      } else {
        break;
      }
    }
    return node;
  }

  NodePtr Subscript() {
    const int line = Peek().line;
    NodePtr parts[3];
    bool slice = false;
    if (!Peek().IsOperator(":")) parts[0] = Expression();
    for (int i = 1; i < 3 && SkipOperator(":"); ++i) {
      slice = true;
      if (!Peek().IsOperator(":") && !Peek().IsOperator("]")) parts[i] = Expression();
    }
    if (!slice) return std::move(parts[0]);
    return With(NodeKind::kSlice, line, std::move(parts[0]), std::move(parts[1]), std::move(parts[2]));
  }

  // "(a, b, c=d)", appended to the kids and keywords of `call`.
  void Arguments(Node* call) {
    ExpectOperator("(");
    bool first = true;
    while (status_.ok() && !Peek().IsOperator(")")) {
      if (!first) ExpectOperator(",");
      if (Peek().IsOperator(")")) break;
      first = false;
      if ((Peek().IsOperator("*") || Peek().IsOperator("**")) && status_.ok()) {
        status_ = absl::UnimplementedError(
            absl::StrCat("template line ", Peek().line, ": *arguments are not supported in chat templates"));
        return;
      }
      if (Peek().kind == TokenKind::kName && Peek(1).IsOperator("=")) {
        std::string name = Next().text;
        ++pos_;
        NodePtr value = Expression();
        if (value != nullptr) Deepen(call, *value);
        call->keywords.emplace_back(std::move(name), std::move(value));
      } else {
        if (!call->keywords.empty()) Fail("a positional argument follows a keyword argument");
        Adopt(call, Expression());
      }
    }
    ExpectOperator(")");
  }

  // "|name(arguments)|..."; inline_start: the first one stands without its bar.
  NodePtr Filters(NodePtr node, bool inline_start = false) {
    while (status_.ok() && (inline_start || Peek().IsOperator("|"))) {
      const int line = Peek().line;
      if (!inline_start) ++pos_;
      inline_start = false;
      node = With(NodeKind::kFilter, line, std::move(node));
      node->text = DottedName();
      if (Peek().IsOperator("(")) Arguments(node.get());
    }
    return node;
  }

  std::string DottedName() {
    std::string name = ExpectName();
    while (status_.ok() && SkipOperator(".")) name += "." + ExpectName();
    return name;
  }

  NodePtr FiltersAndTests(NodePtr node) {
    while (status_.ok()) {
      if (Peek().IsOperator("|")) {
        node = Filters(std::move(node));
      } else if (Peek().IsName("is")) {
        node = Test(std::move(node));
      } else if (Peek().IsOperator("(")) {
        node = With(NodeKind::kCall, Peek().line, std::move(node));
        Arguments(node.get());
      } else {
        break;
      }
    }
    return node;
  }

  NodePtr Test(NodePtr input) {
    const int line = Next().line;
    const bool negated = SkipName("not");
    NodePtr node = With(NodeKind::kTest, line, std::move(input));
    node->text = DottedName();
    const Token& t = Peek();
    const bool argument = t.kind == TokenKind::kName || t.kind == TokenKind::kString ||
                          t.kind == TokenKind::kInteger || t.kind == TokenKind::kFloat || t.IsOperator("[") ||
                          t.IsOperator("{");
    if (t.IsOperator("(")) {
      Arguments(node.get());
    } else if (argument && !t.IsName("else") && !t.IsName("or") && !t.IsName("and")) {
      if (t.IsName("is")) Fail("tests cannot be chained with 'is'");
      Adopt(node.get(), Postfix(Primary()));
    }
    return negated ? With(NodeKind::kNot, line, std::move(node)) : std::move(node);
  }

  std::vector<Token> tokens_;
  size_t pos_ = 0;
  absl::Status status_;
  int level_ = 0;
  int loops_ = 0;
  int64_t macro_use_ = 0;  // of the macro that is being parsed
};

}  // namespace

absl::StatusOr<NodePtr> ParseTemplate(std::string_view source) {
  std::vector<Token> tokens;
  TANDEM_RETURN_IF_ERROR(Tokenize(source, &tokens));
  return Parser(std::move(tokens)).Parse();
}

}  // namespace tandem::jinja
