#!/usr/bin/env bash
# Make the virtual environment; further requirements may be given as arguments.
# Where there is no NVIDIA GPU, a CPU build of torch is preferred: it is a tenth of the size.
set -euo pipefail
python=${PYTHON:-python3}
venv=${VENV:-.venv}
cpu_torch=2.13.0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    echo "No GPU here: installing torch $cpu_torch first."
    "${pip[@]}" "torch==$cpu_torch"
fi
"${pip[@]}" --editable '.[dev]' "$@"
