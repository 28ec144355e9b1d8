"""Pipelines that are fed from memory: training, and whole images for validation and saliency pass.

The order is ours here, so plans are made for many batches at once, before DALI asks for them:
NumPy's cost a call is then spread over thousands of samples, and a thread bears it beside DALI's.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import check_order, cut, feed, normalise
from scae_dali.methods.base import DataNode, Status
from scae_dali.ops import PlanNodes, Stage
from scae_dali.order import Order

PLANNED_AT_ONCE = 4096  # samples

Pixels = npt.NDArray[np.uint8]  # [N, H, W, 3]


class _Block(NamedTuple):
    """What is planned at once: the batches from `first` on, by number.

    rows: float64 [n, K]. others: int64 [n, 3], (y, x) of the windows of the samples that are mixed
    in, and whether they are flipped.
    """

    first: int
    rows: np.ndarray
    others: np.ndarray


class FedPlan(PlanNodes):
    """A plan that is made ahead of DALI: every part is fed on its own, which is faster than to cut
    it out of the row in the graph. `images` are the crops, mixed already, if `crops`, and otherwise
    whole.
    """

    def __init__(self, stage: Stage, order: Order, pixels: Pixels, image: ImageConfig) -> None:
        self._stage, self._order, self._pixels = stage, order, pixels
        self._size, self._crop = image.size, image.crop
        full_px = pixels.shape[1:3]
        self._full_px = np.array(full_px)
        self.crops = image.crop.kind == "pad" and full_px == (image.size, image.size)
        self._many = max(1, PLANNED_AT_ONCE // order.batch_size)  # batches
        self._thread = ThreadPoolExecutor(1, "plan")  # all plans are made in it, one by one
        self._next: tuple[int, Future[_Block]] | None = None
        self._block: _Block | None = None
        self.planner = stage.planner(image.crop)
        self.images = feed(self._images, layout="HWC")
        self.row = feed(self._rows)

    def _cut(self, columns: slice | int, dtype: types.DALIDataType) -> DataNode:
        numpy_type = types.to_numpy_type(dtype)
        return feed(lambda info: self._rows(info)[:, columns].astype(numpy_type))

    def _images(self, info: Any) -> Pixels:
        block, batch = self._planned(info)
        rows, column = block.rows[batch], partial(self._column, block.rows[batch])
        if not self.crops:
            return self._pixels[column("id")]
        start = rows[:, self.planner.columns["start"]].astype(np.int64)
        images = shifted(self._pixels, column("id"), start, self._crop.pad)
        mixed = np.flatnonzero(column("status") == Status.MIXED)
        if len(mixed):
            ids, window = column("partner_id")[mixed], block.others[batch][mixed]
            others = shifted(self._pixels, ids, window[:, :2], self._crop.pad)
            flip = window[:, 2] == 1
            others[flip] = others[flip, :, ::-1]
            mu = rows[mixed, self.planner.columns["mu"], None, None].astype(np.float32)
            images[mixed] = np.floor(images[mixed] * mu + others * (1 - mu) + 0.5).astype(np.uint8)
        return images

    def _rows(self, info: Any) -> np.ndarray:
        """float64 [B, K]."""
        block, batch = self._planned(info)
        return block.rows[batch]

    @do_not_convert  # nothing that AutoGraph need look at
    def _planned(self, info: Any) -> tuple[_Block, slice]:
        """The block that has this batch, and which of its rows; the one after it is begun."""
        epoch, step = divmod(info.iteration, self._order.batches)
        step %= self._many
        first = info.iteration - step
        if self._block is None or self._block.first != first:
            if self._next is None or self._next[0] != first:
                self._next = first, self._thread.submit(self._plan, first)
            self._block = self._next[1].result()
            after = min(first + self._many, (epoch + 1) * self._order.batches)
            self._next = after, self._thread.submit(self._plan, after)
        b = self._order.batch_size
        return self._block, slice(step * b, (step + 1) * b)

    def _plan(self, first: int) -> _Block:
        start = time.perf_counter()
        keys = self._order.keys(first, self._many)
        full_px = np.tile(self._full_px, (len(keys), 1))
        rows = self._stage.rows(
            self.planner,
            keys,
            first + np.arange(len(keys)) // self._order.batch_size,
            np.full((len(keys), 2), self._size),
            full_px.astype(np.float64),
        )
        others = np.zeros((len(rows), 3), np.int64)
        mixed = np.flatnonzero(self._column(rows, "status") == Status.MIXED)
        if len(mixed):
            window, flip = self.planner.partner_crop(rows[mixed], full_px[mixed], self._crop)
            others[mixed] = np.column_stack([window[:, :2], flip])
        self._stage.seconds += time.perf_counter() - start
        return _Block(first, rows, others)

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """int64 [B]."""
        return rows[:, self.planner.columns[name].start].astype(np.int64)


def shifted(pixels: Pixels, ids: np.ndarray, start: np.ndarray, pad: int) -> Pixels:
    """Windows of the images' own size, black outside them.

    ids: int64 [n]. start: int64 [n, 2], (y, x) in [-pad, pad]. Returns uint8 [n, H, W, 3].
    """
    n, (h, w) = len(ids), pixels.shape[1:3]
    framed = np.zeros((n, h + 2 * pad, w + 2 * pad, 3), np.uint8)
    framed[:, pad : pad + h, pad : pad + w] = pixels[ids]
    windows = sliding_window_view(framed, (h, w), axis=(1, 2))  # [n, y, x, 3, H, W]
    y, x = (start + pad).T
    return windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(n), y, x]


def train_pipeline(
    stage: Stage,
    pixels: Pixels,
    order: Order,
    image: ImageConfig,
    run: ExecConfig,
    *,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """As pipelines.train.train_pipeline, of pixels uint8 [N, H, W, 3] in this order."""
    check_order(order, stage, run)
    full_px = pixels.shape[1:3]
    if stage.mixes and (image.crop.kind != "pad" or full_px != (image.size, image.size)):
        raise ValueError(
            "images in memory are mixed only where image.crop.kind is pad and image.size theirs, "
            f"{full_px}, got {image.crop.kind!r} and {image.size}; set the method's mix_prob=0, or "
            "read the images from files (data.in_memory=false)"
        )

    @pipeline_def(
        enable_checkpointing=True, enable_conditionals=stage.conditional, **run.arguments()
    )
    def define():
        plan = FedPlan(stage, order, pixels, image)
        images = plan.images if run.device_id is None else plan.images.gpu()
        if not plan.crops:
            start, shape = plan.part("start", types.FLOAT), plan.part("shape", types.FLOAT)
            images = cut(images, start, shape, image)
        images = stage.apply(images, plan)
        return normalise(images, image, mirror=plan.scalar("flip", types.INT32)), plan.row

    return define(checkpoint=checkpoint)


def whole_pipeline(
    pixels: Pixels,
    image: ImageConfig,
    run: ExecConfig,
    order: Order,
    ids: Sequence[int] | None = None,
    *,
    stretch: bool,
) -> Pipeline:
    """Whole images in turn, as pipelines.val (stretch=False) and pipelines.saliency give them.

    order: of sampling `in_turn` over the ids, None: over all images. Yields images and id.
    """
    chosen = np.arange(len(pixels)) if ids is None else np.asarray(ids)

    def batch(info):
        return chosen[order.keys(info.iteration)]

    @pipeline_def(**run.arguments())
    def define():
        images = feed(lambda info: pixels[batch(info)], layout="HWC")
        if run.device_id is not None:
            images = images.gpu()
        side = image.size if stretch else image.val_resize
        if pixels.shape[1:3] != (side, side):
            how = {"size": (side, side)} if stretch else {"mode": "not_smaller", "size": side}
            images = fn.resize(images, **how)
        crop = {} if stretch else {"crop": (image.size, image.size)}
        return normalise(images, image, **crop), feed(lambda info: batch(info)[:, None])

    return define()
