"""The runs of train.py that make a table: one for each cell and seed, with its settings; which of
them a folder already holds, and whether those have the settings asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse

import train
from pipelines.data import DataConfig
from pipelines.recipe import Config
from scae_dali.data.index import ImageIndex
from tools import ROOT
from tools.common import runs
from tools.paper.tables import TABLES, Cell, Section

__all__ = [
    "STARTS",
    "Job",
    "existing",
    "finished",
    "folder_of",
    "make_job",
    "plan",
    "read_starts",
    "refuse_others",
    "twin",
]

STARTS = "starts.json"  # in a run's folder: how and on what it was started
# Settings in epochs, which shrink with --epochs.
IN_EPOCHS = (
    *("milestones", "warmup_epochs", "ramp_epochs", "defer", "refresh_every"),
    *("skip_first", "skip_last"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of train.py: a cell with a seed.

    first: the folder of the run whose weights a second stage starts from. index: of the training
    images; None in a dry run without them. overridden: of the settings of the cell's own recipes,
    those that options after -- have changed: what they are, and what the recipe has.
    """

    section: Section
    model: str
    cell: Cell
    seed: int
    path: Path
    options: tuple[str, ...]
    config: Config
    first: Path | None
    index: ImageIndex | None
    overridden: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The config as train.py writes it into config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))

    @property
    def epoch_images(self) -> int | None:
        return None if self.index is None else self.config.epoch_size(self.index.labels)

    @property
    def epochs_left(self) -> int:
        return max(0, self.config.epochs - runs.epochs_done(self.path))


def make_job(args: argparse.Namespace, section: Section, model: str, cell: Cell, seed: int) -> Job:
    """The job of a cell and seed. Raises ValueError where train.py refuses the options."""
    path = folder_of(args, section, model, cell.name, seed)
    recipes = (section.recipe, *cell.recipes)
    base = [f"--config={ROOT / 'pipelines' / recipe}.yaml" for recipe in recipes]
    ours = {"model": model, "method": cell.method, "data.root": args.data}
    its = {"seed": seed, "out": path}  # of this run alone
    first = None
    if cell.first is not None:
        first = folder_of(args, section, model, cell.first, seed)
        its["second_stage.weights"] = first / "weights.pt"
    # The seeds share what they have in common, since it takes long to read.
    stand_ins = _options({key: 0 if key == "seed" else key for key in its})
    own = dict(text.split("=", 1) for text in (*section.overrides, *cell.overrides))
    fitted: dict[str, Any] = {}
    if args.epochs is not None:
        whole = resolve(path.name, [*base, *_options({**own, **ours}), *stand_ins])
        ours["epochs"] = args.epochs if first is None else min(args.epochs, whole.epochs)
        if ours["epochs"] != whole.epochs:
            fitted = shrunk(whole, ours["epochs"] / whole.epochs)
    own |= {key: value for key, value in fitted.items() if key in own}
    early = {key: value for key, value in fitted.items() if key not in own}
    options = [*base, *_options(early), *args.options, *_options({**own, **ours})]
    config = _with(resolve(path.name, [*options, *stand_ins]), its)
    options += [*_options(its), "--resume"]
    try:
        index = train_index(dataclasses.replace(config.data, in_memory=False))
    except (OSError, ValueError):
        if not args.dry_run:
            raise
        index = None
    return Job(section=section, model=model, cell=cell, seed=seed, path=path, first=first,
               options=tuple(options), config=config, index=index,
               overridden=overridden(base, args.options, own.keys()))  # fmt: skip


