#!/bin/sh
# Puts the peers of the benchmarks into build/peers, apart from the .venv of the tests. Does nothing twice, and fails
# nothing: the benchmarks leave out what is not there, and say so.
#   ggml is compiled for this machine (a few minutes, once), because its wheel is built for AVX2 alone.
set -eu
cd "$(dirname "$0")/.."
stamp=build/peers/requirements.installed
[ -f "$stamp" ] && cmp -s benchmarks/requirements.txt "$stamp" && exit 0

echo "== installing the peers of the benchmarks into build/peers"
export USE_OPENMP=1  # torch's threads, so that no library's waiting threads disturb the others
rm -rf build/peers
if .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/peers \
    --no-binary libggml-python --config-settings cmake.define.GGML_NATIVE=ON -r benchmarks/requirements.txt; then
  cp benchmarks/requirements.txt "$stamp"
else
  echo "== not all peers could be installed: the benchmarks go on without them" >&2
fi
