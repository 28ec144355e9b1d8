"""Pipelines that are fed from memory: training, and whole images for validation and saliency pass.

The order is ours here, so plans are made for many batches at once, in the source that feeds DALI:
NumPy's cost a call is then spread over thousands of samples.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import check_order, cut, feed, normalise
from scae_dali.methods.base import DataNode, Status
from scae_dali.ops import PlanNodes, Stage
from scae_dali.order import Order

PLANNED_AT_ONCE = 2048  # samples

Pixels = npt.NDArray[np.uint8]  # [N, H, W, 3]


class FedPlan(PlanNodes):
    """A plan that is made ahead of DALI: every part is fed on its own, which is faster than to cut
    it out of the row in the graph. `images` are whole, or, where they are mixed, cropped already.
    """

    def __init__(self, stage: Stage, order: Order, pixels: Pixels, image: ImageConfig) -> None:
        self._stage, self._order, self._pixels = stage, order, pixels
        self._size, self._crop = image.size, image.crop
        self._full_px = np.array(pixels.shape[1:3])
        self._first = -1  # of the batches planned last, by number
        self.planner = stage.planner(image.crop)
        self.images = feed(self._images, layout="HWC")
        self.row = feed(self._batch)

    def _cut(self, columns: slice | int, dtype: types.DALIDataType) -> DataNode:
        numpy_type = types.to_numpy_type(dtype)
        return feed(lambda info: self._batch(info)[:, columns].astype(numpy_type))

    def _images(self, info: Any) -> Pixels:
        batch = self._planned(info)
        images = self._pixels[self._column(self._rows[batch], "id")]
        slot = self._slot[batch]
        images[slot >= 0] = self._mixed[slot[slot >= 0]]
        return images

    def _batch(self, info: Any) -> np.ndarray:
        """float64 [B, K]."""
        batch = self._planned(info)
        return self._rows[batch]

    def _planned(self, info: Any) -> slice:
        """Plan what is not planned yet; which of the rows are this batch's."""
        b = self._order.batch_size
        many = max(1, PLANNED_AT_ONCE // b)
        step = info.iteration % self._order.batches % many
        if self._first != info.iteration - step:
            start = time.perf_counter()
            self._plan(info.iteration - step, many)
            self._stage.seconds += time.perf_counter() - start
        return slice(step * b, (step + 1) * b)

    def _plan(self, first: int, many: int) -> None:
        keys = self._order.keys(first, many)
        rows = self._stage.rows(
            self.planner,
            keys,
            np.full(len(keys), first),
            np.full((len(keys), 2), self._size),
            np.tile(self._full_px, (len(keys), 1)).astype(np.float64),
        )
        mixed = np.flatnonzero(self._column(rows, "status") == Status.MIXED)
        self._slot = np.full(len(rows), -1)  # where its pixels are, if a sample is mixed
        self._slot[mixed] = np.arange(len(mixed))
        self._mixed = self._mix(rows[mixed]) if len(mixed) else self._pixels[:0]
        rows[mixed, self.planner.columns["start"]] = 0  # cropped already
        self._first, self._rows = first, rows

    def _mix(self, rows: np.ndarray) -> np.ndarray:
        """Crops mixed with those of their partners, before the flip: uint8 [n, H, W, 3]."""
        columns = self.planner.columns
        start = rows[:, columns["start"]].astype(np.int64)
        full_px = np.tile(self._full_px, (len(rows), 1))
        window, flip = self.planner.partner_crop(rows, full_px, self._crop)
        column = partial(self._column, rows)
        a = _shifted(self._pixels, column("id"), start, np.zeros(len(rows), bool))
        b = _shifted(self._pixels, column("partner_id"), window[:, :2], flip)
        mu = rows[:, columns["mu"], None, None].astype(np.float32)
        return np.floor(a * mu + b * (1 - mu) + 0.5).astype(np.uint8)

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """int64 [B]."""
        return rows[:, self.planner.columns[name].start].astype(np.int64)


def _shifted(pixels: Pixels, ids: np.ndarray, start: np.ndarray, flip: np.ndarray) -> Pixels:
    """Windows of the images' own size, black outside them, flipped where `flip`."""
    h, w = pixels.shape[1:3]
    y, x = start[:, :1] + np.arange(h), start[:, 1:] + np.arange(w)
    x = np.where(flip[:, None], x[:, ::-1], x)
    inside = ((y >= 0) & (y < h))[:, :, None, None] & ((x >= 0) & (x < w))[:, None, :, None]
    y, x = y.clip(0, h - 1)[:, :, None], x.clip(0, w - 1)[:, None]
    return pixels[ids[:, None, None], y, x] * inside


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
            f"{full_px}, got {image.crop.kind!r} and {image.size}; set scae.mix_prob=0, or read "
            "the images from files (data.in_memory=false)"
        )

    @pipeline_def(enable_checkpointing=True, **run.arguments())
    def define():
        plan = FedPlan(stage, order, pixels, image)
        start, shape = plan.part("start", types.INT32), plan.part("shape", types.INT32)
        images = plan.images if run.device_id is None else plan.images.gpu()
        images = stage.apply(cut(images, start, shape, image, full_px), plan)
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
