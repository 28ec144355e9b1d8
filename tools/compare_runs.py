"""Compare runs of train.py: accuracy at the last and the best epoch, by class size, calibration.

    python tools/compare_runs.py runs/none runs/scae-0 runs/scae-1 --json tools/results/lt.json

Runs whose settings differ only in `seed` and `out` make one row: mean ± standard deviation. The
JSON also has the values by seed. Its commit, hardware and versions are those of the comparison.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from scae_dali.commands.program import run_program
from tools.common import runs
from tools.common.about import about, write_json
from tools.common.options import output_file, parser_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, which is its --out"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="OUT", help="write the figures to OUT as JSON"
    )
    return parser.parse_args(argv)


def name_of(config: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The name of a row: the method, and the settings in which its runs differ."""
    mine = runs.settings(config)
    rivals = [runs.settings(other) for other in others if other["method"] == config["method"]]
    keys = sorted(key for key in mine if any(one.get(key) != mine[key] for one in rivals))
    return ", ".join([config["method"], *(f"{key} {mine[key]}" for key in keys)])


def table(paths: list[Path]) -> list[dict[str, Any]]:
    """A row for each set of settings, with figures over its seeds, in percent."""
    given: dict[Path, Path] = {}
    for path in paths:
        if (other := given.setdefault(path.resolve(), path)) is not path:
            raise ValueError(
                f"{str(path)!r} and {str(other)!r} are one run, which would count twice: name it "
                "once"
            )
    read = [runs.read_run(path) for path in paths]
    configs = [config for config, _ in read]
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for config, row in read:
        groups.setdefault(name_of(config, configs), []).append((config, row))
    out = []
    for name, members in groups.items():
        figures = {}
        for column, key in runs.FIGURES.items():
            if values := runs.every([row for _, row in members], key):
                figures[column] = runs.spread(values)
        first = members[0][0]
        out.append(
            {
                "name": name,
                "seeds": [config["seed"] for config, _ in members],
                "figures": figures,
                "settings": runs.settings(first),
            }
        )
    return out


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        rows = table(arguments.runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("seeds" + "".join(f"{column:>14}" for column in runs.FIGURES))
    for row in rows:
        cells = ""
        for column in runs.FIGURES:
            figure = row["figures"].get(column)
            text = "" if figure is None else f"{figure['mean']:.2f}"
            if figure is not None and figure["std"] is not None:
                text += f" ± {figure['std']:.2f}"
            cells += f"{text:>14}"
        print(f"{len(row['seeds']):5d}{cells}  {row['name']}")
    if arguments.json is not None:
        write_json(arguments.json, {**about(), "rows": rows})


if __name__ == "__main__":
    sys.exit(run_program(main))
