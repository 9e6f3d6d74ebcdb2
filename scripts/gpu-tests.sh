#!/bin/sh
# Runs all tests that need a GPU, on a machine that has one.
#
#   scripts/gpu-tests.sh [--programs FOLDER] [--sanitize] [--bench]
#
#   --programs FOLDER  the test programs are there (cuda_*_test, cuda_benchmark); without it they are built, in
#                      build/release; ../bin beside that folder (or TANDEM_BINARY_DIR/bin) has tandem-expert
#   --sanitize         also under compute-sanitizer: memcheck on all, racecheck on those that share memory
#   --bench            also the benchmark of the kernels, last
#
# The last line of the tests is "N passed, N failed", counted in test cases; a program that crashed or that skipped
# everything counts as one failure. Exit code 0 only if nothing failed.
set -eu
cd "$(dirname "$0")/.."

programs=
sanitize=
bench=
while [ $# -gt 0 ]; do
  case $1 in
    --programs) programs=$2; shift ;;
    --sanitize) sanitize=1 ;;
    --bench) bench=1 ;;
    *) echo "unknown argument: $1" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "$programs" ]; then
  cmake --preset release -DTANDEM_BUILD_TESTS=ON -DTANDEM_BUILD_BENCHMARKS=ON -DTANDEM_CUDA=ON
  cmake --build build/release --target cuda_products_test cuda_vectors_test cuda_attention_test \
    cuda_prefill_attention_test cuda_sampler_test \
    cuda_streamed_test cuda_bell_test cuda_backend_test cuda_processes_test tandem-expert cuda_benchmark
  programs=build/release/tests
fi
export TANDEM_SOURCE_DIR="$PWD"
export TANDEM_BINARY_DIR="${TANDEM_BINARY_DIR:-$PWD/$programs/..}"  # where bin/tandem-expert is

passed=0
failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# count NAME STATUS: adds what the log says; a bad status without a failed case is a failure of its own.
count() {
  ok=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$log" | head -n 1)
  bad=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) test.*/\1/p' "$log" | head -n 1)
  ok=${ok:-0}
  bad=${bad:-0}
  if [ "$bad" -eq 0 ] && { [ "$2" -ne 0 ] || [ "$ok" -eq 0 ]; }; then bad=1; fi
  passed=$((passed + ok))
  failed=$((failed + bad))
  echo "== $1: $ok passed, $bad failed"
}

run() {
  status=0
  "$programs/$1" > "$log" 2>&1 || status=$?
  grep -v '^\[ RUN      \]' "$log" || true
  count "$1$2" "$status"
}
for name in cuda_products_test cuda_vectors_test cuda_attention_test cuda_prefill_attention_test cuda_sampler_test \
  cuda_streamed_test cuda_bell_test \
  cuda_backend_test cuda_processes_test; do
  run "$name" ''
done
# What devices without warpgroups' products run; the same once more where there are none.
export TANDEM_NO_WARPGROUPS=1
for name in cuda_products_test cuda_attention_test cuda_prefill_attention_test cuda_streamed_test cuda_backend_test; do
  run "$name" ' without warpgroups'
done
unset TANDEM_NO_WARPGROUPS

if [ -n "$sanitize" ]; then
  # Small cases: the tools are a hundred times slower.
  check() {
    tool=$1
    name=$2
    filter=$3
    status=0
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$programs/$name" --gtest_filter="$filter" > "$log" 2>&1 || status=$?
    grep -E '^=========|FAILED' "$log" | tail -n 20 || true
    count "$tool $name" "$status"
  }
  check memcheck cuda_products_test '*ShortRows:*ManyColumnsOfShortRows:*HeadsAndAccumulation:*BrokenInput*'
  check memcheck cuda_vectors_test '*RmsNorm*:*SiluMul*:*CacheEntries*:*Routes*:*Embedding*:*Fetch*'
  check memcheck cuda_attention_test '*RowsDoNotSee*:*LargeScores*'
  check memcheck cuda_prefill_attention_test '*RowsDoNotSee*'
  check memcheck cuda_bell_test '*/kernel'
  check memcheck cuda_sampler_test '*AFewRows*:*BrokenLogits*'
  check memcheck cuda_streamed_test '*OddShapes*:*SlicesAndRanges*'
  check racecheck cuda_products_test '*ManyColumnsOfShortRows:*HeadsAndAccumulation'
  check racecheck cuda_vectors_test '*CacheEntries*:*Routes*:*RmsNorm*'
  check racecheck cuda_attention_test '*RowsDoNotSee*'
  check racecheck cuda_prefill_attention_test '*RowsDoNotSee*'
  check racecheck cuda_bell_test '*OneAfterTheOther/kernel:*AddsTheAnswers*/kernel'
  check racecheck cuda_sampler_test '*AFewRows*'
  check racecheck cuda_streamed_test '*OddShapes*'
  export TANDEM_NO_WARPGROUPS=1
  for tool in memcheck racecheck; do
    check "$tool" cuda_products_test '*ManyColumnsOfShortRows:*HeadsAndAccumulation'
    check "$tool" cuda_attention_test '*RowsDoNotSee*'
    check "$tool" cuda_streamed_test '*OddShapes*'
  done
  unset TANDEM_NO_WARPGROUPS
fi

echo "$passed passed, $failed failed"

if [ -n "$bench" ]; then
  for folder in "$programs" "$programs/../benchmarks"; do
    if [ -x "$folder/cuda_benchmark" ]; then
      "$folder/cuda_benchmark"
      break
    fi
  done
fi
[ "$failed" -eq 0 ]
