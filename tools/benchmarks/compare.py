"""Compare results of a benchmark before and after a change, and tell what got slower.

Each row's rate is divided by that of its baseline in the same round, so that a slow machine does
not count. The rate of a baseline itself is compared as it is, and so are all rates with --absolute.
That only counts on the same idle machine.

A row is called slower or faster where the 99 % interval of its change leaves out the tolerance. The
interval is a bootstrap over the rounds. It does not know how much two starts of the program differ,
so give several files of each side, made in turns: BEFORE AFTER BEFORE AFTER. Each needs at least
three rounds.

The exit status is 1 if a row got slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.common import options
from tools.common.about import about, read_json, write_json

_DRAWS = 10_000
_ROUNDS = 3  # fewer tell nothing of the noise
_TOLD = ("hardware", "versions", "settings")


@dataclass(frozen=True)
class Series:
    """A row of one side. values: float64 [rounds] for each file."""

    values: list[np.ndarray]
    absolute: bool  # images a second; otherwise multiples of the baseline

    @property
    def median(self) -> float:
        return float(np.median(np.concatenate(self.values)))

    def drawn(self, random: np.random.Generator) -> np.ndarray:
        """Medians of rounds drawn with replacement within each file, float64 [_DRAWS]."""
        parts = [one[random.integers(len(one), size=(_DRAWS, len(one)))] for one in self.values]
        return np.median(np.concatenate(parts, axis=1), axis=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser_of(__doc__, prog="benchmark.py --compare")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="results of --json, in turns before and after the change",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="change that does not count, as a share; default: 0.01",
    )
    parser.add_argument(
        "--absolute",
        action="store_true",
        help="compare the rates themselves, where the change is to the baseline as well",
    )
    parser.add_argument(
        "--json", type=options.output_file, metavar="OUT", help="write the result as JSON too"
    )
    args = parser.parse_args(argv)
    if len(args.results) % 2:
        parser.error(f"results must be pairs, before and after, got {len(args.results)} files")
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance must be in [0, 1), got {args.tolerance}")
    files = [_load(path) for path in args.results]
    for note in _differences(args.results, files):
        print(f"note: {note}")
    before, after = (
        _series(files[side::2], args.results[side::2], args.absolute) for side in (0, 1)
    )
    changes = [
        _change(name, before[name], after[name], args.tolerance) for name in before if name in after
    ]
    if not changes:
        raise ValueError(f"{args.results[0]} and {args.results[1]} have no row of the same name")
    _print(changes)
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only {'before' if name in before else 'after'}")
    slower = sum(change["verdict"] == "slower" for change in changes)
    print(f"{slower} of {len(changes)} rows got slower")
    if args.json is not None:
        write_json(args.json, {**about(), "rows": changes})
    return 1 if slower else 0


def _load(path: Path) -> dict[str, Any]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not (isinstance(rows, list) and rows and all(map(_is_row, rows))):
        raise ValueError(
            f"{path} is no result of a benchmark with its single rounds: make it by benchmark.py "
            "NAME --json; early versions did not write the rounds"
        )
    names = [row["name"] for row in rows]
    for name, row in zip(names, rows, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"{path} has {names.count(name)} rows of the name {name!r}: measure again, with "
                "each value of an option once"
            )
        if not all(0 < rate < math.inf for rate in row["rates"]):
            raise ValueError(
                f"the rates of {name!r} in {path} must be finite and above 0, got {row['rates']}: "
                "measure again"
            )
        if len(row["rates"]) < _ROUNDS:
            raise ValueError(
                f"{path} has {len(row['rates'])} rounds of {name!r}, and fewer than {_ROUNDS} tell "
                f"nothing of the noise: measure with --rounds {_ROUNDS} or more"
            )
    return content


def _is_row(row: Any) -> bool:
    """Whether it has what a row of a benchmark has, whose numbers may still be strange."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    rates = row.get("rates")
    numbers = [row.get("ratio"), row.get("ratio_iqr"), *(rates if isinstance(rates, list) else ())]
    return len(numbers) > 2 and all(isinstance(number, int | float) for number in numbers)


def _differences(paths: Sequence[Path], files: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the files doubtful to compare: other machines, versions or options."""
    notes = []
    for part in _TOLD:
        first = _told(files[0], part)
        for path, other in zip(paths[1:], files[1:], strict=True):
            here = _told(other, part)
            other_names = [n for n in {**first, **here} if first.get(n) != here.get(n)]
            if other_names:
                notes.append(f"{path} has other {part} than {paths[0]}: {', '.join(other_names)}")
    return notes


def _told(content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """What a result says of the machine, for instance; others than benchmarks may say nothing."""
    found = content.get(part)
    return found if isinstance(found, dict) else {}


def _series(
    files: Sequence[Mapping[str, Any]], paths: Sequence[Path], absolute: bool
) -> dict[str, Series]:
    """The rows of one side by name. absolute: whether all are rates, and not ratios."""
    series: dict[str, Series] = {}
    for content, path in zip(files, paths, strict=True):
        rows = content["rows"]
        baselines = [row for row in rows if (row["ratio"], row["ratio_iqr"]) == (1.0, 0.0)]
        for row in rows:
            rates = np.array(row["rates"], np.float64)
            base = row if absolute else _baseline(row, baselines, path)
            values = rates if base is row else rates / np.array(base["rates"])
            one = series.setdefault(row["name"], Series([], absolute=base is row))
            _check_alike(one, base is row, row["name"])
            one.values.append(values)
    return series


def _baseline(
    row: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]], path: Path
) -> Mapping[str, Any]:
    """The row that a row's ratio is to. A file with several settings has one for each."""
    if any(row is one for one in baselines):
        return row

    def off(base: Mapping[str, Any]) -> float:
        ratios = np.array(row["rates"]) / np.array(base["rates"])
        return abs(float(np.median(ratios)) - row["ratio"])

    fitting = [base for base in baselines if len(base["rates"]) == len(row["rates"])]
    if not fitting:
        raise ValueError(f"{path} has no baseline for its row {row['name']!r}")
    return min(fitting, key=off)


def _check_alike(series: Series, absolute: bool, name: str) -> None:
    if series.absolute != absolute:
        raise ValueError(
            f"{name!r} is the baseline in some of the files and not in others, so its figures are "
            "not of one kind: compare files with the same baseline, or pass --absolute"
        )


def _change(name: str, before: Series, after: Series, tolerance: float) -> dict[str, Any]:
    _check_alike(before, after.absolute, name)
    random = np.random.default_rng(0)
    low, high = np.quantile(after.drawn(random) / before.drawn(random), [0.005, 0.995])
    verdict = "slower" if high < 1 - tolerance else "faster" if low > 1 + tolerance else "same"
    return {
        "name": name,
        "absolute": before.absolute,
        "before": before.median,
        "after": after.median,
        "change": after.median / before.median,
        "interval": [float(low), float(high)],
        "verdict": verdict,
    }


def _print(changes: Sequence[Mapping[str, Any]]) -> None:
    width = max(len(change["name"]) for change in changes)
    print(f"{'':{width}}  {'before':>10}  {'after':>10}  {'change':>6}  99 % interval")
    for change in changes:
        digits = ",.0f" if change["absolute"] else ".3f"
        low, high = change["interval"]
        print(
            f"{change['name']:{width}}  {change['before']:10{digits}}  {change['after']:10{digits}}"
            f"  {change['change']:6.3f}  {low:.3f} … {high:.3f}  "
            f"{change['verdict'] if change['verdict'] != 'same' else ''}".rstrip()
        )
