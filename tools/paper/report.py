"""Collects the report of a table from its runs, prints it and draws it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scae_dali.training.log import LogError
from tools.common import runs
from tools.common.about import hardware, versions
from tools.paper.jobs import existing, read_starts
from tools.paper.tables import TABLES, Cell, Section

__all__ = ["collect", "draw", "show"]

Members = Mapping[int, tuple[dict[str, Any], dict[str, Any], Path]]  # of a cell, by seed
COLUMNS = runs.FIGURES | {"adjusted": "val_top1_adjusted", "overhead": "overhead_percent"}


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """The report. Raises ValueError where no run is finished, or runs do not belong together."""
    made: dict[tuple[str, str, str], dict[int, tuple[dict[str, Any], dict[str, Any], Path]]] = {}
    cells: dict[tuple[str, str, str], tuple[Section, Cell]] = {}
    unfinished = []
    for path, section, model, cell, seed in existing(args):
        key = (section.name, model, cell.name)
        try:
            made.setdefault(key, {})[seed] = (*runs.read_run(path), path)
            cells[key] = (section, cell)
        except LogError:
            raise
        except ValueError:
            unfinished.append(path.name)
    made = {key: members for key, members in made.items() if members}
    if not made:
        raise ValueError(f"{str(args.place)!r} must hold a finished run for a report, it has none")
    rows = []
    for key, members in made.items():
        section, cell = cells[key]
        baseline = made.get((*key[:2], "none"), {})
        together(section, cell, members, baseline)
        known = key[1] in TABLES[args.table].models
        paper = dict(cell.paper) if known else {}
        reference = section.cell("none").paper
        figures = {
            column: runs.spread(values)
            for column, name in COLUMNS.items()
            if (values := runs.every([row for _, row, _ in members.values()], name))
        }
        gain, adjusted_gain = (
            None
            if cell.name == "none"
            else runs.gain(by_seed(members, name), by_seed(baseline, name))
            for name in ("val_top1", "val_top1_adjusted")
        )
        rows.append({
            "section": section.title, "model": key[1], "name": cell.title, "cell": cell.name,
            "recipes": [section.recipe, *cell.recipes],
            "options": [f"method={cell.method}", *section.overrides, *cell.overrides],
            "epochs": next(iter(members.values()))[0]["epochs"],
            "seeds": [*members], "figures": figures, "gain": gain, "adjusted_gain": adjusted_gain,
            "paper": paper,
            "paper_gain": round(paper["last"] - reference["last"], 2)
            if cell.name != "none" and "last" in paper and "last" in reference else None,
            "independent": list(cell.independent.get(key[1], ())),
        })  # fmt: skip
    starts = [s for each in made.values() for *_, path in each.values() for s in read_starts(path)]
    return {
        "command": shlex.join(["python", "tools/reproduce.py", *map(tidy, args.argv)]),
        "commit": agreed([start.get("commit") for start in starts]),
        "hardware": agreed([start["hardware"] for start in starts]) or hardware(),
        "versions": agreed([start["versions"] for start in starts]) or versions(),
        "table": args.table,
        "title": TABLES[args.table].title,
        "note": TABLES[args.table].note,
        "paper_epochs": TABLES[args.table].epochs,
        "train_options": agreed([[*map(tidy, start["options"])] for start in starts]),
        "unfinished": unfinished,
        "rows": rows,
        "contrasts": contrasts(made, {section.name: section for section, _ in cells.values()}),
    }


def contrasts(
    made: Mapping[tuple[str, str, str], Members], sections: Mapping[str, Section]
) -> list[dict[str, Any]]:
    """The differences in top-1 that sections ask for, by section and network."""
    found = []
    for name, model in dict.fromkeys(key[:2] for key in made):
        section = sections[name]
        for pair in section.contrasts:
            own, other = (by_seed(made.get((name, model, cell), {}), "val_top1") for cell in pair)
            if (gain := runs.gain(own, other)) is not None:
                titles = [section.cell(cell).title for cell in pair]
                found.append({
                    "section": section.title, "model": model, "cells": [*pair], "titles": titles,
                    "gain": gain,
                })  # fmt: skip
    return found


def by_seed(members: Members, name: str) -> dict[int, float]:
    """A figure of a cell's runs, by seed; empty where a run lacks it."""
    values = runs.every([row for _, row, _ in members.values()], name)
    return dict(zip(members, values, strict=True)) if values else {}


def together(section: Section, cell: Cell, members: Members, baseline: Members) -> None:
    """Raise ValueError unless a cell's runs differ only in seed, and are as long as `none`'s."""
    configs = [config for config, *_ in members.values()]
    for config in configs[1:]:
        if found := runs.differing(configs[0], config):
            raise ValueError(f"{section.name}, {cell.name}: its seeds were made with different "
                             f"{', '.join(found)}; report runs of the same settings")  # fmt: skip
    epochs = {config["epochs"] for config, *_ in baseline.values()} | {configs[0]["epochs"]}
    if cell.first is None and len(epochs) > 1:
        raise ValueError(
            f"{section.name}: {cell.name} and none must have the same epochs, they have "
            f"{' and '.join(map(str, sorted(epochs)))}; report runs of the same settings"
        )


