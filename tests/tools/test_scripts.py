"""Every command starts as a script: alone, with warnings as errors."""

import ast
import json
import subprocess
import sys

import pytest
from conftest import TOOLS

SCRIPTS = sorted(path.name for path in TOOLS.glob("*.py") if path.name != "__init__.py")
# One process for all, since importing takes longer than all else.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for path in sys.argv[1:]:
    sys.argv, said = [path, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
    found[path] = [status or 0, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helped():
    """{name: (status, what it printed)} of every script with --help."""
    strict = ["-W", "error", "-W", "ignore::DeprecationWarning:gast.astn"]
    paths = [str(TOOLS / name) for name in SCRIPTS]
    done = subprocess.run(
        [sys.executable, *strict, "-c", HELP, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: found[path] for name, path in zip(SCRIPTS, paths, strict=True)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_tells_what_it_does(helped, name):
    status, said = helped[name]
    assert status == 0
    summary = ast.get_docstring(ast.parse((TOOLS / name).read_text())).partition("\n")[0]
    assert " ".join(summary.split()[:4]) in " ".join(said.split())
