#!/bin/sh
# isa_units_test.sh LIBRARY: the units compiled for one instruction set may define no weak symbols. A weak symbol in
# one of them (an inline function of a header) could be the copy that the linker keeps for everybody, and crash on
# machines without that instruction set.
set -eu
listing=$(nm -C --defined-only "$1")
units=$(printf '%s\n' "$listing" | grep -cE '^(.*_)?(avx|vnni|amx)[a-z0-9_]*\.cc\.o:$')
if [ "$units" -lt 4 ]; then
  echo "$1 has $units units for vector instruction sets; at least 4 were expected"
  exit 1
fi
weak=$(printf '%s\n' "$listing" | awk '
  /\.o:$/ { unit = $1; inside = (unit ~ /^(.*_)?(avx|vnni|amx)[a-z0-9_]*\.cc\.o:$/) }
  inside && NF >= 3 && $2 ~ /^[WVu]$/ { print unit, $0 }')
if [ -n "$weak" ]; then
  echo "weak symbols in units for one instruction set:"
  echo "$weak"
  exit 1
fi
