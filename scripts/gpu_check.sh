#!/usr/bin/env bash
# All that is worth knowing about a GPU, in at most nine minutes: scripts/gpu_check.sh OUT [--wheels DIR] [--from STAGE] ...
# Needs Python 3.11 or newer with torch and transformers; what else is missing may come as wheels, which are unpacked for this run
# alone. All other options are those of `python -m benchmarks.gpu_check`. PYTHON names another interpreter.
set -euo pipefail
python=${PYTHON:-python3}
options=()
wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --wheels=*) wheels=${1#--wheels=}; shift ;;
        *) options+=("$1"); shift ;;
    esac
done
checkout=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$checkout/src:$checkout${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "There is no folder $wheels." >&2; exit 2; }
    unpacked=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check-wheels-XXXXXX")
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] || { echo "There are no wheels in $wheels." >&2; exit 2; }
        "$python" -m zipfile -e "$wheel" "$unpacked"  # no installer and no index is needed for that
    done
    export PYTHONPATH=$PYTHONPATH:$unpacked
fi
"$python" -m benchmarks.gpu_check "${options[@]}"
