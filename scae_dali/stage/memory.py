"""Feeds DALI with training images in memory: compiled kernels cut, mix and erase the crops.

The order is known ahead, so many batches are made at once, before DALI asks for them, in a thread
of their own. NumPy's cost per call is then spread over thousands of samples.

    plan = FedPlan(stage, order, images, size=(32, 32), crop=CropConfig(kind="pad", pad=4))
    erased = stage.apply(plan.images, plan)
    outputs = fn.crop_mirror_normalize(erased, mirror=plan.scalar("flip", types.INT32)), plan.row
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, types
from nvidia.dali.pipeline import do_not_convert

from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import paste
from scae_dali.methods.base import NO_PARTNERS, DataNode, Status, Triple
from scae_dali.plan.compiled import compiled
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.blend import blend
from scae_dali.stage.feed import check_order, feed
from scae_dali.stage.images import cut, on_device
from scae_dali.stage.stage import PlanNodes, Stage

# A block has at most:
SAMPLES_AT_ONCE = 2048
BYTES_AT_ONCE = 16 << 20  # of images

Pixels = npt.NDArray[np.uint8]  # [N, H, W, 3]


class _Block(NamedTuple):
    """Batches that are made at once; `first` is the number of the first one.

    images: uint8 [n, H, W, 3]. others: the crops of the partners, like images, black where a sample
    has none; empty where the graph does not paste them. rows: float64 [n, K], settled (see
    Planner.settle). parts: [n, …] each, as they were asked for.
    """

    first: int
    images: Pixels
    others: Pixels
    rows: np.ndarray
    parts: list[np.ndarray]


def check_memory(
    stage: Stage,
    order: Order,
    images: ArrayImages,
    *,
    size: tuple[int, int],
    crop: CropConfig,
    batch_size: int,
) -> None:
    """Raise ValueError where a FedPlan would: order, stage and pipeline must agree, and images may
    be mixed only where they are cropped in memory. batch_size: the pipeline's.

    Called before a pipeline with conditionals is defined, it spares its caller AutoGraph's trace.
    """
    check_order(order, stage, batch_size)
    if stage.mixes and not _crops_here(images, size, crop):
        raise ValueError(
            "images in memory are mixed only where crop.kind is pad and size theirs, "
            f"{images.pixels.shape[1:3]}, got {crop.kind!r} and {size}; {NO_PARTNERS}, or read the "
            "images from files (train.py: data.in_memory=false)"
        )


def _crops_here(images: ArrayImages, size: tuple[int, int], crop: CropConfig) -> bool:
    """Whether crops are made in memory: windows of the images' own size, shifted."""
    return crop.kind == "pad" and images.pixels.shape[1:3] == tuple(size)


