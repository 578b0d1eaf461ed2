#!/bin/sh
# Makes or refreshes .venv: the pinned requirements and the built extension. Says what it does; does nothing twice.
#   PYTHON=...  the interpreter to use (default python3). If it already has a fitting torch, that torch is used.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
compiler=${CXX:-c++}
stamp=.venv/requirements.installed

fail() { echo "squish_nf4: $1" >&2; exit 1; }
if [ -t 1 ]; then quiet=; else quiet=--quiet; fi  # pip's progress bar is for people
install() { .venv/bin/python -m pip install $quiet --disable-pip-version-check "$@"; }

# What setup.py would miss too, but only after the downloads.
command -v "$python" >/dev/null || fail "the interpreter '$python' was not found; install it (Debian: apt install python3 python3-venv python3-dev) or set PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "'$python' is $("$python" --version 2>&1); Python 3.10 or newer is wanted (set PYTHON)."
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "'$python' has no venv module; install it (Debian: apt install python3-venv)."
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' || fail "'$python' has no Python.h; install the Python headers (Debian: apt install python3-dev)."
command -v "${compiler%% *}" >/dev/null || fail "the C++ compiler '$compiler' was not found; install g++ 11 or newer (Debian: apt install g++) or set CXX."

# "2.14.1 /its/site-packages" of a torch that fits, or nothing. The import alone would cost seconds.
fitting_torch() {
  "$1" -c '
import importlib.metadata, re
torch = importlib.metadata.distribution("torch")
(low, high), = re.findall(r"(?m)^TORCH = .torch>=([\d.]+),<([\d.]+)", open("setup.py").read())
number = lambda version: [int(part) for part in version.split(".")[:2]]
if number(low) <= number(torch.version) < number(high):
    print(torch.version, torch.locate_file(""))' 2>/dev/null || true
}

if [ ! -x .venv/bin/python ]; then
  own_torch=$(fitting_torch "$python")
  if [ -n "$own_torch" ]; then
    echo "== making .venv over '$python', which has torch ${own_torch%% *}"
    "$python" -m venv .venv
    # Not --system-site-packages: of an interpreter that is in a venv itself, that would see everything but its packages.
    echo "import site; site.addsitedir('${own_torch#* }')" > "$(echo .venv/lib/python3.*/site-packages)/packages_of_PYTHON.pth"
  else
    echo "== making .venv with '$python'"
    "$python" -m venv .venv
  fi
fi

wanted=$(cat requirements.txt; .venv/bin/python --version)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  torch=$(fitting_torch .venv/bin/python)
  case "$torch" in
    "" | *" $PWD/.venv/"*)
      echo "== installing torch and the pinned requirements (3 GB to fetch, 6 GB on disk; one to five minutes)"
      cp requirements.txt .venv/requirements.txt ;;
    *)
      echo "== installing the pinned requirements beside torch ${torch%% *} (0.4 GB to fetch, 1 GB on disk; about a minute)"
      grep -v '^torch==' requirements.txt > .venv/requirements.txt ;;
  esac
  install -r .venv/requirements.txt
  printf '%s\n' "$wanted" > "$stamp"
fi

echo "== building the extension (the first time a minute or two, later only what changed; log in .venv/build.log)"
started=$(date +%s)
{ .venv/bin/python setup.py build_ext --inplace 2>&1 || echo "squish_nf4: failed"; } | tee .venv/build.log |
  sed -nu -e '/^squish_nf4: failed/d; /^squish_nf4:/p' -e 's|^\(\[[0-9]*/[0-9]*\]\).* -c [^ ]*/\(csrc/[^ ]*\) -o .*|   \1 \2|p'
if [ "$(tail -n 1 .venv/build.log)" = "squish_nf4: failed" ]; then
  grep -E 'error|Error' .venv/build.log | head -n 20 >&2 || true
  fail "the build failed; all of its output is in .venv/build.log"
fi
echo "== built in $(($(date +%s) - started)) s"
if [ ! -x .venv/bin/squish-nf4 ]; then
  install --quiet --no-build-isolation --no-deps --editable .
fi
