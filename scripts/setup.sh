#!/usr/bin/env bash
# Make a virtual environment with this checkout in it, editable.
#   setup.sh VENV LOCK            exactly what a lock file says
#   setup.sh VENV --newest        the newest releases within the bounds of pyproject.toml, pre-releases of transformers included;
#                                 of torch as well
# On Linux, where there is no NVIDIA GPU, torch is its CPU build, a tenth of the size: see cpu_torch.sh.
# TORCH=2.7.1 in the environment means that release of it instead of the lock's, with all that it needs.
set -euo pipefail
venv=$1 wanted=$2
python=${PYTHON:-python3}
gpu_parts='^(nvidia-|cuda-|triton)'      # of torch, in a lock
source "$(dirname "$0")/cpu_torch.sh"
builders='^(editables|hatchling|packaging|pathspec|pluggy|setuptools|trove-classifiers)=='  # by which other packages are built

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

if [ "$wanted" = --newest ]; then
    newest_cpu_torch "${pip[@]}" || true
    "${pip[@]}" --upgrade --upgrade-strategy eager --editable '.[dev]' 'transformers>=5.0.dev0,<6'
    exit
fi

torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$wanted")
if [ -n "${TORCH:-}" ]; then
    "${pip[@]}" "torch==$TORCH"
elif ! cpu_torch "$torch" "${pip[@]}" --no-deps; then
    "${pip[@]}" --no-deps "torch==$torch"
fi
parts=$(mktemp)
trap 'rm -f "$parts" "$parts".*' EXIT
grep -v '^torch==' "$wanted" > "$parts"
installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
if [ -n "${TORCH:-}" ] || [[ $installed == *+cpu ]]; then  # it has its own, or needs none
    grep -vE "$gpu_parts" "$parts" > "$parts.rest"
    mv "$parts.rest" "$parts"
fi
grep -E "$builders" "$parts" > "$parts.builders"
"${pip[@]}" --no-deps --requirement "$parts.builders"
"${pip[@]}" --no-deps --no-build-isolation --use-pep517 --requirement "$parts"
"${pip[@]}" --no-deps --no-build-isolation --editable .
