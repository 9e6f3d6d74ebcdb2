// Jinja templates, as far as chat templates go, rendered as Hugging Face transformers does it: trim_blocks,
// lstrip_blocks, loop controls, tojson without HTML escapes, raise_exception, strftime_now. Written after the
// behaviour of Python's jinja2, which is also its test.
//
// A template comes from a model file and is not trusted: its nesting, its steps and its output are bounded.
#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace tandem::jinja {

struct RenderLimits {
  uint64_t max_output_bytes = uint64_t{256} << 20;  // of the text and of every string made on the way
  uint64_t max_steps = 50'000'000;                  // expressions and statements evaluated, items copied
  // What Python hands out as generators (map, select, ...) behaves as lists, so that `tools | map(..) |
  // tojson` works.
  bool generators_are_lists = false;
  std::time_t now = 0;  // for strftime_now; 0 = the clock
};

struct Node;

// Immutable after parsing; Render is const and thread-safe.
class Template {
 public:
  // InvalidArgument: "template line 12: ..."; Unimplemented for what jinja2 knows and this subset does not.
  static absl::StatusOr<std::unique_ptr<Template>> Parse(std::string source);

  ~Template();
  Template(const Template&) = delete;
  Template& operator=(const Template&) = delete;

  // `context`: an object, the variables of the template. InvalidArgument for every error of the template
  // (raise_exception: its message as it is), ResourceExhausted when a limit is reached.
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& context, const RenderLimits& limits) const;
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& context) const;

  const std::string& source() const { return source_; }

 private:
  explicit Template(std::string source);

  std::string source_;
  std::unique_ptr<Node> root_;
};

}  // namespace tandem::jinja
