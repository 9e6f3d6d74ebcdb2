// The command line: commands with flags. Each flag can also be given as TANDEM_<FLAG> in the environment and
// in the file of --config (or TANDEM_CONFIG): the command line beats the environment, the environment beats
// the file. Underscores in flags count as dashes. Built on CLI11, which stays out of this header.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::cli {

// One command's flags. Values keep their defaults unless given. Names without dashes in front; `aliases` are
// other spellings, which help does not list.
class Command {
 public:
  using Names = std::vector<std::string>;

  Command& Text(const std::string& name, std::string* value, const std::string& help,
                const Names& aliases = {});
  Command& Texts(const std::string& name, std::vector<std::string>* values, const std::string& help,
                 const Names& aliases = {});
  Command& Choice(const std::string& name, std::string* value, const std::vector<std::string>& choices,
                  const std::string& help);
  Command& Integer(const std::string& name, int64_t* value, int64_t min, int64_t max, const std::string& help,
                   const Names& aliases = {});
  Command& Number(const std::string& name, double* value, double min, double max, const std::string& help,
                  const Names& aliases = {});
  // `check` is given the value of that flag and says what is wrong with it; empty: nothing.
  Command& Check(const std::string& name, std::function<std::string(const std::string&)> check);
  // --flag, --no-flag, --flag=false, --flag True.
  Command& Switch(const std::string& name, bool* value, const std::string& help, const Names& aliases = {});
  // A one-letter spelling of a flag that takes a value: Short("prompt", 'p').
  Command& Short(const std::string& name, char letter);
  Command& Positional(const std::string& name, std::string* value, const std::string& help);
  // The flag is not looked up in the environment.
  Command& NotFromEnvironment(const std::string& name);
  // Spellings of another program's flags, taken with a value and reported by CommandLine::ignored().
  Command& Ignored(const std::string& name);

  const std::string& name() const;

 private:
  friend class CommandLine;
  struct Impl;
  explicit Command(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;

 public:
  ~Command();
};

class CommandLine {
 public:
  using Environment = std::function<const char*(const char*)>;  // as getenv

  CommandLine(const std::string& summary, const std::string& version);
  ~CommandLine();

  Command& Add(const std::string& name, const std::string& summary);

  // `args` without the program's name. nullopt: go on with command(). Otherwise the exit code: 0 after help
  // or the version (on `out`), 2 after an error (on `err`), which names the flag and the nearest one that
  // exists.
  std::optional<int> Parse(const std::vector<std::string>& args, const Environment& environment,
                           std::ostream& out, std::ostream& err);

  const std::string& command() const { return command_; }  // after a Parse that returned nullopt
  const std::vector<std::string>& ignored() const {
    return ignored_;
  }  // flags given that have no meaning here

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string command_;
  std::vector<std::string> ignored_;
};

}  // namespace tandem::cli
