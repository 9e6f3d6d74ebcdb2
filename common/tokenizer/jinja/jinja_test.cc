#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "common/tokenizer/jinja/template.h"
#include "common/tokenizer/test_util.h"
#include "nlohmann/json.hpp"

namespace tandem::jinja {
namespace {

using Json = nlohmann::ordered_json;
using tokenizer::ReadFile;
using tokenizer::SharedPath;
using tokenizer::SourcePath;

absl::StatusOr<std::string> Render(const std::string& source, const Json& context = Json::object(),
                                   const RenderLimits& limits = RenderLimits()) {
  auto made = Template::Parse(source);
  if (!made.ok()) return made.status();
  return (*made)->Render(context, limits);
}

// Same text, or an error on both sides.
void ExpectAsPython(const Json& row) {
  const auto source = row["template"].get<std::string>();
  const auto ours = Render(source, row["context"]);
  if (row.contains("error")) {
    EXPECT_FALSE(ours.ok()) << source << "\nPython: " << row["error"] << "\nours: " << *ours;
    return;
  }
  ASSERT_TRUE(ours.ok()) << ours.status() << "\n" << source << "\nPython: " << row["text"];
  EXPECT_EQ(*ours, row["text"].get<std::string>()) << source << "\n" << row["context"].dump().substr(0, 2000);
}

// What Python's jinja2 made of these (tests/conformance/jinja_oracle.py snippets).
TEST(Jinja, GoldenSnippets) {
  const auto rows = Json::parse(ReadFile(SourcePath("common/tokenizer/jinja/testdata/golden_snippets.json")));
  ASSERT_GE(rows.size(), 170u);
  for (const Json& row : rows) ExpectAsPython(row);
}

// Runs the oracle; false if this machine has no Python with jinja2.
bool RunOracle(const std::string& arguments, std::string* out) {
  if (std::system("python3 -c 'import jinja2' 2>/dev/null") != 0) return false;
  const std::string command =
      "python3 '" + SourcePath("tests/conformance/jinja_oracle.py") + "' " + arguments;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return false;
  char buffer[65536];
  size_t n;
  while ((n = fread(buffer, 1, sizeof(buffer), pipe)) > 0) out->append(buffer, n);
  return pclose(pipe) == 0;
}

TEST(Jinja, GoldenSnippetsAreStillWhatPythonSays) {
  const std::string path = SourcePath("common/tokenizer/jinja/testdata/golden_snippets.json");
  std::string out;
  if (!RunOracle("snippets '" + path + "'", &out)) GTEST_SKIP() << "python3 with jinja2 is not here";
  for (const Json& row : Json::parse(out)) ExpectAsPython(row);
}

TEST(Jinja, RandomConversationsAsPython) {
  const auto folder = SharedPath("templates");
  if (!folder) GTEST_SKIP() << "../shared/templates is not here (TANDEM_SHARED)";
  const char* count = std::getenv("TANDEM_JINJA_CONVERSATIONS");
  const char* seed = std::getenv("TANDEM_JINJA_SEED");
  std::string arguments = std::string("conversations ") + (count ? count : "150") + " " + (seed ? seed : "1");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(*folder)) {
    arguments += " '" + entry.path().string() + "'";
    ++files;
  }
  ASSERT_GE(files, 5u);
  std::string out;
  if (!RunOracle(arguments, &out)) GTEST_SKIP() << "python3 with jinja2 is not here";
  const auto rows = Json::parse(out);
  size_t texts = 0;
  for (const Json& row : rows) {
    ExpectAsPython(row);
    texts += row.contains("text");
    if (HasFailure()) return;  // one is enough to look at
  }
  EXPECT_GT(texts, rows.size() / 3);
}

TEST(Jinja, ErrorsNameTheLine) {
  const auto expect = [](const std::string& source, const std::string& words) {
    const auto result = Render(source);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << source;
    EXPECT_NE(std::string(result.status().message()).find(words), std::string::npos) << result.status();
  };
  expect("a\nb\n{{ 1 / 0 }}", "line 3");
  expect("a\n{% if x %}", "line 2");
  expect("{% if x %}\n{% endfor %}", "endfor");
  expect("\n{{ nothing.at.all }}", "line 2: 'nothing' is undefined");
  EXPECT_EQ(Render("{{ raise_exception('just this') }}").status().message(), "just this");
  EXPECT_EQ(Render("{% include 'x' %}").status().code(), absl::StatusCode::kUnimplemented);
}

TEST(Jinja, StrftimeNow) {
  RenderLimits limits;
  limits.now = 1737331200 + 12 * 3600;  // 2025-01-20, noon UTC
  EXPECT_EQ(*Render("{{ strftime_now('%Y') }}", Json::object(), limits), "2025");
  EXPECT_EQ(*Render("[{{ strftime_now('') }}]", Json::object(), limits), "[]");
}

TEST(Jinja, GeneratorsAreListsWhereAsked) {
  RenderLimits limits;
  const std::string source = "{{ [{'a': 1}] | map(attribute='a') | tojson }}";
  EXPECT_FALSE(Render(source, Json::object(), limits).ok());
  limits.generators_are_lists = true;
  EXPECT_EQ(*Render(source, Json::object(), limits), "[1]");
}

TEST(Jinja, HostileTemplatesAreStopped) {
  RenderLimits limits;
  limits.max_output_bytes = 1 << 20;
  limits.max_steps = 1'000'000;
  const auto repeat = [](const std::string& what, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += what;
    return out;
  };
  const std::vector<std::string> hostile = {
      "{{ 'x' * 99999999999 }}",
      "{{ [0] * 99999999999 }}",
      "{{ 'x' * 9223372036854775807 * 9 }}",
      "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
      "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
      "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('', ns.x) %}{% "
      "endfor %}",
      "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}",
      repeat("{{ ", 1) + repeat("(", 5000) + "1" + repeat(")", 5000) + " }}",
      "{{ " + repeat("not ", 5000) + "1 }}",
      "{{ " + repeat("-", 5000) + "1 }}",
      "{{ 1" + repeat(" + 1", 5000) + " }}",
      "{{ a" + repeat(".b", 5000) + " }}",
      "{{ a" + repeat("[0]", 5000) + " }}",
      "{{ 1" + repeat("|abs", 5000) + " }}",
      repeat("{% if 1 %}", 5000) + repeat("{% endif %}", 5000),
      "{% set " + repeat("(", 5000) + "a" + repeat(")", 5000) + " = 1 %}",
      "{{ 9223372036854775807 + 1 }}",
      "{{ 2 ** 9223372036854775807 }}",
  };
  for (const std::string& source : hostile)
    EXPECT_FALSE(Render(source, Json::object(), limits).ok()) << source.substr(0, 80);
  // Circles of references: legal, and freed (the leak checker looks at it).
  EXPECT_TRUE(
      Render("{% set ns = namespace() %}{% set ns.x = [ns] %}{% macro m() %}{{ ns }}{% endmacro %}"
             "{% for i in [1, 2] %}{% macro q() %}{{ loop.index }}{% endmacro %}{{ q() }}{% endfor %}")
          .ok());
  Json deep = "x";
  for (int i = 0; i < 5000; ++i) deep = Json::array({std::move(deep)});
  EXPECT_FALSE(Render("{{ x }}", Json{{"x", deep}}).ok());
}

// Cuts, doubles, swaps and overwrites pieces of real templates: every result is a text or an error.
TEST(Jinja, MutatedTemplatesSurvive) {
  const auto rows = Json::parse(ReadFile(SourcePath("common/tokenizer/jinja/testdata/golden_snippets.json")));
  std::vector<std::string> seeds;
  for (const Json& row : rows) seeds.push_back(row["template"].get<std::string>());
  const std::vector<std::string> parts = {"{%",         "%}",
                                          "{{",         "}}",
                                          "-",          "|",
                                          "(",          ")",
                                          "[",          "]",
                                          "'",          "{#",
                                          " if ",       " for ",
                                          "loop",       "1",
                                          ".",          " is ",
                                          "not ",       "~",
                                          "\\",         "é",
                                          "\n",         "{% endif %}",
                                          "{% else %}", "99999999999999999999"};
  const Json context = rows[0]["context"];
  RenderLimits limits;
  limits.max_steps = 200'000;
  limits.max_output_bytes = 1 << 16;
  std::mt19937 random(42);
  size_t good = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string source = seeds[random() % seeds.size()];
    for (unsigned n = 1 + random() % 4; n > 0; --n) {
      const size_t at = random() % (source.size() + 1);
      switch (random() % 4) {
        case 0:
          source.insert(at, parts[random() % parts.size()]);
          break;
        case 1:
          source.erase(at, random() % 6);
          break;
        case 2:
          source.insert(at, seeds[random() % seeds.size()].substr(0, random() % 40));
          break;
        default:
          if (at < source.size()) source[at] = static_cast<char>(random() % 128);
      }
    }
    good += Render(source, context, limits).ok();
  }
  EXPECT_GT(good, 1000u);
  EXPECT_LT(good, 19000u);
}

}  // namespace
}  // namespace tandem::jinja
