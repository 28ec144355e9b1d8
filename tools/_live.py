"""What the measurements of whole pipelines share: data that is made up, and rows that take turns.

All rows live at once. What a row has read ahead is drawn off before its clock starts, and its turn
is over only when it has filled its queue again, so that no row works during another's turn.
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

import _path  # noqa: F401
from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Batch, Loader
from scae_dali.stage.memory import batches_at_once
from scae_dali.stage.stage import Stage

__all__ = [
    "GUIDED",
    "SEED",
    "Counter",
    "Row",
    "cpu_seconds",
    "endless",
    "epoch_index",
    "evened",
    "long_tailed",
    "medians",
    "memory_loader",
    "planned_ahead",
    "random_cache",
    "random_images",
    "settle",
    "smooth_maps",
]

SEED = 7
# Of a Stage: λ(t) = λ_max from epoch T on.
GUIDED: dict[str, Any] = {"epochs": 1, "start_epoch": 1, "seed": SEED}


def epoch_index(root: str, repeat: int, batch_size: int, shards: int = 1) -> ImageIndex:
    """The files, repeated, without those that would leave the last batch of a shard incomplete."""
    index = ImageIndex(root)
    together = shards * batch_size
    n = len(index) * repeat // together * together
    if n == 0:
        of = "" if shards == 1 else f" for each of {shards} shards"
        raise SystemExit(
            f"--data {root} has {len(index)} images, fewer than --batch-size {batch_size}{of}; "
            f"pass a smaller one, or --repeat {-(-together // len(index))}"
        )
    labels = np.tile(index.labels, repeat)[:n]
    files = (index.files * repeat)[:n]
    return ImageIndex.from_arrays(files, labels, index.root, classes=index.classes)


def evened(index: ImageIndex) -> ImageIndex:
    """The same files, dealt out to classes of one size: whatever the data, nothing is of a tail."""
    labels = np.arange(len(index)) % len(index.classes)
    return ImageIndex.from_arrays(index.files, labels, index.root, classes=index.classes)


def random_images(n: int, size: int, classes: int = 100) -> ArrayImages:
    """n images of random pixels, in classes of about one size."""
    pixels = np.random.default_rng(SEED).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    names = [f"{i}" for i in range(n)]
    index = ImageIndex.from_arrays(names, np.arange(n) % classes, num_classes=classes)
    return ArrayImages(index, pixels)


def smooth_maps(n: int, grid: tuple[int, int]) -> np.ndarray:
    """A bump somewhere, about as wide as Grad-CAM's are: float64 [n, h, w] in [0, 1]."""
    rng = np.random.default_rng(SEED)
    y, x = ((np.arange(g)[:, None] + 0.5) / g for g in grid)
    centre, width = rng.random((2, n, 1, 1)), rng.uniform(0.1, 0.5, (n, 1, 1))
    maps = np.exp(-((y - centre[0]) ** 2 + (x.T - centre[1]) ** 2) / width**2)
    maps -= maps.min((1, 2), keepdims=True)
    return maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-9)


def random_cache(path: str, index: ImageIndex, grid: tuple[int, int] = (7, 7)) -> SaliencyCache:
    """A smooth map for every sample."""
    maps = smooth_maps(len(index), grid)
    cache = SaliencyCache.create(path, index, grid=grid)
    ids = cache.begin_pass(0)
    cache.write(ids, maps[ids], epoch=0)
    cache.end_pass(0)
    return cache


def long_tailed(index: ImageIndex, share: float) -> ImageIndex:
    """The same files: class 0, and a tail of this share of the samples in classes of two or three,
    drawn at random."""
    n = len(index)
    tail = np.random.default_rng(SEED).permutation(n)[: max(2, round(share * n))]
    labels = np.zeros(n, np.int64)
    labels[tail] = 1 + np.minimum(np.arange(len(tail)) // 2, len(tail) // 2 - 1)
    return ImageIndex.from_arrays(index.files, labels, index.root)


def memory_loader(
    stage: Stage,
    pixels: np.ndarray,
    image: ImageConfig,
    run: ExecConfig,
    *,
    drop_last: bool = True,
) -> Loader:
    """Batches of pixels uint8 [N, H, W, 3], from the stage's first epoch on."""
    order = Order(
        stage.index.labels,
        batch_size=run.batch_size,
        seed=SEED,
        start_epoch=stage.start_epoch,
    )
    images = ArrayImages(stage.index, pixels)
    pipeline = memory.train_pipeline(stage, images, order, image, run)
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
            self.mixed += int((batch.status == int(Status.MIXED)).sum())
            self.samples += len(batch.ids)
            yield batch.images

    @property
    def share(self) -> float:
        return round(self.mixed / max(1, self.samples), 5)


class Row:
    """Something that yields batches without end, and is timed a round at a time.

    batches: of anything that has as many entries as the batch has images. ahead: batches that may
    be finished before anybody asks for them.
    """

    def __init__(self, batches: Iterator, ahead: int, stage: Stage | None = None) -> None:
        self._batches, self._ahead, self._stage = batches, ahead, stage
        self.plan_ms: list[float] = []  # a batch, of every round
        self.cpu_ms: list[float] = []  # an image

    def measure(self, n: int, ready: Callable[[], object] = lambda: None) -> float:
        """-> img/s over n batches. ready: called last before the clock starts."""
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
    """For the report, by row: how long a batch is planned, and CPU time an image."""
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
