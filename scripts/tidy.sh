#!/bin/sh
# Runs clang-tidy (.clang-tidy) over the sources of a build that is configured and has its generated headers.
#
#   scripts/tidy.sh [-p BUILD_FOLDER] [PATH...]     default: build/release, every source of ours; PATH: below it only
#
# Prints what is found, each once. Exit code 0 only if that is nothing. TIDY_JOBS: at a time, default one a CPU.
set -eu
cd "$(dirname "$0")/.."

build=build/release
if [ "${1:-}" = -p ]; then
  build=$2
  shift 2
fi
if ! command -v clang-tidy > /dev/null; then
  echo "tidy.sh: clang-tidy is not installed (apt-get install clang-tidy)" >&2
  exit 2
fi
if [ ! -f "$build/compile_commands.json" ]; then
  echo "tidy.sh: no $build/compile_commands.json; cmake --preset release and a build make it" >&2
  exit 2
fi

# Kernels with instruction-set flags of their own are left to the compiler: they are intrinsics in templates.
files=$(sed -n "s|^ *\"file\": \"$PWD/\(.*\.cc\)\",\{0,1\}\$|\1|p" "$build/compile_commands.json" | sort -u |
  grep -Ev '^build/|_(avx|avx2|avx512|vnni)\.cc$|/(avx2|avx512|avx512_vnni|amx)\.cc$' || true)
if [ $# -gt 0 ]; then
  files=$(for path in "$@"; do echo "$files" | grep -F "${path%/}" || true; done | sort -u)
fi
[ -n "$files" ] || { echo "tidy.sh: no source to look at" >&2; exit 2; }

found=$(mktemp)
commands=$(mktemp -d)
trap 'rm -rf "$found" "$commands"' EXIT
# Flags that only gcc knows would be errors.
sed 's/ -fno-var-tracking[a-z-]*//g; s/ -Wno-maybe-uninitialized//g' "$build/compile_commands.json" \
  > "$commands/compile_commands.json"
# A program's output in one piece: several run at a time.
echo "$files" | xargs -P "${TIDY_JOBS:-$(nproc)}" -I{} sh -c \
  'said=$(clang-tidy -p "$1" --quiet "$2" 2> /dev/null); [ -z "$said" ] || printf "%s\n" "$said"' _ "$commands" {} \
  > "$found" || true
# What the analyzer says of libraries' own headers is theirs.
awk -v root="$PWD/" '
  /^\/.*:[0-9]+:[0-9]+: (warning|error): / {
    shown = index($0, root) == 1 && !($0 in seen); seen[$0] = 1
    if (shown) count++
  }
  shown { print }
  END { printf "%d found\n", count; exit count > 0 }
' "$found"
