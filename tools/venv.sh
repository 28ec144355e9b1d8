#!/usr/bin/env bash
# Makes .venv in the checkout, with the package and all that its tests need; PYTHON names another
# interpreter. Does nothing where that is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' || {
  echo "tools/venv.sh needs Python 3.10 to 3.14, $python is $("$python" --version); set PYTHON" >&2
  exit 1
}
wanted=$(cat setup.cfg pyproject.toml scae_dali/__init__.py | cksum)  # the last has the version
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  # Python compiles what it imports. All that is installed would take it half a minute.
  .venv/bin/python -m pip install --quiet --no-compile --editable '.[cuda12,test]'
  echo "$wanted" > .venv/installed
fi
