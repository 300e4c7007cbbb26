#!/usr/bin/env bash
# Make the virtual environment. Where there is no NVIDIA GPU, a CPU build of torch is preferred: it is a tenth of the size.
# Arguments say what to install, as pip takes it; without any it is this checkout with all that developing needs.
set -euo pipefail
python=${PYTHON:-python3}
venv=${VENV:-.venv}
cpu_torch=2.13.0
[ $# -gt 0 ] || set -- --editable '.[dev]'

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    echo "No GPU here: installing torch $cpu_torch first."
    "${pip[@]}" "torch==$cpu_torch"
fi
"${pip[@]}" "$@"
