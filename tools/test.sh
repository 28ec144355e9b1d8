#!/usr/bin/env bash
# Installs what is needed into .venv and runs the tests, on up to eight cores; arguments go to
# pytest. Files run in their order: xdist's own leaves some slow ones to the end.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/venv.sh
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
