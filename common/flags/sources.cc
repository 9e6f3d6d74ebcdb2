#include "common/flags/sources.h"

#include <CLI/CLI.hpp>
#include <cctype>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::flags {
namespace {

bool IsSet(const std::string& variable) {
  const char* value = std::getenv(variable.c_str());
  return value != nullptr && *value != '\0';
}

// CLI11 asks the file first and the environment for what is still missing. Without what the environment has,
// the file comes last.
class FileBelowEnvironment final : public CLI::ConfigTOML {
 public:
  explicit FileBelowEnvironment(const CLI::App* app) : app_(app) {}

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    std::string text(std::istreambuf_iterator<char>(input), {});
    constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";  // Windows editors write one
    if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
    std::istringstream rest(text);
    std::vector<CLI::ConfigItem> items = CLI::ConfigTOML::from_config(rest);
    std::erase_if(items, [this](const CLI::ConfigItem& item) {
      const CLI::Option* option = app_->get_option_no_throw("--" + item.name);
      return option != nullptr && !option->get_envname().empty() && IsSet(option->get_envname());
    });
    return items;
  }

 private:
  const CLI::App* const app_;
};

}  // namespace

std::string EnvironmentName(std::string_view flag) {
  std::string name = "TANDEM_";
  for (const char c : flag) {
    name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

void AddEnvironmentAndFile(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const std::string& name = option->get_single_name();
    if (name != "help" && name != "version") option->envname(EnvironmentName(name));
  }
  // CLI11 looks at the file before it looks at the environment, so a variable that names the file is a
  // default.
  const char* file = std::getenv(EnvironmentName("config").c_str());
  if (file == nullptr) file = "";
  app.set_config("--config", file, "File with lines \"flag = value\"; see also TANDEM_<FLAG>", *file != '\0');
  app.allow_config_extras(CLI::config_extras_mode::error);
  app.config_formatter(std::make_shared<FileBelowEnvironment>(&app));
  // Newer versions of CLI11 pass over a variable whose value is not valid as if it were not set.
  app.parse_complete_callback([&app] {
    for (const CLI::Option* option : app.get_options()) {
      const std::string& variable = option->get_envname();
      if (variable.empty() || !IsSet(variable) || option->count() > 0) continue;
      throw CLI::ValidationError(
          option->get_name(),
          "the value " + std::string(std::getenv(variable.c_str())) + " of " + variable + " is not valid");
    }
  });
}

}  // namespace tandem::flags