def overridden(
    recipes: Sequence[str], options: Sequence[str], own: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """The settings that recipes after the first one set, and that the options change: what they
    are, and what the recipes have. own: settings that win over the options."""
    if len(recipes) == 1 or not options:
        return {}
    plain, whole, changed = (
        _parsed(given) for given in ((recipes[0],), tuple(recipes), (*recipes, *options))
    )
    return {
        name: (changed.get(name), value)
        for name, value in whole.items()
        if name not in {"config", *own} and value not in (plain.get(name), changed.get(name))
    }


@functools.cache
def _parsed(options: tuple[str, ...]) -> dict[str, Any]:
    """Dotted name -> value. The options need not name the data and the folder of a run."""
    return vars(parser().parse_args([*options, "--data.root=.", "--out=."]).as_flat())


def folder_of(args: argparse.Namespace, section: Section, model: str, cell: str, seed: int) -> Path:
    """The folder of a run."""
    return args.place / f"{section.name}-{model}-{cell}-s{seed}"


def _options(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


@functools.cache
def parser() -> jsonargparse.ArgumentParser:
    """train.py's, which takes longer to make than to use; it raises where that one exits."""
    made = train.make_parser()
    made.exit_on_error = False
    return made


def resolve(name: str, options: Sequence[str]) -> Config:
    """The Config that train.py makes of its options."""
    try:
        return _resolved(tuple(options))
    except (argparse.ArgumentError, ValueError, OSError) as error:
        raise ValueError(f"{name}: train.py does not take its options: {error}") from error


@functools.cache
def _resolved(options: tuple[str, ...]) -> Config:
    found = parser().instantiate(parser().parse_args(list(options)))
    return Config(**{field.name: found[field.name] for field in dataclasses.fields(Config)})


def _with(config: Config, its: Mapping[str, Any]) -> Config:
    """The Config of one seed. its: seed, out, and a second stage's weights."""
    stage = config.second_stage
    if "second_stage.weights" in its:
        stage = dataclasses.replace(stage, weights=str(its["second_stage.weights"]))
    return dataclasses.replace(config, seed=its["seed"], out=str(its["out"]), second_stage=stage)


def shrunk(config: Config, factor: float) -> dict[str, Any]:
    """The settings in epochs, for a run of `factor` times the epochs."""
    found: dict[str, Any] = {}
    for key, value in runs.settings(dataclasses.asdict(config)).items():
        if key.rpartition(".")[2] not in IN_EPOCHS:
            continue
        if isinstance(value, tuple):
            found[key] = [_shrink(one, factor) for one in value]
        elif value:
            found[key] = _shrink(value, factor, least=0 if ".skip_" in key else 1)
    if config.optim.schedule != "step":
        found.pop("optim.milestones", None)
    return found


def _shrink(value: float, factor: float, least: int = 1) -> float:
    if isinstance(value, float):
        return round(value * factor, 6)
    return max(min(least, value), round(value * factor))


@functools.lru_cache(maxsize=4)
def train_index(data: DataConfig) -> ImageIndex:
    return data.open().train


def plan(args: argparse.Namespace) -> list[Job]:
    """The runs asked for, by rank; in a rank all cells have their first seed before a second."""
    jobs = []
    for seed in range(args.seeds):
        for section in TABLES[args.table].sections:
            if args.sections and section.name not in args.sections:
                continue
            asked = {*(args.methods or (cell.name for cell in section.cells))}
            asked |= {cell.first for cell in section.cells if cell.name in asked and cell.first}
            for model in args.models:
                for cell in section.cells:
                    if cell.name in asked:
                        jobs.append(make_job(args, section, model, cell, seed))
    if not jobs:
        sections = [one for one in TABLES[args.table].sections if one.name in args.sections]
        known = dict.fromkeys(cell.name for section in sections for cell in section.cells)
        raise ValueError(
            f"--methods must be of the sections asked for, got {', '.join(args.methods)} with "
            f"--sections {', '.join(args.sections)}, which have none of them; they have "
            f"{', '.join(known)}"
        )
    refuse_same(jobs)
    return sorted(jobs, key=lambda job: job.cell.rank)


def refuse_same(jobs: Sequence[Job]) -> None:
    """Raise ValueError where options after -- have made two cells the same."""
    settings = [(job, job.settings) for job in jobs if job.seed == 0]
    for (one, its), (other, others) in itertools.combinations(settings, 2):
        if one.first == other.first and not runs.differing(its, others):
            names = [f"{job.cell.name} of {job.section.name}" for job in (one, other)]
            raise ValueError(
                f"the options after -- make {' and '.join(names)} the same: leave out the option "
                "in which they differ"
            )


def existing(args: argparse.Namespace) -> list[tuple[Path, Section, str, Cell, int]]:
    """Runs of the table's cells that lie in its folder, in the order of the table."""
    table = TABLES[args.table]
    cells = {(one.name, cell.name): (one, cell) for one in table.sections for cell in one.cells}
    order = [*cells]
    found = []
    for config in args.place.glob("*/config.json"):
        match = re.fullmatch(r"(\w+)-(\w+)-(\w+)-s(\d+)", config.parent.name)
        if match and (match[1], match[3]) in cells:
            section, cell = cells[match[1], match[3]]
            found.append((config.parent, section, match[2], cell, int(match[4])))
    return sorted(found, key=lambda run: (run[2], order.index((run[1].name, run[3].name)), run[4]))


def refuse_others(args: argparse.Namespace) -> None:
    """Raise ValueError where --out holds runs of the table made with other options."""
    for path, section, model, cell, seed in existing(args):
        job = make_job(args, section, model, cell, seed)
        found = runs.differing(runs.read_config(path / "config.json"), job.settings)
        if found:
            odd = "; ".join(f"{key}={was!r}, not {now!r}" for key, (was, now) in found.items())
            raise ValueError(
                f"{str(path)!r} was made with {odd}: give the options that it was made with, or "
                "another --out"
            )
        starts = read_starts(path)
        if starts and job.index is not None and starts[0]["data"] != job.index.fingerprint:
            raise ValueError(
                f"{str(path)!r} was made from other images than those of --data {args.data}: give "
                "the same, or another --out"
            )


def read_starts(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / STARTS).read_text()) if (path / STARTS).exists() else []


def twin(args: argparse.Namespace, job: Job, jobs: Sequence[Job]) -> Path | None:
    """A finished run of another table with the same settings, and with its weights if a second
    stage among the jobs needs them: an archive may have left them out."""
    if job.first is not None or job.index is None or os.path.lexists(job.path):
        return None
    needed = any(other.first == job.path for other in jobs)
    for file in sorted(args.out.glob("table*/*/config.json")):
        path, config = file.parent, runs.read_config(file)
        starts = read_starts(path)
        if (
            path.parent != args.place
            and config["seed"] == job.seed
            and starts
            and starts[0]["data"] == job.index.fingerprint
            and not runs.differing(config, job.settings)
            and runs.epochs_done(path) >= config["epochs"]
            and (not needed or (path / "weights.pt").exists())
        ):
            return path
    return None


def finished(job: Job, jobs: Sequence[Job]) -> bool:
    """Whether nothing of a job is left to do, its weights included if a second stage needs them."""
    if job.epochs_left:
        return False
    needed = any(other.first == job.path and other.epochs_left for other in jobs)
    return not needed or (job.path / "weights.pt").exists()
