#include "cli/flags/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <ostream>
#include <set>

#include "cli/flags/config_file.h"
#include "cli/util/nearest.h"
#include "common/flags/sources.h"

namespace tandem::cli {
namespace {

bool IsTruthWord(const std::string& word) {
  std::string lower = word;
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  static const std::set<std::string> kWords = {"true", "false", "1", "0", "on", "off", "yes", "no"};
  return kWords.contains(lower);
}

}  // namespace

struct Command::Impl {
  struct Flag {
    std::string name;                  // the canonical one
    std::vector<std::string> spelled;  // all names, without dashes
    bool is_switch = false;
    bool ignored = false;
    bool from_environment = true;
  };
  std::string name;
  CLI::App* app = nullptr;
  std::vector<Flag> flags;

  const Flag* Find(const std::string& spelled) const {
    for (const Flag& flag : flags) {
      if (std::find(flag.spelled.begin(), flag.spelled.end(), spelled) != flag.spelled.end()) return &flag;
    }
    return nullptr;
  }
  Flag& Remember(const std::string& flag, const std::vector<std::string>& aliases) {
    std::vector<std::string> spelled = aliases;
    spelled.insert(spelled.begin(), flag);
    flags.push_back({.name = flag, .spelled = spelled});
    return flags.back();
  }
  // Aliases are folded to the canonical name before CLI11 sees them, so help shows one spelling.
  template <typename T>
  CLI::Option* Value(const std::string& flag, T* value, const std::string& help,
                     const std::vector<std::string>& aliases) {
    Remember(flag, aliases);
    return app->add_option("--" + flag, *value, help)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
};

Command::Command(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Command::~Command() = default;
const std::string& Command::name() const { return impl_->name; }

Command& Command::Text(const std::string& name, std::string* value, const std::string& help,
                       const Names& aliases) {
  impl_->Value(name, value, help, aliases)->type_name("TEXT");
  return *this;
}

Command& Command::Texts(const std::string& name, std::vector<std::string>* values, const std::string& help,
                        const Names& aliases) {
  impl_->Value(name, values, help, aliases)
      ->multi_option_policy(CLI::MultiOptionPolicy::Throw)
      ->expected(1)
      ->take_all()
      ->type_name("TEXT ...");
  return *this;
}

Command& Command::Choice(const std::string& name, std::string* value, const std::vector<std::string>& choices,
                         const std::string& help) {
  impl_->Value(name, value, help, {})->check(CLI::IsMember(choices))->capture_default_str();
  return *this;
}

Command& Command::Integer(const std::string& name, int64_t* value, int64_t min, int64_t max,
                          const std::string& help, const Names& aliases) {
  const auto in_range = [min, max](const std::string& text) -> std::string {
    int64_t number = 0;
    const std::string range = " from " + std::to_string(min) + " to " + std::to_string(max);
    if (!CLI::detail::lexical_cast(text, number)) return "\"" + text + "\" is not a whole number" + range;
    return number >= min && number <= max ? "" : text + " is not in the range" + range;
  };
  impl_->Value(name, value, help, aliases)->check(CLI::Validator(in_range, ""))->type_name("N");
  return *this;
}

Command& Command::Check(const std::string& name, std::function<std::string(const std::string&)> check) {
  impl_->app->get_option("--" + name)->check(CLI::Validator(std::move(check), ""));
  return *this;
}

Command& Command::Number(const std::string& name, double* value, double min, double max,
                         const std::string& help, const Names& aliases) {
  // The comparison is false for NaN, which CLI::Range lets pass.
  const auto in_range = [min, max](const std::string& text) -> std::string {
    double number = 0;
    if (CLI::detail::lexical_cast(text, number) && number >= min && number <= max) return "";
    return "\"" + text + "\" is not a number from " + CLI::detail::to_string(min) + " to " +
           CLI::detail::to_string(max);
  };
  impl_->Value(name, value, help, aliases)->check(CLI::Validator(in_range, ""))->type_name("X");
  return *this;
}

Command& Command::Switch(const std::string& name, bool* value, const std::string& help,
                         const Names& aliases) {
  impl_->Remember(name, aliases).is_switch = true;
  impl_->app->add_flag("--" + name, *value, help)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  return *this;
}

Command& Command::Short(const std::string& name, char letter) {
  for (Impl::Flag& flag : impl_->flags) {
    if (flag.name == name) flag.spelled.push_back(std::string(1, letter));
  }
  return *this;
}

Command& Command::NotFromEnvironment(const std::string& name) {
  for (Impl::Flag& flag : impl_->flags) {
    if (flag.name == name) flag.from_environment = false;
  }
  return *this;
}

Command& Command::Positional(const std::string& name, std::string* value, const std::string& help) {
  impl_->app->add_option(name, *value, help)->required()->type_name("");
  return *this;
}

Command& Command::Ignored(const std::string& name) {
  impl_->Remember(name, {}).ignored = true;
  return *this;
}

struct CommandLine::Impl {
  CLI::App app;
  std::string version;
  std::vector<std::unique_ptr<Command>> commands;
  std::string config;

  explicit Impl(const std::string& summary) : app(summary, "tandem") {}

  std::vector<std::string> CommandNames() const {
    std::vector<std::string> names;
    for (const auto& command : commands) names.push_back(command->name());
    return names;
  }
};

namespace {

// An error for the user: which command, what is wrong, what may have been meant.
int Fail(std::ostream& err, const std::string& where, const std::string& what, const std::string& nearest) {
  err << where << ": " << what;
  if (!nearest.empty()) err << "; did you mean " << nearest << "?";
  err << " (" << where << " --help lists what there is)\n";
  return 2;
}

}  // namespace

CommandLine::CommandLine(const std::string& summary, const std::string& version)
    : impl_(std::make_unique<Impl>(summary)) {
  impl_->version = version;
  impl_->app.set_help_flag("-h,--help", "Show this help");
  impl_->app.set_version_flag("--version", "tandem " + version, "Show the version");
  impl_->app.footer(
      "`tandem COMMAND --help` shows a command's flags. Each of them can also be set as TANDEM_<FLAG> in "
      "the\n"
      "environment and in the file of --config.");
}
CommandLine::~CommandLine() = default;

Command& CommandLine::Add(const std::string& name, const std::string& summary) {
  auto impl = std::make_unique<Command::Impl>();
  impl->name = name;
  impl->app = impl_->app.add_subcommand(name, summary);
  impl->app->set_help_flag("-h,--help", "Show this help");
  impl_->commands.push_back(std::unique_ptr<Command>(new Command(std::move(impl))));
  Command& command = *impl_->commands.back();
  command.Text("config", &impl_->config, "File with lines \"flag = value\"; see also TANDEM_<FLAG>");
  return command;
}

std::optional<int> CommandLine::Parse(const std::vector<std::string>& args, const Environment& environment,
                                      std::ostream& out, std::ostream& err) {
  CLI::App& app = impl_->app;
  if (args.empty()) {
    out << app.help();
    return 2;
  }
  if (args[0] == "-h" || args[0] == "--help" || args[0] == "help") {
    out << app.help();
    return 0;
  }
  if (args[0] == "--version" || args[0] == "version") {
    out << "tandem " << impl_->version << "\n";
    return 0;
  }
  Command* command = nullptr;
  for (const auto& candidate : impl_->commands) {
    if (candidate->name() == args[0]) command = candidate.get();
  }
  if (command == nullptr) {
    if (args[0].starts_with("-")) {
      return Fail(err, "tandem", "unknown flag " + args[0] + " in front of the command",
                  Nearest(args[0], {"--help", "--version"}));
    }
    return Fail(err, "tandem", "unknown command \"" + args[0] + "\"",
                Nearest(args[0], impl_->CommandNames()));
  }
  command_ = command->name();
  const std::string where = "tandem " + command_;
  const auto& flags = command->impl_->flags;
  std::vector<std::string> flag_names;
  for (const auto& flag : flags) {
    for (const std::string& spelled : flag.spelled) {
      if (spelled.size() > 1 && !flag.ignored) flag_names.push_back("--" + spelled);
    }
  }
  flag_names.push_back("--help");

  // A value is a word of its own, so that it may be empty or begin with a dash; a switch's is joined to it.
  const auto append = [](std::vector<std::string>& list, const Command::Impl::Flag& flag,
                         const std::string& value) {
    list.push_back(flag.is_switch ? "--" + flag.name + "=" + value : "--" + flag.name);
    if (!flag.is_switch) list.push_back(value);
  };

  // The user's own words: aliases and underscores folded, values joined to their flags.
  std::vector<std::string> own;
  std::set<std::string> given;
  std::string config;
  bool only_positionals = false;
  for (size_t i = 1; i < args.size(); ++i) {
    const std::string& word = args[i];
    if (word == "--" || only_positionals) {
      only_positionals = true;
      own.push_back(word);
      continue;
    }
    if (word == "-h" || word == "--help") {
      out << command->impl_->app->help("tandem");
      return 0;
    }
    if (word.size() < 2 || word[0] != '-') {
      own.push_back(word);
      continue;
    }
    const size_t equals = word.find('=');
    std::string name = word.substr(0, equals);
    name.erase(0, name.starts_with("--") ? 2 : 1);
    std::replace(name.begin(), name.end(), '_', '-');
    const Command::Impl::Flag* flag = command->impl_->Find(name);
    if (flag == nullptr && name.starts_with("no-") && equals == std::string::npos) {
      const Command::Impl::Flag* opposite = command->impl_->Find(name.substr(3));
      if (opposite != nullptr && opposite->is_switch) {
        given.insert(opposite->name);
        append(own, *opposite, "false");
        continue;
      }
    }
    if (flag == nullptr || (name.size() == 1 && word.starts_with("--"))) {
      return Fail(err, where, "unknown flag " + word.substr(0, equals), Nearest(name, flag_names));
    }
    std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (equals == std::string::npos) {
      const bool has_next = i + 1 < args.size();
      // Whether another program's flag has a value is not known here: a word that is no flag is taken for
      // one.
      const bool takes_next = flag->ignored     ? has_next && !args[i + 1].starts_with("-")
                              : flag->is_switch ? has_next && IsTruthWord(args[i + 1])
                                                : has_next;
      if (!flag->is_switch && !flag->ignored && !takes_next)
        return Fail(err, where, "--" + flag->name + " wants a value", "");
      value = takes_next ? args[++i] : "true";
    }
    if (flag->ignored) {
      ignored_.push_back("--" + name);
      continue;
    }
    if (flag->is_switch && !IsTruthWord(value)) {
      return Fail(err, where, "--" + flag->name + " is true or false, not \"" + value + "\"", "");
    }
    given.insert(flag->name);
    if (flag->name == "config") config = value;
    append(own, *flag, value);
  }

  // What the environment says where the user does not, and what the file says where neither does.
  std::map<std::string, std::string> sources;  // flag -> where its value comes from
  std::vector<std::string> words;
  for (const auto& flag : flags) {
    const std::string variable = flags::EnvironmentName(flag.name);
    const bool wanted = flag.from_environment && !flag.ignored && !given.contains(flag.name);
    const char* value = wanted ? environment(variable.c_str()) : nullptr;
    if (value == nullptr || *value == '\0') continue;
    if (flag.name == "config") config = value;
    append(words, flag, value);
    sources[flag.name] = variable;
  }
  if (!config.empty()) {
    const auto entries = ReadConfigFile(config);
    if (!entries.ok()) return Fail(err, where, std::string(entries.status().message()), "");
    for (const ConfigEntry& entry : *entries) {
      const std::string place = config + ":" + std::to_string(entry.line);
      if (!entry.section.empty() && entry.section != command_) {
        const auto names = impl_->CommandNames();
        if (std::find(names.begin(), names.end(), entry.section) != names.end()) continue;
        return Fail(err, where, place + ": unknown section [" + entry.section + "]",
                    Nearest(entry.section, names));
      }
      const Command::Impl::Flag* flag = command->impl_->Find(entry.key);
      if (flag == nullptr && entry.section.empty()) {  // perhaps another command's
        const bool known =
            std::any_of(impl_->commands.begin(), impl_->commands.end(),
                        [&](const auto& other) { return other->impl_->Find(entry.key) != nullptr; });
        if (known) continue;
      }
      if (flag == nullptr || flag->name == "config") {
        return Fail(err, where, place + ": unknown flag " + entry.key, Nearest(entry.key, flag_names));
      }
      const bool from_file = sources.contains(flag->name) && sources[flag->name].starts_with(config + ":");
      if (flag->ignored || given.contains(flag->name) || (sources.contains(flag->name) && !from_file))
        continue;
      append(words, *flag, entry.value);
      sources[flag->name] = place;
    }
  }

  words.insert(words.end(), own.begin(), own.end());
  words.insert(words.begin(), command_);
  std::reverse(words.begin(), words.end());  // as CLI11 wants a vector
  try {
    app.parse(std::move(words));
  } catch (const CLI::ParseError& error) {
    std::string what = error.what();
    for (const auto& [flag, source] : sources) {
      if (what.find("--" + flag + ":") != std::string::npos) what += " (set by " + source + ")";
    }
    return Fail(err, where, what, "");
  }
  return std::nullopt;
}

}  // namespace tandem::cli
