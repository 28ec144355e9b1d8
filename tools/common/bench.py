"""What the benchmarks share: options, interleaved rounds, statistics, the report.

Candidates take turns within a round, in another order each time, so that a machine that slows down
slows all of them and none runs always after the same one. Ratios are formed within a round before
the median is taken.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.common import options
from tools.common.about import about, write_json
from tools.common.options import count, output_file, picture_file

__all__ = ["draw", "interleaved", "iqr", "parse", "parser_of", "report", "rows", "settings"]


def parser_of(doc: str | None, module: str) -> argparse.ArgumentParser:
    """The parser of a benchmark, from its module's docstring and name."""
    return options.parser_of(doc, prog=f"benchmark.py {module.rpartition('.')[2]}")


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    rounds: int,
    quick: Mapping[str, Any],
) -> argparse.Namespace:
    """The arguments, with those that every benchmark has: --rounds, --quick, --json, --plot.

    rounds: the default. quick: name -> the value that --quick sets, unless the option is given, so
    that the benchmark takes a minute.
    """
    sets = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
    parser.add_argument(
        "--rounds",
        type=count,
        default=rounds,
        help=f"how often every row is measured; default: {rounds}",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"measure for about a minute, by {sets}"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="OUT", help="write the result to this file as JSON"
    )
    parser.add_argument(
        "--plot", type=picture_file, metavar="OUT.png", help="draw the ratios into this file"
    )
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options, except where the data lies and the result goes."""
    return {key: value for key, value in vars(args).items() if key not in ("data", "json", "plot")}


def interleaved(
    candidates: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Calls every candidate once a round; each returns its rate. Returns rates [rounds] by name.

    The order is drawn anew for every round, and is the same each time the benchmark is started.
    Warm-up rounds are not counted.
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


def report(
    table: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    extra: Mapping[str, Any] | None = None,
    panels: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    plot: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Prints rows and `extra`. Writes them, with `about`, and draws them if the options say so.

    panels: the rows as `draw` takes them; None: all in one. plot: draws instead of `draw`.
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
    """Draws the ratios as bars, with half the interquartile range to either side. panels: title ->
    rows; all panels have rows of the same names."""
    from matplotlib.figure import Figure  # needs the extra `train`

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
