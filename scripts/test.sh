#!/bin/sh
# Installs what is missing, builds everything and runs all tests.
#
#   scripts/test.sh [PRESET] [CTEST ARGUMENTS...]      PRESET: release (default), debug, asan, tsan
#
# The last line is "N passed, N failed" or "N passed, N failed, N skipped", counted in test cases; a program that
# crashed, timed out or could not be run counts as one failure more. Exit code 0 only if nothing failed.
set -eu
cd "$(dirname "$0")/.."

preset=${1:-release}
[ $# -eq 0 ] || shift
scripts/install-deps.sh
cmake --preset "$preset" -DTANDEM_BUILD_TESTS=ON
cmake --build --preset "$preset"

build=build/$preset
results=$PWD/$build/test-results
rm -rf "$results"
mkdir -p "$results"
log=$results/ctest.log

# Each GoogleTest program writes one report into the folder, named after itself.
status=0
(cd "$build" && GTEST_OUTPUT="xml:$results/" ctest --output-on-failure --timeout 600 "$@" > "$log" 2>&1) || status=$?
cat "$log"

# Test cases from the reports; and from ctest's own list those programs that failed without a report that says so.
awk -v status="$status" '
  function attribute(line, name,   value) {
    if (!match(line, " " name "=\"[0-9]+\"")) return 0
    value = substr(line, RSTART, RLENGTH)
    gsub(/[^0-9]/, "", value)
    return value + 0
  }
  FILENAME ~ /\.xml$/ {
    if ($0 ~ /^<testsuites /) {
      program = FILENAME; sub(/.*\//, "", program); sub(/\.xml$/, "", program)
      sub(/_[0-9]+$/, "", program)
      total = attribute($0, "tests"); bad = attribute($0, "failures") + attribute($0, "errors")
      off = attribute($0, "disabled")
      ran += total; failed += bad; skipped += off; reported[program] = bad
    }
    if ($0 ~ /<testcase / && $0 ~ / result="skipped"/) skipped++
    next
  }
  # " 3/10 Test  #3: cli_test ....   Passed  1.2 sec", "***Failed", "***Timeout", "***Not Run", "***Exception", "***Skipped"
  /^ *[0-9]+\/[0-9]+ Test +#[0-9]+: / {
    line = $0; sub(/^ *[0-9]+\/[0-9]+ Test +#[0-9]+: /, "", line)
    split(line, words, " "); name = words[1]
    if (line ~ /\*\*\*Skipped/) { if (!(name in reported)) { ran++; skipped++ } }
    else if (line ~ /   Passed /) { if (!(name in reported)) ran++ }
    else if (!(name in reported)) { ran++; failed++ }
    else if (reported[name] == 0) { ran++; failed++ }
    programs++
  }
  END {
    if (programs == 0 || (status != 0 && failed == 0)) { ran++; failed++ }
    passed = ran - failed - skipped
    if (skipped > 0) printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
    else printf "%d passed, %d failed\n", passed, failed
    exit failed > 0
  }
' $(find "$results" -name '*.xml' | sort) "$log"