class FedPlan(PlanNodes):
    """A plan that is made ahead of DALI, for images in memory, and the images themselves.

    Make it in the definition of a pipeline. stage, order: they must count the same epochs. images:
    of the stage's index. size: (h, w) of the crops in pixels. crop: how the stage draws them.

    images: uint8 [h, w, 3], the crops, before the flip, on the pipeline's device. Crops by `pad` of
    the images' own size are made in memory, and blended with partners there. Where a method fills
    its boxes with one colour for all, they are erased there too. Boxes of partners are pasted there
    if the graph changes nothing before. Other crops are cut by DALI out of whole images.
    Every part of the plan is fed on its own, which is faster than to cut it out of the row in the
    graph. DALI asks for what it is fed in the thread that trains, which finds it ready.

    Raises ValueError as check_memory does.
    """

    def __init__(
        self,
        stage: Stage,
        order: Order,
        images: ArrayImages,
        *,
        size: tuple[int, int],
        crop: CropConfig,
    ) -> None:
        batch_size = Pipeline.current().max_batch_size
        check_memory(stage, order, images, size=size, crop=crop, batch_size=batch_size)
        self._stage, self._order = stage, order
        self._pixels, self._size, self._crop = images.pixels, size, crop
        stage.size = size
        self._full_px = np.array(self._pixels.shape[1:3])
        self._crops_here = _crops_here(images, size, crop)
        self._many = batches_at_once(self._pixels, order.batch_size)
        self._thread = ThreadPoolExecutor(1, "plan")  # all blocks are made in it, one by one
        self._next: tuple[int, Future[_Block]] | None = None
        self._block: _Block | None = None
        self._parts: list[tuple[slice | int, npt.DTypeLike]] = []
        self._fill: np.ndarray | None = None  # fill of boxes; None: the graph erases
        self._pasted: str | None = None  # the boxes of partners; None: the graph pastes
        self.planner = stage.planner(crop, keyed=True)
        self.partners_mixed = True
        self.images = on_device(self._feed(lambda block: block.images, layout="HWC"))
        self.row = self._feed(lambda block: block.rows)
        if self.planner.pastes:
            others = on_device(self._feed(lambda block: block.others, layout="HWC"))
            self.partners = lambda: (others, self.row)
        if not self._crops_here:
            start, shape = self.part("start", types.FLOAT), self.part("shape", types.FLOAT)
            self.images = cut(self.images, start, shape, size)

    def fill_boxes(self, images: DataNode, value: Triple) -> bool:
        if images is not self.images or not self._crops_here:
            return False
        self._fill = np.array(value).astype(np.uint8)
        return True

    def paste_partners(self, name: str, images: DataNode) -> DataNode:
        if images is not self.images:
            return super().paste_partners(name, images)
        self._pasted = name
        return images

    def _cut(self, columns: slice | int, dtype: types.DALIDataType) -> DataNode:
        number = len(self._parts)
        self._parts.append((columns, types.to_numpy_type(dtype)))
        return self._feed(lambda block: block.parts[number])

    def _feed(self, part: Callable[[_Block], np.ndarray], layout: str = "") -> DataNode:
        def source(info: Any) -> np.ndarray:
            block, batch = self._made(info.iteration)
            return part(block)[batch]

        return feed(source, layout)

    @do_not_convert  # AutoGraph need not look at it
    def _made(self, n: int) -> tuple[_Block, slice]:
        """The block that has batch n, and where in it; begins to make the next block."""
        epoch, step = divmod(n, self._order.batches)
        step %= self._many
        first = n - step
        if self._block is None or self._block.first != first:
            if self._next is None or self._next[0] != first:
                self._next = first, self._thread.submit(self._make, first)
            self._block = self._next[1].result()
            after = min(first + self._many, (epoch + 1) * self._order.batches)
            self._next = after, self._thread.submit(self._make, after)
        b = self._order.batch_size
        return self._block, slice(step * b, (step + 1) * b)

    def _make(self, first: int) -> _Block:
        start = time.perf_counter()
        keys = self._order.keys(first, self._many)
        full_px = np.tile(self._full_px, (len(keys), 1))
        rows = self.planner(
            keys,
            first + np.arange(len(keys)) // self._order.batch_size,
            np.full((len(keys), 2), self._size),
            full_px.astype(np.float64),
        )
        self._stage.seconds += time.perf_counter() - start
        mixed, partners = self._partners(rows, full_px)
        parts = [rows[:, columns].astype(dtype) for columns, dtype in self._parts]
        images = self._images(rows, mixed, partners)
        others = images[:0]
        if self.planner.pastes and self._pasted is None:
            others = np.zeros_like(images)
            others[mixed] = partners
        return _Block(first, images, others, rows, parts)

    def _partners(self, rows: np.ndarray, full_px: np.ndarray) -> tuple[np.ndarray, Pixels]:
        """Which samples are mixed, int64 [m], and the crops of their partners, flipped where the
        plan says so. Settles the rows, in place."""
        if not self.planner.mixes:
            return np.empty(0, np.int64), self._pixels[:0]
        mixed = np.flatnonzero(self._column(rows, "status") & Status.MIXED)
        rows[mixed], window, flip = self.planner.settle(rows[mixed], full_px[mixed], self._crop)
        ids = self._column(rows[mixed], "partner_id")
        others = shifted(self._pixels, ids, window[:, :2].astype(np.int64))
        others[flip == 1] = others[flip == 1, :, ::-1]
        return mixed, others

    def _images(self, rows: np.ndarray, mixed: np.ndarray, partners: Pixels) -> Pixels:
        ids = self._column(rows, "id")
        if not self._crops_here:
            return self._pixels[ids]
        images = shifted(self._pixels, ids, rows[:, self.planner.columns["start"]].astype(np.int64))
        if not self.planner.pastes:
            blend(images, mixed, partners, rows[mixed, self.planner.columns["mu"].start])
        if self._fill is not None:
            _fill_boxes(images, rows[:, self.planner.columns["box"]].astype(np.int64), self._fill)
        if self._pasted is not None:
            anchors, shapes = (
                rows[:, self.planner.columns[field]][mixed, 2:].astype(np.int64)
                for field in paste.fields(self._pasted)
            )
            for k, partner, (y, x), (h, w) in zip(mixed, partners, anchors, shapes, strict=True):
                images[k, y : y + h, x : x + w] = partner[y : y + h, x : x + w]
        return images

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """A column of width 1 as int64 [B]."""
        return rows[:, self.planner.columns[name].start].astype(np.int64)


