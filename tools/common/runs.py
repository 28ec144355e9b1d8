"""Runs of train.py: reads their settings, progress and figures from their folders, and starts and
stops them as child processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines import resume
from scae_dali.methods import BUILT_IN, compose
from scae_dali.training import checkpoint
from scae_dali.training.log import LogError, known_rows, read_rows

__all__ = [
    "FIGURES",
    "LOG",
    "PACE",
    "differing",
    "environment",
    "epochs_done",
    "every",
    "gain",
    "last_lines",
    "pace",
    "read_config",
    "read_run",
    "settings",
    "spread",
    "start",
    "stop",
]

LOG = "train.log"  # in a run's folder: what train.py printed

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
PACE = ("img_per_s", "seconds.train", "seconds.saliency", "seconds.val")  # what `pace` reads
# Settings that say where things lie and what computes them: no result depends on them.
PLACES = {
    "data.root",
    "data.index_cache",
    "device",
    "saliency.cache",
    "second_stage.weights",
}


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished run's settings and its last row. Raises ValueError where there is none, LogError
    where its files are damaged, or metrics.jsonl and the checkpoint differ.
    """
    saved = checkpoint.saved_log(path / "checkpoint.pt")
    rows = known_rows(path / "metrics.jsonl", saved, ("val_top1",))
    if not rows or not (path / "config.json").exists():
        raise ValueError(f"{str(path)!r} must be the folder of a run with a finished epoch")
    config = read_config(path / "config.json")
    done = rows[-1]["epoch"] + 1
    if done < config["epochs"]:
        raise ValueError(
            f"{str(path)!r} has {done} of {config['epochs']} epochs: let it end (--resume) first"
        )
    return config, rows[-1]


def read_config(path: Path) -> dict[str, Any]:
    """A run's settings, as train.py wrote them; LogError for anything else."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise _damaged(path, f"must hold an object, got {config!r:.40}")
    for name, kind in {"method": str, "seed": int, "epochs": int}.items():
        if type(config.get(name)) is not kind:
            said = f"got {config[name]!r:.40}" if name in config else "it has none"
            raise _damaged(path, f"must have {name} as {kind.__name__}, {said}")
    return config


def _damaged(path: Path, what: str) -> LogError:
    return LogError(
        f"{str(path)!r} {what}; restore the file from a copy, or resume the run (train.py "
        "--resume), which writes it again"
    )


def epochs_done(path: Path) -> int:
    rows = read_rows(path / "metrics.jsonl")
    return rows[-1]["epoch"] + 1 if rows else 0


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a result depends on, by their names on the command line.

    What a run of an older version lacks is at its default, which means what was done then.
    """
    used = compose.split(config["method"])
    unused = {"out", "seed", "threads", "backend", "checkpoint_every", *BUILT_IN} - {*used}
    known = resume.defaults() | resume.flat(config)
    return {key: value for key, value in known.items() if key.partition(".")[0] not in unused}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that both configs have with different values, except those in PLACES."""
    mine, yours = settings(one), settings(other)
    shared = sorted(mine.keys() & yours.keys() - PLACES)
    return {key: (mine[key], yours[key]) for key in shared if mine[key] != yours[key]}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The values, their mean, and their sample standard deviation; None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "values": [*values]}


def every(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The figure of each row; [] if one lacks it, since some seeds must not stand for all."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return values if len(values) == len(rows) else []


def gain(own: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any] | None:
    """The `spread` of the differences by seed; None if no seed has both."""
    pairs = {seed: own[seed] - baseline[seed] for seed in own if seed in baseline}
    return {**spread([*pairs.values()]), "seeds": [*pairs]} if pairs else None


def pace(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that an image of training took, passes and validation included; None without rows."""
    images = sum(row["img_per_s"] * row["seconds"]["train"] for row in rows)
    if not images:
        return None
    return spent(rows) / images


def spent(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training, passes and validation."""
    return sum(row["seconds"][part] for row in rows for part in ("train", "saliency", "val"))


def environment(slot: int, jobs: int, device: str) -> dict[str, str]:
    """Variables for the child in this slot of `jobs`: its GPU, or its share of the CPU threads."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus > 1:
        named = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        env["CUDA_VISIBLE_DEVICES"] = named.split(",")[slot % gpus]
    if not gpus:
        threads = int(env.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        env["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return env


def start(out: Path, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen | None:
    """Start train.py as a child, with its output in LOG; None if another process writes that file.

    The child holds a lock on the file as long as it lives, even if this process ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOG, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        # In a session of its own: Ctrl-C reaches this process alone, and stop() all its children.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def stop(children: Sequence[subprocess.Popen], patience_s: float = 10.0) -> None:
    """End the children and theirs, by force if they ignore SIGTERM. Checkpoints stay whole."""
    for child in children:
        _signal(child, signal.SIGTERM)
    end = time.monotonic() + patience_s  # for all of them
    for child in children:
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()


def last_lines(path: Path, n: int = 15) -> list[str]:
    """The last lines of a file; a progress bar's earlier states do not count."""
    if not path.exists():
        return []
    lines = path.read_bytes()[-100_000:].decode(errors="replace").splitlines()
    bar = re.compile(r"\d+%\|")
    return [line for line in lines if line.strip() and not bar.search(line)][-n:]


def _signal(child: subprocess.Popen, number: int) -> None:
    if child.poll() is None:
        os.killpg(child.pid, number)