def agreed(notes: Sequence[Any]) -> Any:
    """The value that all notes agree on, or the list of their values; None without any."""
    distinct = [note for i, note in enumerate(notes) if note not in notes[:i]]
    return distinct[0] if len(distinct) == 1 else distinct or None


def tidy(text: str) -> str:
    """A command-line argument without the folders of this machine."""
    option, equals, value = text.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if os.path.isabs(value) else text


def show(report: Mapping[str, Any]) -> None:
    """Print a table for every section and network."""
    for rows in parts(report):
        lines = [cells_of(row) for row in rows]
        used = [name for name in lines[0] if any(line[name] for line in lines)]
        width = {name: max(len(name), *(len(line[name]) for line in lines)) for name in used}
        print(f"\n{heading(report, rows)}")
        for line in [{name: name for name in used}, *lines]:
            print("  ".join(line[n].ljust(width[n]) if n == "" else line[n].rjust(width[n])
                            for n in used).rstrip())  # fmt: skip
        for one in report["contrasts"]:
            if (one["section"], one["model"]) == (rows[0]["section"], rows[0]["model"]):
                seeds = ", ".join(map(str, one["gain"]["seeds"]))
                print(
                    f"{' − '.join(one['titles'])}: {text_of(one['gain'], '+.2f')} (seeds {seeds})"
                )
    print(f"\nMean ± standard deviation over seeds, percent; gains are paired by seed. "
          f"{report['note']}")  # fmt: skip
    if report["unfinished"]:
        print(f"Not finished, left out: {', '.join(report['unfinished'])}.")


def parts(report: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Rows by section and network."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["section"], row["model"]), []).append(row)
    return [*groups.values()]


def heading(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], glue=", ") -> str:
    epochs, paper = max(row["epochs"] for row in rows), report["paper_epochs"]  # stage 2 has fewer
    text = f"{rows[0]['section']}{glue}{rows[0]['model']}, {epochs} epochs"
    return text if epochs == paper else f"{text} (paper: {paper})"


def cells_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a row by column; the first column has no title."""
    figures = {column: text_of(row["figures"].get(column)) for column in COLUMNS}
    paper, paper_gain = row["paper"], row["paper_gain"]
    return {
        "": row["name"],
        "seeds": str(len(row["seeds"])),
        "top-1": figures.pop("last"),
        "gain": text_of(row["gain"], "+.2f"),
        "adjusted": figures.pop("adjusted"),
        "adjusted gain": text_of(row["adjusted_gain"], "+.2f"),
        "paper": " / ".join(f"{value:.2f}" for value in paper.values()),
        "paper's gain": "" if paper_gain is None else f"{paper_gain:+.2f}",
        "independent": "–".join(f"{value:.1f}" for value in row["independent"]),
        **figures,
    }


def text_of(figure: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """37.20 ± 0.31; "" without a figure."""
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.2f}"
    return f"{figure['mean']:{form}}{deviation}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw top-1 and gains over `none` with error bars, beside figures of the paper and of others.

    Draws nothing if there is no gain.
    """
    from matplotlib.figure import Figure  # needs the extra `train`

    groups = [rows for rows in parts(report) if any(row["gain"] for row in rows)]
    if not groups:
        return
    size = (10, sum(2 + 0.35 * len(rows) for rows in groups))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(groups), 2, squeeze=False, sharey="row", height_ratios=[*map(len, groups)]
    )
    for (left, right), rows in zip(grid, groups, strict=True):
        for y, row in enumerate(rows):
            last, gain = row["figures"]["last"], row["gain"]
            left.errorbar(last["mean"], y, xerr=last["std"], fmt="o", color="C0", capsize=3)
            if row["independent"]:
                low, high = min(row["independent"]), max(row["independent"])
                left.plot([low, high], [y, y], "|-", color="gray", zorder=1)
            if "last" in row["paper"]:
                left.plot(row["paper"]["last"], y, "D", color="C1")
            if gain:
                right.barh(y, gain["mean"], xerr=gain["std"], color="C0", capsize=3, height=0.6)
            if row["paper_gain"] is not None:
                right.plot(row["paper_gain"], y, "D", color="C1", zorder=3)
        left.set_yticks(range(len(rows)), [row["name"] for row in rows])
        left.invert_yaxis()
        left.grid(axis="x", alpha=0.3)
        left.set_xlabel("top-1, percent")
        right.axvline(0, color="black", linewidth=0.8)
        right.set_xlabel("gain in top-1 over none, percentage points")
        left.set_title(heading(report, rows), fontsize="medium", loc="left")
    right.barh([], [], color="C0", label="measured, ± standard deviation over seeds")
    right.plot([], [], "D", color="C1", label="paper")
    right.plot([], [], "|-", color="gray", label="other sources")
    figure.legend(loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