def batches_at_once(pixels: Pixels, batch_size: int) -> int:
    """How many batches a block has. While one block is used, the next is made."""
    samples = min(SAMPLES_AT_ONCE, BYTES_AT_ONCE // pixels[0].nbytes)
    return max(1, samples // batch_size)


def shifted(pixels: Pixels, ids: np.ndarray, start: np.ndarray) -> Pixels:
    """Windows of the images' own size, black outside them.

    ids: int64 [n]. start: int64 [n, 2], (y, x) in pixels. Returns uint8 [n, H, W, 3].
    """
    _, h, w, channels = pixels.shape
    out = np.zeros((len(ids), h, w, channels), np.uint8)
    # Flat arrays with unsigned indices: Numba would check every other index for being negative.
    _fill_windows(
        out.ravel(), pixels.ravel(), h, w * channels, ids, start[:, 0], start[:, 1] * channels
    )
    return out


@compiled
def _fill_windows(out, pixels, height, width, ids, y, x):
    """Writes `shifted` into out, zeros, uint8 [n·height·width]; width and x count bytes."""
    for i in range(len(ids)):
        left, right = max(0, -x[i]), min(width, width - x[i])
        for row in range(max(0, -y[i]), min(height, height - y[i])):
            to = np.uint64((i * height + row) * width + left)
            source = np.uint64((ids[i] * height + row + y[i]) * width + left + x[i])
            for k in range(np.uint64(max(0, right - left))):
                out[to + k] = pixels[source + k]


def _fill_boxes(images: Pixels, boxes: np.ndarray, color: np.ndarray) -> None:
    """Eq. 1, in place. images: uint8 [n, H, W, C]. boxes: int64 [n, 4], (y, x, h, w) in pixels.
    color: uint8 [C]."""
    _, h, w, channels = images.shape
    _fill_lines(images.ravel(), h, w, channels, boxes, np.tile(color, w))


@compiled
def _fill_lines(images, height, width, channels, boxes, line):
    """`_fill_boxes` in flat images. line: uint8 [width·channels], what a line is filled with."""
    for i in range(len(boxes)):
        y, x, h, w = boxes[i]
        left, right = max(0, x), min(width, x + w)
        for row in range(max(0, y), min(height, y + h)):
            to = np.uint64(((i * height + row) * width + left) * channels)
            for k in range(np.uint64(max(0, right - left) * channels)):
                images[to + k] = line[k]
