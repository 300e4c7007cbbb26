#!/usr/bin/env bash
# Build the wheel, install it in a new and empty environment as a user would, and use it there, away from this checkout.
# Nothing is pinned here: it is what somebody who installs the package today gets. Only torch is the lock's where its CPU build
# can be had (see cpu_torch.sh), as it is a tenth of the size. Takes a minute or two and 1.5 GB; all of it is removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/wheel-check-XXXXXX")
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV  # nothing of the environment that this was started from

"${PYTHON:-python3}" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
source scripts/cpu_torch.sh
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements/locked.txt)
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$work/dist" .
cpu_torch "$torch" "${pip[@]}" install --quiet || true
"${pip[@]}" install --quiet "$work"/dist/cake_hf-*.whl

mkdir "$work/elsewhere"
cd "$work/elsewhere"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I "$checkout/scripts/wheel_smoke.py" "$checkout"
