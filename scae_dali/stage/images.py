"""Turns the files of an index into normalised images, by DALI's own operators.

All of it is called while a pipeline is being defined. GPU decoding of a region of interest is
reported to crash the process with nvImageCodec 0.9 (NVIDIA/nvImageCodec#55), so the decode path
`auto` avoids it there.
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any, Literal

from nvidia.dali import Pipeline, fn, types
from nvidia.dali.pipeline import do_not_convert

from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode, Triple

Decode = Literal["auto", "roi", "full"]
DTypeName = Literal["fp32", "fp16"]
LayoutName = Literal["NCHW", "NHWC"]

READER = "Reader"
HW_DECODER_LOAD = 0.65  # as in DALI; ResNet-50 trains faster with it than with 0.9
# Arguments of fn.slice for a start and shape in pixels, though they are float32.
IN_PIXELS = {"normalized_anchor": False, "normalized_shape": False}
_ROI_CRASHES = ("0.9.",)  # versions of nvImageCodec


def read(
    index: ImageIndex,
    ids: Sequence[int] | None = None,
    *,
    shard: int = 0,
    num_shards: int = 1,
    **order: Any,
) -> tuple[DataNode, DataNode]:
    """Encoded files and their ids, int32 [1], of one shard.

    ids: which samples, in this order; None: all. order: further arguments of fn.readers.file.
    """
    what: dict[str, Any]
    if ids is None:
        what = {"files": list(index.files)}  # without labels the reader gives ids
    else:
        what = {"files": [index.files[i] for i in ids], "labels": [int(i) for i in ids]}
    return fn.readers.file(
        **what,
        **order,
        file_root=index.root or ".",
        name=READER,
        shard_id=shard,
        num_shards=num_shards,
        pad_last_batch=True,
    )


@do_not_convert
def on_device(images: DataNode) -> DataNode:
    """Images from the CPU, moved to the pipeline's GPU if it has one."""
    return images if _device_id() is None else images.gpu()


def _device_id() -> int | None:
    return Pipeline.current().device_id


@do_not_convert
def decoder(hw_decoder_load: float = HW_DECODER_LOAD) -> dict[str, Any]:
    """Keyword arguments of DALI's decoders; `mixed` reads on the CPU and decodes on the GPU.

    hw_decoder_load: share of a batch that the JPEG engine of the GPU decodes, where it has one.
    """
    if _device_id() is None:
        return {"device": "cpu"}
    return {"device": "mixed", "hw_decoder_load": hw_decoder_load}


@do_not_convert
def resolve_decode(decode: Decode, device_id: int | None) -> Decode:
    """The decode path on this device: `roi` or `full`, which `auto` stands for too."""
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


def decode(encoded: DataNode, hw_decoder_load: float = HW_DECODER_LOAD) -> DataNode:
    """Upright RGB images, HWC uint8."""
    return fn.decoders.image(encoded, **decoder(hw_decoder_load))


def decode_crop(
    encoded: DataNode,
    start: DataNode,
    shape: DataNode,
    size: tuple[int, int],
    *,
    path: Decode = "auto",
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> DataNode:
    """The window (start, shape) of the upright image, resized to size (h, w): HWC uint8.

    path: `roi` decodes the window alone, which must lie within the image; `full` decodes the whole
    image, and what lies outside it is black; `auto` is `roi` on the CPU and, on a GPU, `full` where
    the ROI decoder is known to crash.
    """
    if resolve_decode(path, _device_id()) == "full":
        return cut(decode(encoded, hw_decoder_load), start, shape, size)
    images = fn.decoders.image_slice(
        encoded, start, shape, axes=(0, 1), **IN_PIXELS, **decoder(hw_decoder_load)
    )
    return fn.resize(images, size=size)


def cut(images: DataNode, start: DataNode, shape: DataNode, size: Any) -> DataNode:
    """The window (start, shape) of images, black outside them, resized to size.

    start, shape: int32 [2], or float32 [2] of whole numbers. size: (h, w) in pixels, or a node,
    float32 [2].
    """
    images = fn.slice(
        images, start, shape, axes=(0, 1), **IN_PIXELS, out_of_bounds_policy="pad", fill_values=0
    )
    return fn.resize(images, size=size)


def normalise(
    images: DataNode,
    *,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    dtype: DTypeName = "fp32",
    layout: LayoutName = "NCHW",
    **crop_mirror: Any,
) -> DataNode:
    """(x - mean) / std, in this type and layout.

    mean, std: in grey levels [0, 255]. crop_mirror: further arguments of fn.crop_mirror_normalize.
    """
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT if dtype == "fp32" else types.FLOAT16,
        output_layout="CHW" if layout == "NCHW" else "HWC",
        mean=list(mean),
        std=list(std),
        **crop_mirror,
    )
