#!/bin/sh
# Installs the Debian packages that Tandem needs to build and to run its tests. Does nothing where they are there.
#
#   scripts/install-deps.sh [--no-tests]
#
# Needs root or sudo only if something is missing.
set -eu

PACKAGES="build-essential cmake ninja-build pkg-config
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  libhwloc-dev libspdlog-dev libcli11-dev nlohmann-json3-dev prometheus-cpp-dev
  libboost-dev libicu-dev libpcre2-dev"
TEST_PACKAGES="libgtest-dev libgmock-dev prometheus python3 python3-jinja2 curl"

case "${1:-}" in
  "") PACKAGES="$PACKAGES $TEST_PACKAGES" ;;
  --no-tests) ;;
  *) echo "usage: $0 [--no-tests]" >&2; exit 2 ;;
esac

if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
  echo "$0: this is no Debian; install the equivalents of: $PACKAGES" >&2
  exit 1
fi

missing=""
for package in $PACKAGES; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
  [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=""
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo > /dev/null; then
    echo "$0: missing:$missing. Run this as root, or install sudo." >&2
    exit 1
  fi
  as_root="sudo"
fi
echo "Installing:$missing"
$as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q < /dev/null
# shellcheck disable=SC2086  # words on purpose
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing < /dev/null
