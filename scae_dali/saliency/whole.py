"""A pipeline of whole upright images: for saliency passes, and with a central crop for validation.

loader_for = partial(whole_loader, index, size=224, batch_size=256, device_id=0)
refresh_cache(model, cache, index, loader_for, epoch=0)
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def

from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD, check, check_choice
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages, index_of
from scae_dali.methods.base import DataNode, Triple
from scae_dali.plan.order import Order
from scae_dali.stage.feed import feed, read_batches
from scae_dali.stage.images import (
    HW_DECODER_LOAD,
    DTypeName,
    LayoutName,
    decode,
    normalise,
    on_device,
    read,
)
from scae_dali.stage.loader import Loader

OUTPUTS = ("images", "id")


def whole_pipeline(
    images: ImageIndex | ArrayImages,
    ids: Sequence[int] | None = None,
    *,
    size: int,
    resize: int | None = None,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    dtype: DTypeName = "fp32",
    layout: LayoutName = "NCHW",
    batch_size: int,
    device_id: int | None = None,
    threads: int = 4,
    prefetch: int = 3,
    shard: int = 0,
    num_shards: int = 1,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Pipeline:
    """A pipeline that yields OUTPUTS for these samples once an epoch, in this order: images, float
    [3, S, S] or [S, S, 3], and id, int [1], the place in the index.

    Args:
        images: files or archives, or images in memory.
        ids: which samples; None: all.
        size: S, the side in pixels.
        resize: the shorter side in pixels before the central crop of S x S. None: the image is
            stretched to S x S whatever its aspect ratio, so that its map covers the full frame.
        mean: of a channel, in grey levels [0, 255]; the images become (x - mean) / std.
        std: of a channel, as mean.
        dtype: fp32 or fp16.
        layout: NCHW or NHWC.
        batch_size: of a shard.
        device_id: the GPU, or None for the CPU alone.
        threads: of DALI.
        prefetch: batches that DALI makes ahead.
        shard: which part of the samples this pipeline yields.
        num_shards: how many parts there are.
        hw_decoder_load: share of a batch that the JPEG engine of the GPU decodes, where it has one.

    Raises ValueError for settings out of range, IndexError for ids that are no places in the index.
    """
    index = index_of(images)
    check(size >= 1, f"size must be at least 1, got {size}")
    check(
        resize is None or resize >= size,
        f"resize must be at least size ({size}), got {resize}; None stretches the whole image",
    )
    check_choice("dtype", dtype, get_args(DTypeName))
    check_choice("layout", layout, get_args(LayoutName))
    check(min(std) > 0, f"std must be positive, got {std}")
    check(0 <= shard < num_shards, f"shard must be in [0, num_shards={num_shards}), got {shard}")
    chosen = _chosen(index, ids)
    side = size if resize is None else resize
    has_size = isinstance(images, ArrayImages) and images.pixels.shape[1:3] == (side, side)
    scale: dict[str, Any] = {"size": (side, side)}
    crop: dict[str, Any] = {}
    if resize is not None:
        scale, crop = {"mode": "not_smaller", "size": side}, {"crop": (size, size)}

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    def define():
        if isinstance(images, ArrayImages) or images.archives is not None:
            order = _in_turn(index, ids, batch_size, shard, num_shards)
            whole, sample_ids = _fed(images, chosen, order, hw_decoder_load)
        else:
            encoded, sample_ids = read(images, ids, shard=shard, num_shards=num_shards)
            whole = decode(encoded, hw_decoder_load)
        if not has_size:
            whole = fn.resize(whole, **scale)
        given = normalise(whole, mean=mean, std=std, dtype=dtype, layout=layout, **crop)
        return given, sample_ids

    return define()


def whole_loader(
    images: ImageIndex | ArrayImages,
    ids: Sequence[int] | None = None,
    *,
    batch_size: int,
    shard: int = 0,
    num_shards: int = 1,
    remedy: Callable[[str], str] = str,
    **settings: Any,
) -> Loader:
    """The batches of `whole_pipeline`: each sample of the shard once an epoch, the last batch maybe
    smaller. settings: further arguments of `whole_pipeline`. remedy: see Loader."""
    part: dict[str, Any] = {"batch_size": batch_size, "shard": shard, "num_shards": num_shards}
    pipeline = whole_pipeline(images, ids, **part, **settings)
    index, order = index_of(images), None
    if isinstance(images, ArrayImages) or images.archives is not None:
        order = _in_turn(index, ids, **part)
    return Loader(pipeline, OUTPUTS, index, drop_last=False, order=order, remedy=remedy)


def _chosen(index: ImageIndex, ids: Sequence[int] | None) -> np.ndarray:
    """The samples `ids`, or all, as int64 [n]."""
    if ids is None:
        return np.arange(len(index))
    chosen = np.asarray(ids, dtype=np.int64)
    check(len(chosen) > 0, "ids must not be empty; None takes all samples")
    if not 0 <= chosen.min() <= chosen.max() < len(index):
        raise IndexError(
            f"ids must be in [0, {len(index)}), the places in the index, got {chosen.min()} … "
            f"{chosen.max()}"
        )
    return chosen


def _in_turn(
    index: ImageIndex, ids: Sequence[int] | None, batch_size: int, shard: int, num_shards: int
) -> Order:
    """The order of the samples `ids`; an id in it is a position in `ids`."""
    return Order(
        index.labels[_chosen(index, ids)],
        batch_size=batch_size,
        seed=0,  # nothing is drawn
        sampling="in_turn",
        shard=shard,
        num_shards=num_shards,
    )


def _fed(
    images: ImageIndex | ArrayImages, chosen: np.ndarray, order: Order, hw_decoder_load: float
) -> tuple[DataNode, DataNode]:
    """Images uint8 [H, W, 3], from memory or from archives, and their ids, int64 [1]."""

    def batch(n: int) -> np.ndarray:
        return chosen[order.keys(n)]

    ids = feed(lambda info: batch(info.iteration)[:, None])
    if isinstance(images, ImageIndex):
        return decode(read_batches(images, batch), hw_decoder_load), ids
    pixels = images.pixels
    return on_device(feed(lambda info: pixels[batch(info.iteration)], layout="HWC")), ids
