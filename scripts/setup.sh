#!/bin/sh
# Makes or refreshes .venv: the pinned requirements and the built extension. Says what it does; does nothing twice.
#   PYTHON=...  the interpreter to use (default python3). If it already has a fitting torch, that torch is used.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/requirements.installed

fail() { echo "squish_nf4: $1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "the interpreter '$python' was not found; install it (Debian: apt install python3 python3-venv python3-dev) or set PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "'$python' is $("$python" --version); Python 3.10 or newer is wanted."
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "'$python' has no venv module; install it (Debian: apt install python3-venv)."

own_torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null || true)
case "$own_torch" in 2.13.*|2.14.*) ;; *) own_torch= ;; esac

if [ ! -x .venv/bin/python ]; then
  if [ -n "$own_torch" ]; then
    echo "== making .venv over '$python', which has torch $own_torch"
    "$python" -m venv --system-site-packages .venv
  else
    echo "== making .venv with '$python'"
    "$python" -m venv .venv
  fi
fi

wanted=$(cat requirements.txt; "$python" --version)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  if .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "== installing the pinned requirements beside torch $(.venv/bin/python -c 'import torch; print(torch.__version__)') (about 0.6 GB, a minute)"
    grep -v '^torch==' requirements.txt > .venv/requirements.txt
  else
    echo "== installing torch and the pinned requirements (about 3 GB to fetch, 6 GB on disk, one to five minutes)"
    cp requirements.txt .venv/requirements.txt
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
  printf '%s\n' "$wanted" > "$stamp"
fi

echo "== building the extension (the first time about two minutes on two cores, later only what changed)"
.venv/bin/python setup.py --quiet build_ext --inplace > .venv/build.log 2>&1 || { cat .venv/build.log >&2; fail "the build failed, see above."; }
grep '^squish_nf4:' .venv/build.log || true
if ! .venv/bin/python -m pip show --quiet squish_nf4 >/dev/null 2>&1; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
fi
