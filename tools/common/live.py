"""Rows of a measurement that take turns: whole pipelines, or anything else that yields batches.

All rows live at once. The batches that a row has made ahead are taken before its clock starts, and
its turn ends only when it has filled its queue again, so that no row works in another's turn.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status, cmo, compose
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Batch, Loader
from scae_dali.stage.memory import batches_at_once
from scae_dali.stage.stage import Stage
from tools.common.made_up import SEED

__all__ = [
    "GUIDED",
    "Counter",
    "Row",
    "acting",
    "cpu_seconds",
    "endless",
    "medians",
    "memory_loader",
    "planned_ahead",
    "settle",
    "synchronize",
]

# Settings of a Stage with λ = λ_max: eq. 5 reaches it at epoch T.
GUIDED: dict[str, Any] = {"epochs": 1, "start_epoch": 1, "seed": SEED}


def acting(method: str) -> dict[str, Any]:
    """Settings by which a method, or several joined, acts in every epoch of a short run."""
    always = {"cmo": cmo.Config(skip_first=0, skip_last=0)}
    return {name: always[name] for name in compose.split(method) if name in always}


def memory_loader(
    stage: Stage,
    pixels: np.ndarray,
    image: ImageConfig,
    execution: ExecConfig,
    *,
    drop_last: bool = True,
) -> Loader:
    """Batches of pixels uint8 [N, H, W, 3], from the stage's first epoch on."""
    order = Order(
        stage.index.labels,
        batch_size=execution.batch_size,
        seed=SEED,
        start_epoch=stage.start_epoch,
    )
    images = ArrayImages(stage.index, pixels)
    pipeline = memory.train_pipeline(stage, images, order, image, execution)
    return Loader(pipeline, files.OUTPUTS, stage.index, drop_last=drop_last, order=order)


def planned_ahead(pixels: np.ndarray, batch_size: int) -> int:
    """Batches that a pipeline fed from memory may have made before DALI asks for them."""
    return 2 * batches_at_once(pixels, batch_size)


def endless(loader: Loader) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    return (batch for _ in itertools.count() for batch in loader)


class Counter:
    """How many samples of some batches were mixed."""

    def __init__(self) -> None:
        self.mixed = self.samples = 0

    def __call__(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """The images of the batches."""
        for batch in batches:
            self.mixed += int((batch.status & int(Status.MIXED) > 0).sum())
            self.samples += len(batch.images)
            yield batch.images

    @property
    def share(self) -> float:
        return round(self.mixed / max(1, self.samples), 5)


class Row:
    """Something that yields batches without end, and is timed a round at a time.

    batches: yields anything whose length is the number of images in the batch. ahead: batches that
    may be finished before anybody asks for them.
    """

    def __init__(self, batches: Iterator, ahead: int, stage: Stage | None = None) -> None:
        self._batches, self._ahead, self._stage = batches, ahead, stage
        self.plan_ms: list[float] = []  # of each round, for a batch
        self.cpu_ms: list[float] = []  # of each round, for an image

    def measure(self, n: int, ready: Callable[[], object] = lambda: None) -> float:
        """Returns img/s over n batches. ready: called right before the clock starts."""
        planned = self._stage.seconds if self._stage else 0.0
        cpu = cpu_seconds()
        images_ahead = sum(len(next(self._batches)) for _ in range(self._ahead))
        synchronize()
        ready()
        start = time.perf_counter()
        images = sum(len(next(self._batches)) for _ in range(n))
        synchronize()
        seconds = time.perf_counter() - start
        settle()
        # Every batch drawn has been made again, so n + ahead were planned and made since.
        self.cpu_ms.append(1e3 * (cpu_seconds() - cpu) / (images + images_ahead))
        if self._stage:
            self.plan_ms.append(1e3 * (self._stage.seconds - planned) / (n + self._ahead))
        return images / seconds


def medians(live: Mapping[str, Row]) -> dict[str, Any]:
    """For the report, by row: the time to plan a batch, and the CPU time of an image."""
    planned = {name: row.plan_ms for name, row in live.items() if row.plan_ms}
    used = {name: row.cpu_ms for name, row in live.items()}
    return {
        "plan_ms_per_batch": {
            name: round(statistics.median(ms), 3) for name, ms in planned.items()
        },
        "cpu_ms_per_image": {name: round(statistics.median(ms), 4) for name, ms in used.items()},
    }


def settle(window_s: float = 0.05, patience_s: float = 10.0) -> None:
    """Wait until this process and its DataLoader's workers rest."""
    give_up = time.monotonic() + patience_s
    quiet = 0
    while quiet < 3 and time.monotonic() < give_up:
        before = cpu_seconds()
        time.sleep(window_s)
        quiet = quiet + 1 if cpu_seconds() - before < 0.25 * window_s else 0


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process and of its DataLoader's workers."""
    ticks = 0
    for worker in torch.multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
