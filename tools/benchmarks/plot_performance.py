"""Draw the plot of tools/results/README.md from the results of two benchmarks.

    python tools/benchmark.py plot_performance --pipeline tools/results/pipeline_native_cpu.json \\
        --scale tools/results/scale_cpu.json --out tools/results/performance.png

Left, from the benchmark `pipeline`: how much time each method adds to a pipeline without erasing.
Error bars are half the interquartile range to either side; DALI's own counterparts are orange.
Right, from the benchmark `scale`: the cost of a sample against the number of samples: the time of
each step, and the memory that it holds or needs at its peak.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scae_dali.methods import BUILT_IN
from tools.common import bench
from tools.common.about import read_json
from tools.common.options import existing_file, picture_file

# Name in the plot -> step of `scale`.
TIMES = {
    "plans": "plan a sample",
    "lookups": "look up a map in LMDB",
    "lookups in the copy": "look up a map in memory",
    "second pass": "write a map",
    "order of an epoch": "shuffle, once an epoch",
    "index": "index, once",
    "fingerprint": "fingerprint, once",
    "load the resident copy": "copy the maps into memory, once",
}
MEMORY = {
    "names": ("holds_bytes", "names of files"),
    "index": ("holds_bytes", "index besides the names"),
    "load the resident copy": ("holds_bytes", "maps in memory"),
    "order of an epoch": ("adds_bytes", "shuffle, at its peak"),
}


def overheads(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draws the time that each method adds, in percent of the time of `none`."""
    if "none (again)" not in rows:
        raise ValueError(
            "--pipeline must be a result of the benchmark pipeline, whose row `none (again)` shows "
            f"the noise; its rows are {', '.join(map(repr, rows))}: measure with one value for "
            "each option"
        )
    names = [name for name in BUILT_IN if name in rows and name != "none"]
    names.sort(key=lambda name: rows[name]["ratio"])
    for place, name in enumerate(names):
        for row, colour, height in ((name, "C0", 0.6), (f"native {name}", "C1", 0.25)):
            if row not in rows:
                continue
            ratio = rows[row]["ratio"]
            # The spread of a ratio r is that of 1/r times r².
            spread = 50 * rows[row]["ratio_iqr"] / ratio**2
            axes.barh(place, 100 / ratio - 100, height, color=colour, xerr=spread, capsize=2)
            if row == name:
                axes.annotate(
                    f"{100 / ratio - 100:+.0f} %",
                    (max(100 / ratio - 100 + spread, 0), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                )
    again = 100 * abs(1 / rows["none (again)"]["ratio"] - 1)
    axes.axvspan(-again, again, color="0.85", zorder=0, label="none against itself")
    axes.barh(0, 0, color="C1", label="DALI's own")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("time of the pipeline added to that of `none`, %")
    axes.set_xscale("symlog", linthresh=20)
    ticks = (-5, 0, 5, 10, 20, 50, 100, 200)
    axes.set_xticks(ticks, map(str, ticks))
    axes.margins(x=0.12)
    axes.legend(loc="upper right", fontsize="small")


def grown(axes: Axes, lines: dict[str, list[tuple[int, float]]], unit: str) -> None:
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker="os^v"[number % 4], label=name)
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel=f"{unit} a sample")
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small")


def lines_of(
    sizes: list[dict[str, Any]], steps: dict[str, str], value: Any
) -> dict[str, list[tuple[int, float]]]:
    """Name -> points (samples, value of the step); steps that were left out, or 0, have none."""
    out: dict[str, list[tuple[int, float]]] = {}
    for one in sizes:
        for step, name in steps.items():
            found = one["steps"].get(step, {})
            if "seconds" in found and (y := value(step, found, one["samples"])) > 0:
                out.setdefault(name, []).append((one["samples"], y))
    return out


def microseconds(step: str, found: dict[str, Any], samples: int) -> float:
    return 1e6 / found["per_s"] if "per_s" in found else 1e6 * found["seconds"] / samples


def held(step: str, found: dict[str, Any], samples: int) -> float:
    """Bytes per sample that a step's result holds; less than one counts as 0."""
    bytes_each = found[MEMORY[step][0]] / samples
    return bytes_each if bytes_each >= 1 else math.nan


def result_of(benchmark: str, path: Path, part: str) -> dict[str, Any]:
    """The result of a benchmark. Raises ValueError for that of another, which lacks this part."""
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get(part), list):
        raise ValueError(
            f"--{benchmark} must be a result of the benchmark {benchmark}, got {path}: make one by "
            f"benchmark.py {benchmark} --json"
        )
    return result


def main(argv: list[str] | None = None) -> None:
    parser = bench.parser_of(__doc__, __name__)
    parser.add_argument(
        "--pipeline",
        type=existing_file,
        required=True,
        metavar="JSON",
        help="result of the benchmark `pipeline`",
    )
    parser.add_argument(
        "--scale",
        type=existing_file,
        required=True,
        metavar="JSON",
        help="result of the benchmark `scale`",
    )
    parser.add_argument(
        "--out", type=picture_file, required=True, metavar="PNG", help="picture to write"
    )
    args = parser.parse_args(argv)
    pipeline = result_of("pipeline", args.pipeline, "rows")
    scale = result_of("scale", args.scale, "sizes")
    figure = Figure(figsize=(17, 5.8), layout="constrained")
    methods, times, memory = figure.subplots(1, 3)
    overheads(methods, {row["name"]: row for row in pipeline["rows"]})
    grown(times, lines_of(scale["sizes"], TIMES, microseconds), "µs")
    names = {step: name for step, (_, name) in MEMORY.items()}
    grown(memory, lines_of(scale["sizes"], names, held), "bytes")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
