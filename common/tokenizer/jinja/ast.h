// The syntax tree of a template.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tokenizer/jinja/values.h"

namespace tandem::jinja {

enum class NodeKind : uint8_t {
  // Expressions; `kids` in brackets.
  kConst,    // value
  kName,     // text
  kList,     // [items]
  kTuple,    // [items]
  kDict,     // [key, value, key, value, ...]
  kAttr,     // [object], text
  kItem,     // [object, index]
  kSlice,    // [begin, end, step], each may be null; only as index of kItem
  kCall,     // [callee, arguments...], keywords
  kFilter,   // [input or null, arguments...], keywords, text
  kTest,     // [input, arguments...], keywords, text
  kNot,      // [a]
  kNegate,   // [a]
  kPlus,     // [a]
  kBinary,   // [a, b], text: the operator
  kConcat,   // [a, b, ...]
  kCompare,  // [a, b, c, ...], operators
  kAnd,      // [a, b]
  kOr,       // [a, b]
  kIfElse,   // [condition, then, else or null]
  // Statements.
  kBlock,        // [statements]
  kData,         // text
  kPrint,        // [expression]
  kIf,           // [condition, block, condition, block, ..., else block if the number is odd]
  kFor,          // [target, iterable, filter or null, body, else or null]
  kSet,          // [target, expression]
  kSetBlock,     // [target, filter or null, body]
  kMacro,        // text, parameters, [body, defaults...] (null where there is none)
  kCallBlock,    // [call, macro]
  kFilterBlock,  // [filter, body]
  kWith,         // [target, value, target, value, ..., body]
  kBreak,
  kContinue,
};

// Bits in the value of a kMacro: which special names its body speaks of.
enum MacroUse : int64_t { kUsesVarargs = 1, kUsesKwargs = 2, kUsesCaller = 4 };

struct Node {
  NodeKind kind;
  int line;
  int depth = 1;  // of the tree under this node
  std::string text;
  Value value;
  std::vector<std::unique_ptr<Node>> kids;
  std::vector<std::pair<std::string, std::unique_ptr<Node>>> keywords;
  std::vector<std::string> names;  // parameters of a macro, operators of a comparison

  Node(NodeKind k, int l) : kind(k), line(l) {}
};

using NodePtr = std::unique_ptr<Node>;

}  // namespace tandem::jinja
