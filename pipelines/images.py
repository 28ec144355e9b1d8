"""What the pipelines do alike: read the files of an index, decode, normalise.

The decode path is decided here. GPU decoding of a region of interest is reported to crash the
process with nvImageCodec 0.9 (NVIDIA/nvImageCodec#55), so `auto` avoids it there.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert

from pipelines.config import Decode, ExecConfig, ImageConfig
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode
from scae_dali.plan.order import ID, Order
from scae_dali.plan.random import derive
from scae_dali.stage.stage import PlanNodes, Stage

READER = "Reader"
# Of a slice whose start and shape are whole numbers in float32.
IN_PIXELS = {"normalized_anchor": False, "normalized_shape": False}
_ROI_CRASHES = ("0.9.",)  # versions of nvImageCodec


def read(
    index: ImageIndex, run: ExecConfig, ids: Sequence[int] | None = None, **order
) -> tuple[DataNode, DataNode]:
    """Encoded files and their ids, int32 [1]. ids: which samples, in this order; None: all."""
    what: dict[str, Any]
    if ids is None:
        what = {"files": list(index.files)}  # without labels the reader gives the place
    else:
        what = {"files": [index.files[i] for i in ids], "labels": [int(i) for i in ids]}
    return fn.readers.file(
        **what,
        **order,
        file_root=index.root or ".",
        name=READER,
        shard_id=run.shard,
        num_shards=run.num_shards,
        pad_last_batch=True,
    )


def read_shuffled(index: ImageIndex, run: ExecConfig, seed: int) -> tuple[DataNode, DataNode]:
    """`read` in an order of its own each epoch, which depends on (seed, epoch) alone where the
    pipeline has checkpointing enabled."""
    return read(
        index, run, shuffle_after_epoch=True, shuffle_after_epoch_seed=derive(seed, "order")
    )


def feed(source: Callable[[Any], Any], layout: str = "") -> DataNode:
    """Batches by their number (info.iteration), which a checkpoint of the pipeline restores."""
    return fn.external_source(
        source=lambda info: source(info), batch=True, batch_info=True, layout=layout
    )


def read_in_order(index: ImageIndex, order: Order) -> tuple[DataNode, DataNode]:
    """Encoded files in an order of ours, and their keys (see `order`), int64 [1]."""

    def paths(info):
        return index.encoded_paths((order.keys(info.iteration) & ID).tolist())

    keys = feed(lambda info: order.keys(info.iteration)[:, None])
    return fn.io.file.read(feed(paths)), keys


def check_order(order: Order, stage: Stage, run: ExecConfig) -> None:
    """Raise ValueError where a stage would count other epochs than the order has."""
    sizes = order.batch_size, stage.batch_size, run.batch_size
    check(
        len(set(sizes)) == 1,
        f"batch_size must be the same of order, stage and pipeline, got {sizes}",
    )
    mine = order.batches, order.start_epoch
    other = stage.batches_per_epoch, stage.start_epoch
    check(
        mine == other,
        f"order and stage must agree in batches an epoch and start_epoch, got {mine} and {other}; "
        f"give the stage epoch_size={order.epoch_size} and num_shards={order.num_shards}",
    )


@do_not_convert
def resolve_decode(decode: Decode, device_id: int | None) -> Decode:
    """`roi` or `full`, for `auto` too."""
    if decode != "auto":
        return decode
    crashes = device_id is not None and _nvimgcodec().startswith(_ROI_CRASHES)
    return "full" if crashes else "roi"


def _nvimgcodec() -> str:
    """The version of the decoder, whose package is named after the CUDA of DALI's build; "" where
    none is installed."""
    for cuda in ("cu12", "cu13"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(f"nvidia-nvimgcodec-{cuda}")
    return ""


def decode(encoded: DataNode, run: ExecConfig) -> DataNode:
    """Upright RGB images, HWC uint8."""
    return fn.decoders.image(encoded, **run.decoder)


def decode_crop(
    encoded: DataNode, start: DataNode, shape: DataNode, image: ImageConfig, run: ExecConfig
) -> DataNode:
    """The window (start, shape) of the upright image, resized to the crop's size: HWC uint8."""
    if image.crop.kind == "pad" or resolve_decode(image.decode, run.device_id) == "full":
        return cut(decode(encoded, run), start, shape, image)
    images = fn.decoders.image_slice(encoded, start, shape, axes=(0, 1), **IN_PIXELS, **run.decoder)
    return fn.resize(images, size=(image.size, image.size))


def cut(images: DataNode, start: DataNode, shape: DataNode, image: ImageConfig) -> DataNode:
    """The window (start, shape) of images, black outside them, resized to the crop's size."""
    images = fn.slice(
        images, start, shape, axes=(0, 1), **IN_PIXELS, out_of_bounds_policy="pad", fill_values=0
    )
    return fn.resize(images, size=(image.size, image.size))


def planned(
    stage: Stage, encoded: DataNode, ids: DataNode, image: ImageConfig, *, keyed: bool = False
) -> tuple[DataNode, DataNode, PlanNodes]:
    """The stage's plan with a crop that it draws, whose start and shape come first. keyed: ids are
    those of `read_in_order`."""
    plan = stage.plan(
        ids,
        size=(image.size, image.size),
        shapes=fn.peek_image_shape(encoded),
        random_crop=image.crop,
        keyed=keyed,
    )
    return plan.part("start", types.FLOAT), plan.part("shape", types.FLOAT), plan


def crop_planned(
    stage: Stage,
    encoded: DataNode,
    ids: DataNode,
    image: ImageConfig,
    run: ExecConfig,
    *,
    keyed: bool = False,
) -> tuple[DataNode, PlanNodes]:
    """The crop that the stage draws, HWC uint8 and not erased yet, and the stage's whole plan."""
    start, shape, plan = planned(stage, encoded, ids, image, keyed=keyed)
    return decode_crop(encoded, start, shape, image, run), plan


def normalise(images: DataNode, image: ImageConfig, **crop_mirror) -> DataNode:
    """(x - mean) / std, in the wished type and layout."""
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT if image.dtype == "fp32" else types.FLOAT16,
        output_layout="CHW" if image.layout == "NCHW" else "HWC",
        mean=list(image.mean),
        std=list(image.std),
        **crop_mirror,
    )
