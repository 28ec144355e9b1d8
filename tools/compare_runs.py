"""Compare runs of train.py: accuracy at the last and the best epoch, by class size, calibration.

    python tools/compare_runs.py runs/none runs/scae-0 runs/scae-1 --json tools/results/lt.json

Runs whose settings differ in `seed` and `out` alone are one row, mean ± standard deviation.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import _bench
import _path  # noqa: F401
from scae_dali.methods import BUILT_IN
from scae_dali.metrics import read_rows

# Column -> where the figure is in the last row of metrics.jsonl
FIGURES = {
    "last": "val_top1",
    "best": "best_top1",
    "median10": "median10_top1",
    "top-5": "val_top5",
    "many": "val_many",
    "medium": "val_medium",
    "few": "val_few",
    "ECE": "val_ece",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT")
    return parser.parse_args(argv)


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished run's settings and its last row; ValueError where there is none."""
    rows = read_rows(path / "metrics.jsonl")
    if not rows or not (path / "config.json").exists():
        raise ValueError(f"{str(path)!r} must be the folder of a run with a finished epoch")
    config = json.loads((path / "config.json").read_text())
    done = rows[-1]["epoch"] + 1
    if done < config["epochs"]:
        raise ValueError(
            f"{str(path)!r} has {done} of {config['epochs']} epochs: let it end (--resume) first"
        )
    return config, rows[-1]


def name_of(config: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The method, and the settings in which runs of it differ."""
    mine = settings(config)
    rivals = [settings(other) for other in others if other["method"] == config["method"]]
    keys = sorted(key for key in mine if any(one.get(key) != mine[key] for one in rivals))
    return ", ".join([config["method"], *(f"{key} {mine[key]}" for key in keys)])


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those that a result depends on, by their names on the command line."""
    unused = {"out", "seed", "threads", "checkpoint_every", *BUILT_IN} - {config["method"]}
    return _flat({key: value for key, value in config.items() if key not in unused})


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def table(paths: list[Path]) -> list[dict[str, Any]]:
    """A row for each set of settings: figures over its seeds, in percent."""
    runs = [read_run(path) for path in paths]
    configs = [config for config, _ in runs]
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for config, row in runs:
        groups.setdefault(name_of(config, configs), []).append((config, row))
    out = []
    for name, members in groups.items():
        figures = {}
        for column, key in FIGURES.items():
            values = [row[key] for _, row in members if key in row]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                figures[column] = {"mean": statistics.mean(values), "std": spread}
        first = members[0][0]
        out.append(
            {
                "name": name,
                "seeds": [config["seed"] for config, _ in members],
                "figures": figures,
                "settings": settings(first),
            }
        )
    return out


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        rows = table(arguments.runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("seeds" + "".join(f"{column:>14}" for column in FIGURES))
    for row in rows:
        cells = ""
        for column in FIGURES:
            figure = row["figures"].get(column)
            text = "" if figure is None else f"{figure['mean']:.2f}"
            if figure is not None and figure["std"] is not None:
                text += f" ± {figure['std']:.2f}"
            cells += f"{text:>14}"
        print(f"{len(row['seeds']):5d}{cells}  {row['name']}")
    if arguments.json is not None:
        about: dict[str, Any] = {"hardware": _bench.hardware(), "versions": _bench.versions()}
        _bench.write_json(arguments.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
