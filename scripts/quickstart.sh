#!/bin/sh
# From a fresh Debian 12 to an answer: installs what is missing, builds, starts the server on the demo model and
# asks it something. Then the server keeps running until Ctrl-C.
#
#   scripts/quickstart.sh [--once] [TANDEM SERVE FLAGS...]
#
#   --once    stop the server after the answer
#
# --port and --model go to the server: scripts/quickstart.sh --model /models/DeepSeek-R1-Q4_K_M
set -eu
cd "$(dirname "$0")/.."

once=no
if [ "${1:-}" = --once ]; then
  once=yes
  shift
fi
port=${TANDEM_PORT:-10002}
expect=no
for word in "$@"; do
  case "$word" in
    --port=*) port=${word#--port=} ;;
    --port) expect=yes; continue ;;
    *) [ "$expect" = no ] || port=$word ;;
  esac
  expect=no
done
if [ "$port" = 0 ]; then
  echo "$0: --port 0 would leave the port unknown here; name one" >&2
  exit 2
fi

scripts/install-deps.sh --no-tests
# The same folder as scripts/test.sh uses, so that nothing is built twice; the tests are left out here.
[ -f build/release/build.ninja ] || cmake --preset release -DTANDEM_BUILD_TESTS=OFF
cmake --build --preset release --target tandem tandem-gateway tandem-attention tandem-expert tandem_demo_model
tandem=$PWD/build/release/bin/tandem

"$tandem" serve "$@" &
server=$!
stop() {
  trap - INT TERM EXIT
  kill -TERM "$server" 2> /dev/null || true
  wait "$server" || true
}
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM
trap stop EXIT

# Until the server answers or ends. A large model may take many minutes to load; serve shows how far it is.
until "$tandem" chat --url "http://127.0.0.1:$port" --probe; do
  if ! kill -0 "$server" 2> /dev/null; then
    trap - EXIT
    code=0
    wait "$server" || code=$?
    echo "$0: the server ended, see above" >&2
    exit $((code > 0 ? code : 1))
  fi
  sleep 0.2
done

sleep 1  # lets the server say so first

question="What is 123 + 456?"
echo
echo "> $question"
"$tandem" chat --url "http://127.0.0.1:$port" --temperature 0 -p "$question"

if [ "$once" = yes ]; then
  exit 0  # the trap stops the server
fi
echo
echo "The server runs at http://127.0.0.1:$port. In another terminal:"
if [ "$port" = 10002 ]; then echo "  $tandem chat"; else echo "  $tandem chat --url http://127.0.0.1:$port"; fi
echo "Ctrl-C stops it."
code=0
wait "$server" || code=$?
trap - EXIT
exit "$code"
