#include "common/tokenizer/jinja/template.h"

#include <utility>

#include "common/base/status_macros.h"
#include "common/tokenizer/jinja/interpreter.h"
#include "common/tokenizer/jinja/parser.h"
#include "common/tokenizer/unicode.h"
#include "nlohmann/json.hpp"

namespace tandem::jinja {

Template::Template(std::string source) : source_(std::move(source)) {}
Template::~Template() = default;

absl::StatusOr<std::unique_ptr<Template>> Template::Parse(std::string source) {
  for (size_t i = 0; i < source.size();) {
    size_t length;
    if (tokenizer::DecodeUtf8(source, i, &length) == tokenizer::kInvalidCodePoint) {
      return absl::InvalidArgumentError("the template is not UTF-8");
    }
    i += length;
  }
  std::unique_ptr<Template> made(new Template(std::move(source)));
  TANDEM_ASSIGN_OR_RETURN(made->root_, ParseTemplate(made->source_));
  return made;
}

absl::StatusOr<std::string> Template::Render(const nlohmann::ordered_json& context,
                                             const RenderLimits& limits) const {
  if (!context.is_object())
    return absl::InvalidArgumentError("the variables of a template must be an object");
  Value variables;
  if (!FromJson(context, &variables)) {
    return absl::InvalidArgumentError("the variables of the template are nested too deeply");
  }
  return Interpreter(limits).Run(*root_, variables.dict());
}

absl::StatusOr<std::string> Template::Render(const nlohmann::ordered_json& context) const {
  return Render(context, RenderLimits());
}

}  // namespace tandem::jinja
