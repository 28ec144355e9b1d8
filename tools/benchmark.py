"""Run a benchmark: `python tools/benchmark.py NAME [options]`. NAME --help explains the options.

Every benchmark is a module of tools/benchmarks/, whose first lines say what it measures and how.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence

from scae_dali.commands.program import run_program
from tools import ROOT

NAMES = (
    "pipeline",
    "processes",
    "operator",
    "train",
    "saliency_pass",
    "gradcam",
    "cache",
    "scale",
    "plot_performance",
)
COMPARE = "--compare"  # takes results, and measures nothing


def summary(name: str) -> str:
    """The first line of a benchmark's module, read without importing it."""
    text = (ROOT / "tools" / "benchmarks" / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print((__doc__ or "").partition("\n")[0] + "\n")
        for known in (*NAMES, COMPARE):
            print(f"{known:{max(map(len, NAMES))}}  {summary(known.removeprefix('--'))}")
        return
    if name not in (*NAMES, COMPARE):
        print(f"error: no benchmark {name!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        sys.exit(2)
    try:
        module = importlib.import_module(f"tools.benchmarks.{name.removeprefix('--')}")
        if module.main(options) and name == COMPARE:
            sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(run_program(main))
