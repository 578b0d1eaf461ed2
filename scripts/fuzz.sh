#!/bin/sh
# Fuzzes the readers of squish directories, guided by coverage: scripts/fuzz.sh [options of python -m tests.fuzzing].
# Puts atheris into build/fuzz/atheris first, apart from the .venv of the tests; it has wheels for Linux and Python 3.11 to 3.13.
set -eu
cd "$(dirname "$0")/.."
packages=build/fuzz/atheris
stamp=$packages/requirements.installed
if ! cmp -s tests/fuzzing/requirements.txt "$stamp"; then
  echo "== installing atheris into $packages"
  rm -rf "$packages"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --target "$packages" \
    -r tests/fuzzing/requirements.txt
  cp tests/fuzzing/requirements.txt "$stamp"
fi
PYTHONPATH=$packages exec .venv/bin/python -m tests.fuzzing "$@"
