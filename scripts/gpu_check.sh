#!/usr/bin/env bash
# All that is worth knowing about a GPU, in at most nine minutes: scripts/gpu_check.sh OUT [--from STAGE] [--wheels DIR] ...
# Needs Python 3.11 or newer with torch and transformers; other packages that are missing may come as wheels, which are unpacked
# for this run alone. PYTHON names another interpreter. See `--help`.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$checkout/src:$checkout${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
