"""How long runs take on this machine, by those that it has made, or by a few steps of a network."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from tools.common import runs
from tools.common.about import hardware
from tools.paper.jobs import Job, read_starts
from tools.paper.probe import pace

__all__ = ["Times", "note"]

Key = tuple[str, ...]  # a network, the kind of a second stage, a method


def note(args: argparse.Namespace, job: Job, now: float) -> dict[str, float]:
    """What `Times` needs to know of the start of a run. now: seconds since 1970."""
    return {"jobs": args.jobs, "time": now, "epochs": runs.epochs_done(job.path)}


class Times:
    """Seconds that runs take beside `args.jobs` - 1 others.

    A rate given as --rate comes first. Then come the runs in --out that this machine made last, as
    many at once: those of the same network, second stage and method, or else of the same network.
    Where there are none, a few steps of the network are tried, if `probe` says so.
    """

    def __init__(self, args: argparse.Namespace, *, probe: bool) -> None:
        self._args, self._probe = args, probe
        self.tried: dict[str, float] = {}  # network -> seconds an image
        self.read()

    def read(self) -> None:
        """Look at the runs again."""
        self.measured: dict[Key, list[tuple[float, float]]] = {}
        machine = hardware()
        for file in self._args.out.glob("table*/*/config.json"):
            starts = read_starts(file.parent)
            last = starts[-1] if starts else {}
            if last.get("jobs") != self._args.jobs or last["hardware"] != machine:
                continue
            if (found := _measured(file.parent, last)) is None:
                continue
            config = runs.read_config(file)
            stage = config.get("second_stage", {}).get("classifier")
            for key in _keys(config["model"], stage, config["method"]):
                self.measured.setdefault(key, []).append(found)

    def image(self, job: Job) -> float:
        """Seconds that an image of training takes, passes and validation included; NaN where
        nothing is known."""
        if self._args.rate:
            return 1 / self._args.rate
        if known := self._known(job):
            return statistics.mean(pace for pace, _ in known)
        if not self._probe or job.index is None:
            return math.nan
        if job.model not in self.tried:
            self.tried[job.model] = pace(job.config, job.index.num_classes, self._args.jobs)
        return self.tried[job.model]

    def epoch(self, job: Job) -> float:
        """Seconds that an epoch takes."""
        return math.nan if job.epoch_images is None else job.epoch_images * self.image(job)

    def left(self, job: Job) -> float:
        """Seconds until a run ends if it starts, or goes on, now."""
        start = statistics.mean([rest for _, rest in self._known(job)] or [0.0])
        return start + job.epochs_left * self.epoch(job)

    def first(self, job: Job) -> float:
        """Seconds until the next epoch of a run ends if it starts, or goes on, now."""
        return self.left(job) - max(0, job.epochs_left - 1) * self.epoch(job)

    def _known(self, job: Job) -> list[tuple[float, float]]:
        keys = _keys(job.model, job.config.second_stage.classifier, job.cell.method)
        return next((self.measured[key] for key in keys if key in self.measured), [])


def _keys(model: str, stage: str | None, method: str) -> list[Key]:
    return [(model, stage or "", method), (model, stage or ""), (model,)]


def _measured(path: Path, start: dict[str, float]) -> tuple[float, float] | None:
    """Of a run since its last start: seconds an image, and seconds besides, most of them before the
    first epoch; None if it has made no epoch since."""
    file = path / "metrics.jsonl"
    rows = runs.read_rows(file, runs.PACE)[int(start["epochs"]) :]
    if (found := runs.pace(rows)) is None:
        return None
    return found, max(0.0, file.stat().st_mtime - start["time"] - runs.spent(rows))
