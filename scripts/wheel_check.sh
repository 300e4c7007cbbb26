#!/usr/bin/env bash
# Build the wheel, install it in a new and empty environment as a user would, and use it there, away from this checkout.
# Installing torch anew takes a minute or two and 1.5 GB for that time; all of it is removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/wheel-check-XXXXXX")
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV  # nothing of the environment that this was started from

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$work/dist" .
VENV=$work/venv bash scripts/setup.sh "$work"/dist/cake_hf-*.whl

mkdir "$work/elsewhere"
cd "$work/elsewhere"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I "$checkout/scripts/wheel_smoke.py" "$checkout"
