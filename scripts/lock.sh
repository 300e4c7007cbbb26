#!/usr/bin/env bash
# Pin everything that a checkout is developed and tested with, for every platform and Python that is supported:
#   requirements/locked.txt   the newest of everything; `make test` installs it
#   requirements/demo.txt     of these only what the package itself needs, and what builds it; for `make demo`
#   requirements/oldest.txt   the same with the oldest transformers that is supported
#   requirements/kvpress.txt  with kvpress, which needs an older transformers, and Python 3.12 or older
# torch stays at the release given here until somebody raises it: its CPU build is to be found for it.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=2.13.0
oldest=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip --disable-pip-version-check install --quiet uv

options=(--extra dev)

lock() {  # lock NAME REQUIREMENT...: those requirements beside our own, with these options
    local name=$1; shift
    printf '%s\n' "torch==$torch" "$@" > "$tools/wanted.txt"
    "$tools/venv/bin/uv" pip compile pyproject.toml "$tools/wanted.txt" "${options[@]}" --universal --python-version 3.11 --quiet \
        --no-annotate --no-header --no-emit-index-url --output-file "$tools/$name.txt" >/dev/null
    { echo "# Made by 'make lock'; do not edit."; cat "$tools/$name.txt"; } > "requirements/$name.txt"
    echo "requirements/$name.txt: $(grep -c == "requirements/$name.txt") packages"
}

lock locked
lock oldest "transformers==$oldest.0"
lock kvpress 'kvpress==0.5.5'
options=(--constraint requirements/locked.txt)
lock demo hatchling editables
