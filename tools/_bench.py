"""What the benchmarks share: options, interleaved rounds, their statistics, what they ran on.

Candidates take turns within a round, in another order each time, so that a machine that slows down
slows all of them and none runs always after the same one. Ratios are formed within a round before
the median is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from _options import count

import _path

__all__ = [
    "about",
    "draw",
    "hardware",
    "interleaved",
    "iqr",
    "parse",
    "report",
    "rows",
    "run",
    "settings",
    "versions",
    "write_json",
]

PACKAGES = {
    "numpy": ("numpy",),
    "lmdb": ("lmdb",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110"),
}


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    rounds: int,
    quick: Mapping[str, Any],
) -> argparse.Namespace:
    """The arguments, with those that every benchmark has: --rounds, --quick, --json, --plot.

    rounds: the default. quick: what --quick sets, by name, for a run of a minute, unless it is
    given.
    """
    sets = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
    parser.add_argument("--rounds", type=count, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--quick", action="store_true", help=f"for a look: {sets}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the ratios there")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    return args


def run(main: Callable[[], object]) -> None:
    """main(); what its user can mend is told in a line."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options, but for where the data lies and the result goes."""
    return {key: value for key, value in vars(args).items() if key not in ("data", "json", "plot")}


def interleaved(
    candidates: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs every candidate once a round; each returns its rate -> rates [rounds] by name.

    Their order is drawn anew for every round, the same for every run of a benchmark. Warm-up rounds
    are not counted.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warmup, rounds):
        for name in order.sample(list(candidates), len(candidates)):
            rate = candidates[name]()
            if number >= 0:
                samples[name].append(rate)
    return samples


def iqr(values: Sequence[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def rows(samples: Mapping[str, Sequence[float]], baseline: str) -> list[dict[str, Any]]:
    """Each candidate's rates, their median and spread, and those of its ratios to `baseline`."""
    if baseline not in samples:
        raise ValueError(f"baseline must be one of {sorted(samples)}, got {baseline!r}")
    table = []
    for name, rates in samples.items():
        ratios = [rate / base for rate, base in zip(rates, samples[baseline], strict=True)]
        table.append(
            {
                "name": name,
                "img_per_s": statistics.median(rates),
                "iqr": iqr(rates),
                "ratio": statistics.median(ratios),
                "ratio_iqr": iqr(ratios),
                "rates": [round(rate, 1) for rate in rates],
            }
        )
    return table


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GB, and the GPU if torch sees one."""
    gpu = None
    try:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
    except ImportError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(memory / 1e9, 1),
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter here; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        found[name] = None
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def about() -> dict[str, Any]:
    """Of a result: the line that started this tool, of which commit, on what, with what."""
    return {
        "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def report(
    table: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    extra: Mapping[str, Any] | None = None,
    panels: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    plot: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Prints rows and `extra`; writes them, with `about`, and draws them where `parse` was told.

    panels: the rows as `draw` takes them; None: all in one. plot: what draws instead of `draw`.
    """
    result = {**about(), "rows": list(table), **(extra or {})}
    width = max([len(row["name"]) for row in table], default=4)
    print(f"{'':{width}}  {'per second':>12}  {'IQR':>10}  {'ratio':>6}  {'IQR':>5}")
    for row in table:
        print(
            f"{row['name']:{width}}  {row['img_per_s']:12,.0f}  {row['iqr']:10,.0f}  "
            f"{row['ratio']:6.2f}  {row['ratio_iqr']:5.2f}"
        )
    for name, value in (extra or {}).items():
        print(f"{name}: {json.dumps(value)}")
    if args.json is not None:
        write_json(args.json, result)
    if args.plot is not None:
        (plot or partial(draw, panels or {"": table}))(args.plot)
    return result


def draw(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The ratios as bars, with half the interquartile range to either side; a panel a title, all
    with rows of the same names."""
    from matplotlib.figure import Figure  # of the extra `train`

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    height = 0.35 * max(map(len, panels.values()))
    figure = Figure(figsize=(4 + 4 * across, down * (1 + height)), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, (title, table) in zip(grid.flat, panels.items(), strict=False):
        ratios, spread = ([row[key] for row in table] for key in ("ratio", "ratio_iqr"))
        names = [row["name"] for row in table]
        bars = axes.barh(names, ratios, xerr=[value / 2 for value in spread], capsize=3, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.tick_params(labelbottom=True)
        axes.margins(x=0.12)
    grid[0, 0].invert_yaxis()  # shared by all
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("rate, as a multiple of the baseline's", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Indented, and in place only once it is whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(target)


def _commit() -> str | None:
    """Of the working tree, with -dirty where it has changes; None outside one."""
    told = ["git", "-C", str(_path.ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(told, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
